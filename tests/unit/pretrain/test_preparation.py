"""Mirrors of other runs, found before training."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from experiment.config import build_config
from experiment.errors import UserError
from experiment.files import write_json
from experiment.run_files.checkpoints import checkpoint_path, complete_checkpoints, mark_complete
from experiment.run_files.mirror import Mirror
from experiment.run_files.provenance import read_provenance, write_provenance
from experiment.run_files.run_folder import RunFolder
from experiment.storage import StorageError
from pretrain import preparation
from pretrain.config import PretrainConfig
from pretrain.training.checkpointer import verify_together
from pretrain.training.cpu_group import CpuGroup
from pretrain.world import World

T = TypeVar("T")


class OneRank(CpuGroup):
    """A group of one rank, without a process group."""

    def __init__(self) -> None:
        pass

    def from_all_ranks_slowly(self, function: Callable[[Callable[[], None]], T]) -> list[T]:
        return [function(lambda: None)]


def test_progress_is_made_while_a_checkpoint_is_verified(tmp_path: Path) -> None:
    """Catches a resume that times out because a disk takes long to read a large checkpoint, all the time."""
    checkpoint, progress = save(RunFolder(tmp_path), 1), list[int]()
    (checkpoint / "COMPLETE").unlink()
    (checkpoint / "tensors").write_bytes(bytes(10_000_000))
    mark_complete(checkpoint)

    class Slow(OneRank):
        def from_all_ranks_slowly(self, function: Callable[[Callable[[], None]], T]) -> list[T]:
            return [function(lambda: progress.append(1))]

    assert verify_together(Slow(), World(rank=0, size=1, local_rank=0), checkpoint) is None
    assert len(progress) > 2, "also while a file is read"


@pytest.fixture
def mirror(tmp_path: Path) -> Mirror:
    """The mirror of a run with a checkpoint of step 1, whose folder is `first`."""
    made, run = Mirror(f"file://{tmp_path}/mirror"), RunFolder(tmp_path / "first")
    write_provenance(run, {}, [])
    made.upload_run_files(run)
    made.upload(save(run, 1))
    return made


def save(folder: RunFolder, step: int) -> Path:
    checkpoint = checkpoint_path(folder.checkpoints, step)
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / "state.json", {"step": step})
    mark_complete(checkpoint)
    return checkpoint


def restore(folder: RunFolder, mirror: Mirror, resume: str = "auto") -> list[Path]:
    """Prepare a run in this folder, and return its checkpoints."""
    tree: dict[str, Any] = {
        "run": {"dir": str(folder.path), "resume": resume},
        "model": {"config": {"model_type": "bert"}},
        "corpus": {"train": "unused"},
        "schedule": {"steps": 9},
        "checkpoint": {"mirror": mirror.url},
    }
    world = World(rank=0, size=1, local_rank=0)
    preparation.restore_from_mirror(build_config(PretrainConfig, tree), world, OneRank())
    return complete_checkpoints(folder.checkpoints)


def test_an_empty_folder_takes_over_the_run(mirror: Mirror, tmp_path: Path) -> None:
    """Catches a run that cannot continue after its disk is lost, or after a restore."""
    new = RunFolder(tmp_path / "new")
    assert len(restore(new, mirror)) == 1
    assert read_provenance(new) == read_provenance(RunFolder(tmp_path / "first"))
    assert len(restore(new, mirror)) == 1
    save(new, 2)
    assert len(restore(new, mirror)) == 2


@pytest.mark.parametrize("steps", [(), (1,)])
def test_the_mirror_of_another_run_is_refused(mirror: Mirror, tmp_path: Path, steps: tuple[int, ...]) -> None:
    """Catches a run that takes, or replaces, the checkpoints of another run, also before it has saved one."""
    other = RunFolder(tmp_path / "other")
    write_provenance(other, {}, [])
    for step in steps:
        save(other, step)
    with pytest.raises(UserError, match=f"{mirror.url} belongs to another run .*choose another checkpoint.mirror"):
        restore(other, mirror)
    assert len(complete_checkpoints(other.checkpoints)) == len(steps)


def test_a_used_mirror_without_checkpoints_is_no_new_one(mirror: Mirror, tmp_path: Path) -> None:
    """Catches a new run, or a fork, that takes the identity of the run whose first upload is in progress."""
    mirror.delete("step-00000001")
    new = RunFolder(tmp_path / "new")
    with pytest.raises(
        UserError, match=r"run.resume is 'never', but .* already holds a run; choose another checkpoint"
    ):
        restore(new, mirror, "never")
    with pytest.raises(UserError, match=r"holds a run that is not a fork of .*; choose another checkpoint.mirror"):
        restore(new, mirror, str(tmp_path / "first"))
    assert not new.path.exists()


def test_a_mirror_without_provenance_is_used(mirror: Mirror, tmp_path: Path) -> None:
    """Catches a mirror whose provenance is missing, and is refused by its own run."""
    (tmp_path / "mirror" / "run" / "provenance.json").unlink()
    assert len(restore(RunFolder(tmp_path / "new"), mirror)) == 1
    assert len(restore(RunFolder(tmp_path / "first"), mirror)) == 1


@pytest.mark.parametrize("answers", [True, False])
def test_a_run_with_checkpoints_does_not_need_the_storage(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answers: bool
) -> None:
    """Catches a run that cannot resume, or waits for hours, because the storage of its mirror is down; and one that
    starts over meanwhile because its folder is empty."""
    end = threading.Event()

    def fail(mirror: Mirror) -> None:
        if not answers:
            end.wait()
        raise StorageError("the storage is down")

    monkeypatch.setattr(Mirror, "provenance", fail)
    monkeypatch.setattr("pretrain.restore._OWNER_SECONDS", 60.0 if answers else 0.05)
    assert len(restore(RunFolder(tmp_path / "first"), mirror)) == 1
    problem = "the storage is down" if answers else "no answer in 0 s"
    assert f"not checked whether the mirror {mirror.url} belongs to this run: {problem}" in caplog.text
    end.set()
    with pytest.raises(StorageError, match="is down"):
        restore(RunFolder(tmp_path / "new"), mirror)


@pytest.mark.parametrize(("others", "agreed"), [((0, 0), "windows"), ((1, 0), "flat"), ((0, 1), None)])
def test_all_ranks_have_the_same_rows(others: tuple[int, int], agreed: str | None) -> None:
    """Catches ranks that take other sequences of a batch than the rest, on a host with another GPU or CPU.

    others: whether the other rank has flat rows, and padded ones.
    """

    class TwoRanks(OneRank):
        def all_reduce_sum(self, values: Sequence[int]) -> list[int]:
            return [own + other for own, other in zip(values, others, strict=True)]

    if agreed is not None:
        assert preparation.agreed_rows("flat", World(size=2), TwoRanks()) == agreed
        return
    with pytest.raises(UserError, match="1 of 2 ranks find that packed sequences influence each other"):
        preparation.agreed_rows("flat", World(size=2), TwoRanks())
