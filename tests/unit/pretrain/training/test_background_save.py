import errno
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment.files import call_after_syncs, fsync_tree, write_text
from experiment.models.tensor_files import save_tensors
from experiment.run_files.checkpoints import checkpoint_step, complete_checkpoints
from experiment.run_files.goodput import CHECKPOINTING, TRAINING, ActivityTimer
from experiment.run_files.retention import Retention
from experiment.run_files.run_folder import RunFolder, open_run_folder
from pretrain.training import background_save, checkpoint_tensors
from pretrain.training.background_save import BackgroundSave, Snapshot, ThreadWork, UnwritableError
from pretrain.training.checkpoint_tensors import Share
from pretrain.world import World


class OneRank:
    """The group of a run with one rank."""

    world = World()

    def from_rank0(self, function: Any) -> Any:
        return function()

    def all_gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def wait_for_all(self, part: Future[Any], has_worked: Any) -> None:
        part.exception()


@pytest.mark.parametrize("logged", [True, False])
def test_the_metrics_are_on_disk_before_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: bool
) -> None:
    """Catches steps that are missing in the metrics after a power cut: the resumed run does not log them again."""
    folder, order = open_run_folder(tmp_path / "run"), []
    if logged:
        folder.metrics.touch()

    def fsync(path: Path) -> None:
        path.stat()
        order.append(path)

    monkeypatch.setattr(background_save, "fsync", fsync)
    monkeypatch.setattr(background_save, "complete_checkpoint", lambda *_: None)
    monkeypatch.setattr(background_save, "publish", lambda partial, final, keep, before: order.append(final))
    saves = BackgroundSave(folder.checkpoints, OneRank(), ActivityTimer(0.0), None)  # type: ignore[arg-type]
    saves.begin(Snapshot(7, Share(0, {}, {}), {}, lambda *_: None, Retention(keep_last=1)))
    saves.wait()
    assert (saves.saved_step, saves.problem) == (7, "")
    assert order == [folder.metrics] * logged + [folder.checkpoints / "step-00000007"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run whose checkpoints have no content."""
    monkeypatch.setattr(background_save, "complete_checkpoint", lambda path, *_: write_text(path / "COMPLETE", "{}"))
    return open_run_folder(tmp_path / "run")


def save(saves: BackgroundSave, step: int, keep: Retention = Retention(keep_last=1, keep_every=5)) -> None:  # noqa: B008
    saves.begin(Snapshot(step, Share(0, {}, {}), {}, lambda *_: None, keep))
    saves.wait()


@pytest.mark.parametrize(("name", "kept"), [("fsync", (3, 5)), ("write_best", (5,)), ("apply_retention", (3, 5))])
def test_a_checkpoint_that_has_its_name_is_saved(
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    kept: tuple[int, ...],
) -> None:
    """Catches a checkpoint that is on disk, but reported as not written, and deleted as damaged by the next save; and
    a disk that stays full because the best checkpoint cannot be named."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    saves = BackgroundSave(folder.checkpoints, OneRank(), ActivityTimer(0.0), None)  # type: ignore[arg-type]
    assert not folder.saved.exists()
    save(saves, 3)
    assert folder.saved.exists()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_tensors, name, fail)
        save(saves, 5, Retention(keep_last=1, keep_every=5, best=5))
    assert saves.saved_step == 5
    assert "cannot be written" not in caplog.text
    assert f"not deleted: {os.strerror(errno.EIO)}; the next save tries again" in caplog.text
    assert [checkpoint_step(path) for path in complete_checkpoints(folder.checkpoints)] == list(kept)
    save(saves, 7)
    assert [path.name for path in complete_checkpoints(folder.checkpoints)] == ["step-00000005", "step-00000007"]
    assert saves.problem == ""


def test_an_outage_of_a_few_minutes_is_survived(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that ends for good because storage does not answer for some seconds, and one that trains on for
    hours although nothing can be saved."""
    now, fails = 100.0, True

    def publish(*_: Any, **__: Any) -> None:
        if fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(background_save, "publish", publish)
    monkeypatch.setattr(background_save.time, "monotonic", lambda: now)
    saves = BackgroundSave(folder.checkpoints, OneRank(), ActivityTimer(0.0), None)  # type: ignore[arg-type]
    for step in range(1, 10):
        save(saves, step)
        now += 99.0
    assert not folder.saved.exists()
    now, fails = 991.0, False
    save(saves, 10)
    now, fails = 2000.0, True
    save(saves, 11)
    now = 3000.0
    save(saves, 12)  # the second one
    with pytest.raises(UnwritableError, match=os.strerror(errno.EIO)):
        save(saves, 13)


def test_deleting_what_a_resumed_run_does_not_keep_is_not_training(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a slow disk that lowers the first speed after a resume, and that counts as goodput."""
    now = 100.0

    def delete(*_: Any) -> None:
        nonlocal now
        now += 16.0

    monkeypatch.setattr(background_save, "apply_retention", delete)
    times = ActivityTimer(0.0, clock=lambda: now)
    times.begin_training()
    saves = BackgroundSave(folder.checkpoints, OneRank(), times, 8)  # type: ignore[arg-type]
    saves.delete_superseded(Retention(keep_last=1))
    assert (times.elapsed(CHECKPOINTING), times.elapsed(TRAINING)) == (16.0, 0.0)


def test_a_thread_that_waits_for_a_disk_does_not_work() -> None:
    """Catches a dead disk that counts as a slow one: a thread that waits for it may still wake up now and then."""
    used = 5.0
    work = ThreadWork(lambda: used)
    found = []
    for more in (0.0, 0.0001, 0.0009, 0.02, 0.0, 0.0002, 0.001):
        used += more
        found.append(work.has_worked())
    assert found == [False, False, False, True, False, False, True]


def test_a_thread_that_syncs_small_files_works(tmp_path: Path) -> None:
    """Catches a slow disk that counts as a dead one while small files are written, which takes no processor time."""
    with ThreadPoolExecutor(1) as pool:
        work = ThreadWork(lambda: 5.0)
        pool.submit(call_after_syncs, work.count_sync).result()
        found = [work.has_worked()]
        for write in (
            lambda: write_text(tmp_path / "small", "text"),
            lambda: fsync_tree(tmp_path),
            lambda: save_tensors({"weight": torch.zeros(2)}, tmp_path / "tensors"),
        ):
            pool.submit(write).result()
            found += [work.has_worked(), work.has_worked()]
    write_text(tmp_path / "other", "by another thread, such as that of a tracker")
    assert [*found, work.has_worked()] == [False, True, False, True, False, True, False, False]
