"""Checkpoints are written while training continues."""

import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from experiment.run_files.checkpoints import checkpoint_path, complete_checkpoints, verify
from experiment.run_files.run_folder import RunFolder
from fp16 import fp16_supported
from pretrain.world import World
from rank_pool import RankPool
from runs import (
    Tree,
    assert_same_run,
    assert_same_tensors,
    logged,
    pretrain_case,
    run_config,
    saved_tensors,
    soak,
)
from small_disk import SmallDisk
from waiting import LIMIT, wait_until


@pytest.fixture(scope="module")
def undisturbed(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 6 steps."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert pools[2].run(pretrain_case, run_config(folder, wordpiece_corpus)) == ["done", "done"]
    return folder


@contextmanager
def _patched(owner: Any, name: str, replace: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, replace(getattr(owner, name)))
        yield


@contextmanager
def _after_log(function: Callable[[Any, int], None]) -> Iterator[None]:
    """Call `function(trainer, step)` after each log event, before the checkpoint of that step."""
    from pretrain.training.trainer import Trainer

    def replace(original: Callable[..., None]) -> Callable[..., None]:
        def log(trainer: Any, *args: Any) -> None:
            original(trainer, *args)
            function(trainer, trainer._progress.step)

        return log

    with _patched(Trainer, "_report", replace):
        yield


@contextmanager
def _before_writing(function: Callable[[int], None]) -> Iterator[None]:
    """Call `function(step)` in the thread that writes, before it writes this rank's share."""
    from pretrain.training import background_save

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        def write(share: Any, partial: Path) -> Any:
            function(int(partial.stem.removeprefix(".step-")))
            return original(share, partial)

        return write

    with _patched(background_save, "write_share", replace):
        yield


def held_case(world: World, tree: Tree) -> str:
    """A run in which the checkpoint of step 2 is not written before step 3 is logged."""
    logged_3 = threading.Event()

    def after_log(_: Any, step: int) -> None:
        if step == 3:
            logged_3.set()

    def hold(step: int) -> None:
        assert step > 2 or logged_3.wait(LIMIT)

    with fp16_supported(), _after_log(after_log), _before_writing(hold):
        return pretrain_case(world, tree)


def synchronous_case(world: World, tree: Tree) -> str:
    """A run that waits for each of its checkpoints."""
    from pretrain.training.checkpointer import Checkpointer

    with fp16_supported(), pytest.MonkeyPatch.context() as patch:
        original = Checkpointer.save

        def save(checkpointer: Any, progress: Any) -> None:
            original(checkpointer, progress)
            checkpointer.saves.wait()

        patch.setattr(Checkpointer, "save", save)
        return pretrain_case(world, tree)


def _tensor_files(checkpoint: Path) -> dict[str, bytes]:
    files = [*checkpoint.rglob("*.safetensors"), checkpoint / "engine" / "index.json"]
    return {str(path.relative_to(checkpoint)): path.read_bytes() for path in files}


@pytest.mark.parametrize("ds_config", ["fp32_zero1", *soak("fp32_zero0", "fp16_zero2", "bf16_zero1", "fp32_zero3")])
def test_a_checkpoint_is_the_state_of_its_step(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str
) -> None:
    """Catches a save that training waits for, and one that contains later weights, averages or progress."""

    def tree(name: str) -> Tree:
        changes = {"checkpoint__every_steps": 2, "schedule__steps": 4, "model__ema_decay": 0.7}
        return run_config(tmp_path / name, wordpiece_corpus, ds_config, **changes)

    assert pools[2].run(held_case, tree("held")) == ["done", "done"]
    assert pools[2].run(synchronous_case, tree("synchronous")) == ["done", "done"]
    for step in (2, 4):
        held, synchronous = (checkpoint_path(tmp_path / name / "checkpoints", step) for name in ("held", "synchronous"))
        assert verify(held) is None
        assert _tensor_files(held) == _tensor_files(synchronous)
        assert "hf-ema/model.safetensors" in _tensor_files(held)
        assert_same_run(tmp_path / "held", tmp_path / "synchronous", step)
    assert logged(tmp_path / "synchronous", "checkpoint_seconds")[2] > 0


def test_steps_without_a_save_add_no_line_to_the_ledger(undisturbed: Path) -> None:
    """Catches a look at the save in flight that is written to goodput.jsonl in every step."""
    lines = RunFolder(undisturbed).goodput.read_text(encoding="utf-8").split("\n")
    assert sum('"checkpointing"' in line.partition('"seconds"')[0] for line in lines) == 1, "of the last step"


def failing_case(world: World, tree: Tree, steps: Collection[int]) -> str:
    """A run in which the last rank cannot write the checkpoints of `steps`."""

    def fail(step: int) -> None:
        if step in steps and world.rank == world.size - 1:
            raise OSError(28, "No space left on device")

    from pretrain.training import background_save

    with _before_writing(fail), pytest.MonkeyPatch.context() as patch:
        patch.setattr(background_save, "_OUTAGE_SECONDS", 0.0)
        return pretrain_case(world, tree)


@pytest.mark.parametrize(
    ("failing", "outcome", "saved"), [({2, 3, 5}, "done", [1, 4, 6]), ({3, 4, 5}, "stopped", [1, 2])]
)
def test_three_failed_saves_in_a_row_stop_a_run(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    tmp_path: Path,
    failing: set[int],
    outcome: str,
    saved: list[int],
) -> None:
    """Catches a run that stops at the first failed save, one that trains on although nothing can be saved, and
    failures that are counted although a save between them succeeded."""
    tree = run_config(tmp_path, wordpiece_corpus, checkpoint__every_steps=1)
    assert pools[2].run(failing_case, tree, failing) == [outcome] * 2
    checkpoints = tmp_path / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"step-{step:08d}" for step in saved]
    assert verify(complete_checkpoints(checkpoints)[-1]) is None
    log = RunFolder(tmp_path).rank_log(0).read_text(encoding="utf-8")
    warned = failing if outcome == "done" else {3, 4}
    for step in range(1, 7):
        warning = f"the checkpoint of step {step} cannot be written: rank 1: "
        assert log.count(warning) == int(step in warned)
    assert log.count("no checkpoint can be written: rank 1: ") == int(outcome == "stopped")
    if outcome == "stopped":
        assert pools[2].run(pretrain_case, tree) == ["done", "done"]
    assert logged(tmp_path, "step") == [1, 2, 3, 4, 5, 6]


def disturbed_case(
    world: World, tree: Tree, begin: Callable[[], object], end: Callable[[], object] | None = None
) -> str:
    """A run for which `begin` is called at step 3. `end`: at step 5, when the save that has begun after `begin` is
    over."""

    def after_log(trainer: Any, step: int) -> None:
        if world.rank == 0 and step == 3:
            begin()
        elif world.rank == 0 and step == 5 and end is not None:
            saves = trainer._checkpointer.saves
            wait_until(lambda: saves.is_part_done or saves.problem)  # perhaps the ranks have agreed on it already
            end()

    with _after_log(after_log):
        return pretrain_case(world, tree)


def test_training_continues_while_the_disk_is_full(
    pools: dict[int, RankPool], wordpiece_corpus: Path, undisturbed: Path, small_disk: SmallDisk
) -> None:
    """Catches a run that a full disk stops or changes, and remains of a failed save."""
    run = small_disk.path / "run"
    tree = run_config(run, wordpiece_corpus, checkpoint__every_steps=4, schedule__steps=6)
    assert pools[2].run(disturbed_case, tree, small_disk.fill, small_disk.free) == ["done", "done"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]
    saved = [saved_tensors(checkpoint_path(folder / "checkpoints", 6)) for folder in (run, undisturbed)]
    assert_same_tensors(*saved)


def test_training_continues_without_permission_to_write(
    pools: dict[int, RankPool], wordpiece_corpus: Path, undisturbed: Path, tmp_path: Path, small_disk: SmallDisk
) -> None:
    """Catches a run that ends because its checkpoints cannot be written for a while."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(small_disk.path, target_is_directory=True)
    tree = run_config(run, wordpiece_corpus, checkpoint__every_steps=4)
    writable = (partial(small_disk.set_writable, value) for value in (False, True))
    assert pools[2].run(disturbed_case, tree, *writable) == ["done", "done"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]
    assert "Read-only file system" in RunFolder(run).rank_log(0).read_text(encoding="utf-8")
    assert_same_run(run, undisturbed, 6)


def test_training_continues_without_the_folder(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a run that cannot save again because a folder is missing."""
    tree = run_config(tmp_path, wordpiece_corpus, checkpoint__every_steps=2)
    remove = partial(shutil.rmtree, tmp_path / "checkpoints", ignore_errors=True)
    assert pools[2].run(disturbed_case, tree, remove) == ["done", "done"]
    assert verify(checkpoint_path(tmp_path / "checkpoints", 6)) is None


def test_leftovers_are_removed_at_the_start(
    pools: dict[int, RankPool], wordpiece_corpus: Path, undisturbed: Path
) -> None:
    """Catches a partial checkpoint that fills the disk until the next save, which may be hours later or fail."""
    leftover = undisturbed / "checkpoints" / ".step-00000004.partial"
    leftover.mkdir()
    assert pools[2].run(pretrain_case, run_config(undisturbed, wordpiece_corpus)) == ["done", "done"]
    assert not leftover.exists()


def kept_before_the_save_case(world: World, tree: Tree) -> list[str]:
    """The checkpoints at the first step of a resumed run."""
    found: list[str] = []

    def look(_: Any, step: int) -> None:
        found.extend(path.name for path in (Path(tree["run"]["dir"]) / "checkpoints").iterdir() if step == 7)

    with _after_log(look):
        pretrain_case(world, tree)
    return found


def test_a_lower_keep_last_frees_room_at_the_start(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a full disk that stays full although `keep_last` was lowered, as the message advises: old checkpoints
    that are only deleted after a save."""
    tree = run_config(tmp_path, wordpiece_corpus, checkpoint__every_steps=2, checkpoint__keep_last=3)
    assert pools[2].run(pretrain_case, tree) == ["done", "done"]
    assert len(complete_checkpoints(tmp_path / "checkpoints")) == 3
    tree["checkpoint"] |= {"keep_last": 1, "every_steps": 100}
    assert pools[2].run(pretrain_case, tree) == ["done", "done"]  # has no step to train, and deletes nothing
    assert len(complete_checkpoints(tmp_path / "checkpoints")) == 3
    tree["schedule"]["steps"] = 8
    assert pools[2].run(kept_before_the_save_case, tree) == [["step-00000006"], ["step-00000006"]]


def stopped_case(world: World, tree: Tree) -> str:
    """A run that is asked to stop after step 3, when the checkpoint of step 2 is not written yet."""
    from pretrain.training.checkpointer import Checkpointer

    stopping = threading.Event()

    def replace(original: Callable[..., None]) -> Callable[..., None]:
        def save_now(checkpointer: Any, progress: Any) -> None:
            stopping.set()
            original(checkpointer, progress)

        return save_now

    def hold(_: int) -> None:
        assert stopping.wait(LIMIT)

    with _patched(Checkpointer, "save_now", replace), _before_writing(hold):
        return pretrain_case(world, tree, 3)


def test_a_stop_during_a_save_ends_with_a_complete_checkpoint(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a run that ends before its last checkpoint is written, or drops the one in flight."""
    tree = run_config(tmp_path, wordpiece_corpus, checkpoint__every_steps=2)
    assert pools[2].run(stopped_case, tree) == ["stopped", "stopped"]
    checkpoints = tmp_path / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000003"]
    assert [verify(path) for path in complete_checkpoints(checkpoints)] == [None, None]
