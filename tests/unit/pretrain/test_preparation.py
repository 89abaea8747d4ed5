"""Mirrors of other runs, found before training."""

import errno
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import Mock

import pytest

from experiment.config import build_config
from experiment.errors import UserError
from experiment.files import write_json
from experiment.run_files import mirror as mirror_module
from experiment.run_files.checkpoints import (
    Verify,
    checkpoint_path,
    checkpoint_step,
    complete_checkpoints,
    mark_complete,
    write_best,
)
from experiment.run_files.downstream import DownstreamResult, read_results, write_result
from experiment.run_files.fillings import CheckpointFillings, add_fillings, read_fillings
from experiment.run_files.mirror import Mirror
from experiment.run_files.provenance import read_provenance, write_provenance
from experiment.run_files.run_folder import RunFolder
from experiment.storage import StorageError, write_bytes
from pretrain import preparation
from pretrain.config import PretrainConfig
from pretrain.training.checkpointer import verify_together
from pretrain.training.cpu_group import CpuGroup
from pretrain.world import World

T = TypeVar("T")


class OneRank(CpuGroup):
    """A group of one rank, without a process group."""

    def __init__(self, world: World = World()) -> None:  # noqa: B008 (it is frozen)
        self.world = world

    def call(self, function: Callable[[], T]) -> T:
        return function()

    from_rank0 = call

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

    assert verify_together(Slow(), checkpoint) is None
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
    write_json(checkpoint / "state.json", {"step": step, "provenance": read_provenance(folder)})
    mark_complete(checkpoint)
    return checkpoint


def train(folder: RunFolder, mirror: Mirror, host: str, *steps: int) -> None:
    """Add an attempt to a run, whose checkpoints of these steps are copied to the mirror."""
    write_provenance(folder, {"host": host, "step": steps_in(folder)[-1]})
    folder.metrics.write_text(f"until {steps}")
    mirror.upload_run_files(folder)
    for step in steps:
        mirror.upload(save(folder, step))


def run_config(folder: RunFolder, mirror: Mirror, resume: str = "auto") -> PretrainConfig:
    tree: dict[str, Any] = {
        "run": {"dir": str(folder.path), "resume": resume},
        "model": {"config": {"model_type": "bert"}},
        "corpus": {"train": "unused"},
        "schedule": {"steps": 9},
        "checkpoint": {"mirror": mirror.url},
    }
    return build_config(PretrainConfig, tree)


def restore(folder: RunFolder, mirror: Mirror, resume: str = "auto") -> list[Path]:
    """Prepare a run in this folder, and return its checkpoints."""
    preparation.restore_from_mirror(OneRank(), run_config(folder, mirror, resume))
    return complete_checkpoints(folder.checkpoints)


def test_an_empty_folder_takes_over_the_run(mirror: Mirror, tmp_path: Path) -> None:
    """Catches a run that cannot continue after its disk is lost, or after a restore."""
    new = RunFolder(tmp_path / "new")
    assert len(restore(new, mirror)) == 1
    assert read_provenance(new) == read_provenance(RunFolder(tmp_path / "first"))
    assert len(restore(new, mirror)) == 1
    save(new, 2)
    assert len(restore(new, mirror)) == 2


def steps_in(folder: RunFolder) -> list[int]:
    return [checkpoint_step(path) for path in complete_checkpoints(folder.checkpoints)]


@pytest.mark.parametrize("has_checkpoints", [True, False])
def test_a_folder_that_is_behind_the_mirror_takes_over_its_newer_checkpoints(
    mirror: Mirror, tmp_path: Path, has_checkpoints: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a host that returns with its old disk and deletes what another host has trained since; and one that
    starts over, that deletes what it has saved last, or that shows the scores of what it had trained for those of what
    the other one has."""
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    save(first, 2)  # not copied before the host was lost
    if not has_checkpoints:
        shutil.rmtree(first.checkpoints)
    restore(second, mirror)
    train(second, mirror, "b")
    write_provenance(first, {"host": "a"})  # lost before it has saved anything
    for step in (1, 2, 3):
        write_result(first, DownstreamResult(step, "toy", "accuracy", False, {"accuracy": 0.5}, "w", "c", 1.0))
        add_fillings(first, CheckpointFillings(step, "w", ()))
    restore(first, mirror)
    assert [result.step for result in read_results(first)] == ([1, 2, 3] if has_checkpoints else [1])
    assert steps_in(first) == ([1, 2] if has_checkpoints else [1])
    assert read_provenance(first) == mirror.provenance()
    train(second, mirror, "c", 5, 7)
    mirror.write_best("step-00000005")
    first.metrics.write_text("until [1]")
    restore(first, mirror)
    assert steps_in(first) == ([1, 2, 5, 7] if has_checkpoints else [1, 5, 7])
    assert (first.checkpoints / "best").read_text() == "step-00000005\n"
    assert first.metrics.read_text() == "until (5, 7)"
    assert [result.step for result in read_results(first)] == [found.step for found in read_fillings(first)] == [1]
    assert read_provenance(first) == mirror.provenance()
    assert f"the run in {mirror.url} was continued in another folder: copying its newer checkpoints" in caplog.text
    train(first, mirror, "a", 9)
    assert steps_in(second) == [1, 5, 7]
    restore(second, mirror)
    assert steps_in(second)[-1] == 9


@pytest.mark.parametrize("is_mirrored", [True, False])
def test_a_run_whose_checkpoints_are_gone_resumes_from_its_mirror_only(
    mirror: Mirror, tmp_path: Path, is_mirrored: bool
) -> None:
    """Catches a run that starts over because the mirror of its lost checkpoints is empty or new, and one that is
    refused although its mirror has them."""
    first = RunFolder(tmp_path / "first")
    shutil.rmtree(first.checkpoints)
    first.logs.mkdir()
    first.saved.touch()
    if is_mirrored:
        assert restore(first, mirror) == [checkpoint_path(first.checkpoints, 1)]
        return
    with pytest.raises(UserError, match=f"there is no checkpoint in {first.checkpoints}, but this run has saved some"):
        restore(first, Mirror(f"file://{tmp_path}/new"))


def test_a_mirror_whose_first_upload_was_not_finished(tmp_path: Path) -> None:
    """Catches a host that is refused because a lost one has resumed from a checkpoint that the mirror lacks."""
    lost, new, mirror = RunFolder(tmp_path / "lost"), RunFolder(tmp_path / "new"), Mirror(f"file://{tmp_path}/mirror")
    write_provenance(lost, {"step": 5}, [])
    mirror.upload_run_files(lost)
    for _ in range(2):
        assert restore(new, mirror) == []
        assert read_provenance(new) == read_provenance(lost)


def test_an_older_checkpoint_is_resumed_where_only_this_folder_has_trained(mirror: Mirror, tmp_path: Path) -> None:
    """Catches a user who has deleted the newest checkpoints to go back, and gets them again."""
    first = RunFolder(tmp_path / "first")
    train(first, mirror, "a", 5, 7)
    write_provenance(first, {"host": "a"})
    for step in (5, 7):
        shutil.rmtree(checkpoint_path(first.checkpoints, step))
    restore(first, mirror)
    assert steps_in(first) == [1]


def test_a_run_that_was_continued_in_two_folders_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    """Catches a host that deletes the checkpoints of another one, also if the storage was down when it started."""
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    restore(second, mirror)
    train(second, mirror, "b", 5)
    write_provenance(first, {"host": "a"})
    save(first, 7)
    with pytest.raises(UserError, match=f"the run in {mirror.url} was continued in another folder than {first.path}"):
        restore(first, mirror)
    assert list(mirror.complete()) == ["step-00000001", "step-00000005"]
    assert read_provenance(second) == mirror.provenance()


@pytest.mark.parametrize("steps", [(), (12,), (25,)])
def test_a_folder_with_checkpoints_that_were_not_copied(mirror: Mirror, tmp_path: Path, steps: Sequence[int]) -> None:
    """Catches a host that saves on while the storage is down, returns, and deletes what another host has trained since
    from an older checkpoint; and one that is refused although no checkpoint is lost."""
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    restore(second, mirror)
    save(first, 15)
    save(first, 20)  # not copied
    train(second, mirror, "b", *steps)
    if steps == (12,):
        with pytest.raises(UserError, match="was continued in another folder"):
            restore(first, mirror)
    else:
        assert [checkpoint_step(path) for path in restore(first, mirror)] == [1, 15, 20, *steps]
        assert read_provenance(first) == mirror.provenance()


def test_an_old_checkpoint_with_a_damaged_state_is_ignored(mirror: Mirror, tmp_path: Path) -> None:
    """Catches a run that is refused because of a checkpoint that it does not resume from."""
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    restore(second, mirror)
    train(second, mirror, "b", 5)
    write_provenance(first, {"host": "a"})  # lost before it has saved anything
    for step, content in ((2, "damaged"), (3, "[]")):
        (save(first, step) / "state.json").write_text(content)
    (save(first, 4) / "state.json").unlink()
    assert [checkpoint_step(path) for path in restore(first, mirror)] == [1, 2, 3, 4, 5]


def test_an_interrupted_copy_of_newer_checkpoints_is_repeated(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a folder that has the mirror's provenance, but not its checkpoints, which it then deletes."""
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    restore(second, mirror)
    train(second, mirror, "b", 5)

    def fail(path: Path, target: Path) -> Path:
        raise OSError("the host is lost")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="the host is lost"):
            restore(first, mirror)
    restore(first, mirror)
    assert steps_in(first) == [1, 5]
    assert first.metrics.read_text() == "until (5,)"


def test_a_score_that_cannot_be_deleted_keeps_no_run_from_starting(
    mirror: Mirror, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that is refused at each start because of a file of another user, in a folder behind its mirror."""
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    restore(second, mirror)
    train(second, mirror, "b", 5)
    (first.downstream / "toy" / "step-00000003.json").mkdir(parents=True)  # a folder: root may delete any file
    restore(first, mirror)
    assert steps_in(first) == [1, 5]
    assert "cannot delete the scores of abandoned checkpoints" in caplog.text


@pytest.mark.parametrize("is_empty", [False, True])
def test_a_copy_that_is_interrupted_between_two_checkpoints(
    mirror: Mirror, tmp_path: Path, is_empty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a folder that names its own best checkpoint for good, so that the mirror's is deleted; and an empty one
    that resumes from the best checkpoint instead of the newest, or names one that it has not."""
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    write_best(first.checkpoints, 1)
    restore(second, mirror)
    train(second, mirror, "b", 5, 7)
    mirror.write_best("step-00000005")
    folder, replace = RunFolder(tmp_path / "third") if is_empty else first, mirror_module._replace

    def lose_host(checkpoint: Path, copied: Path) -> None:
        replace(checkpoint, copied)
        raise OSError("the host is lost")

    with monkeypatch.context() as patch:
        patch.setattr(mirror_module, "_replace", lose_host)
        with pytest.raises(OSError, match="the host is lost"):
            restore(folder, mirror)
    preparation._identify_copy(folder)
    restore(folder, mirror)
    assert steps_in(folder) == ([7] if is_empty else [1, 5, 7])
    best = folder.checkpoints / "best"
    assert not best.exists() if is_empty else best.read_text() == "step-00000005\n"
    assert read_provenance(folder) == mirror.provenance()


def test_a_folder_that_continues_a_run_from_its_mirror_is_no_copy(mirror: Mirror, tmp_path: Path) -> None:
    """Catches a folder that gets another id, for which the mirror is another run's, because its attempt ended early and
    the first folder is still there; and a copy that does not."""
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    write_provenance(first, {"folder": str(first.path)})
    mirror.upload_run_files(first)
    restore(second, mirror)
    preparation._identify_copy(second)
    assert read_provenance(second) == mirror.provenance()
    write_provenance(second, {"folder": str(second.path)})
    mirror.upload_run_files(second)
    restore(first, mirror)
    preparation._identify_copy(first)
    assert read_provenance(first) == mirror.provenance()
    copy = RunFolder(shutil.copytree(first.path, tmp_path / "copy"))
    preparation._identify_copy(copy)
    assert read_provenance(copy) != mirror.provenance()


def test_a_used_folder_that_is_refused_stays_as_it_is(mirror: Mirror, tmp_path: Path) -> None:
    """Catches `run.resume: never` that writes to a folder before it is refused."""
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    restore(second, mirror)
    train(second, mirror, "b", 5)
    before = read_provenance(first)
    assert len(restore(first, mirror, "never")) == 1
    assert read_provenance(first) == before


@pytest.mark.parametrize("fault", [None, "other content", "no checkpoint", "damaged", "down", "full disk"])
def test_a_damaged_checkpoint_is_copied_from_the_mirror(
    mirror: Mirror,
    tmp_path: Path,
    fault: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Catches a run that resumes from an older checkpoint, or not at all, and deletes the undamaged one in the mirror;
    and one that stops because it cannot have that one."""
    checkpoint = checkpoint_path(RunFolder(tmp_path / "first").checkpoints, 1)
    if fault == "other content":
        write_bytes(f"{mirror.url}/step-00000001/COMPLETE", b"{}")
    if fault == "no checkpoint":
        mirror.delete("step-00000001")
    if fault == "damaged":
        write_bytes(f"{mirror.url}/step-00000001/state.json", b"damaged")
    errors = {"down": StorageError("the storage is down"), "full disk": OSError(errno.ENOSPC, "No space left")}
    if fault in errors:
        monkeypatch.setattr(mirror_module, "fetch", Mock(side_effect=errors[fault]))
    before = (checkpoint / "state.json").read_bytes()
    (checkpoint / "state.json").write_bytes(b"{}")
    problem = preparation.verify_or_repair(OneRank(), mirror.url, checkpoint)
    if fault is None:
        assert (problem, (checkpoint / "state.json").read_bytes()) == (None, before)
        assert f"the checkpoint {checkpoint} was damaged: state.json has checksum" in caplog.text
        return
    assert problem.startswith("state.json has checksum")
    assert (checkpoint / "state.json").read_bytes() == b"{}"
    assert ("cannot be copied again" in caplog.text) == (fault in ("damaged", *errors))
    assert preparation.verify_or_repair(OneRank(), None, checkpoint) == problem


def test_ranks_copy_a_damaged_checkpoint_before_they_skip_it(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches ranks that verify a checkpoint, but do not repair it."""
    folder, found = RunFolder(tmp_path / "first"), list[str | None]()
    checkpoint = checkpoint_path(folder.checkpoints, 1)
    (checkpoint / "state.json").write_bytes(b"{}")

    def resolve(config: PretrainConfig, ranks: int, decide: object, verify: Verify, *_: Any) -> None:
        found.append(verify(checkpoint))
        raise UserError("enough")

    monkeypatch.setattr(preparation, "set_up_logging", lambda *_: None)
    monkeypatch.setattr(preparation, "resolve", resolve)
    with pytest.raises(UserError, match="enough"):
        preparation.prepare(run_config(folder, mirror), OneRank())
    assert found == [None]


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


@pytest.mark.parametrize(("others", "agreed"), [((0, 0), "packed"), ((1, 0), "flat"), ((0, 1), None)])
def test_all_ranks_have_the_same_rows(others: tuple[int, int], agreed: str | None) -> None:
    """Catches ranks that take other sequences of a batch than the rest, on a host with another GPU or CPU.

    others: whether the other rank has flat rows, and padded ones.
    """

    class TwoRanks(OneRank):
        def all_reduce_sum(self, values: Sequence[int]) -> list[int]:
            return [own + other for own, other in zip(values, others, strict=True)]

    group = TwoRanks(World(size=2))
    if agreed is not None:
        assert preparation.agreed_row_kind(group, "flat") == agreed
        return
    with pytest.raises(UserError, match="1 of 2 ranks find that packed sequences would get other logits"):
        preparation.agreed_row_kind(group, "flat")
