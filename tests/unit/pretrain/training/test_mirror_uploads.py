"""Copies of checkpoints while training continues."""

import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiment.errors import UserError
from experiment.files import write_json
from experiment.run_files import checkpoints as checkpoints_on_disk
from experiment.run_files import mirror as mirror_module
from experiment.run_files.checkpoints import mark_complete, read_state, replace_state, write_best
from experiment.run_files.mirror import Mirror
from experiment.run_files.provenance import read_provenance, write_provenance
from experiment.run_files.retention import Retention
from experiment.run_files.run_folder import RunFolder
from experiment.storage import DeniedError, StorageError, list_files, list_folders, write_bytes
from experiment.tracking.alerts import Alert
from pretrain.resume import ResumePlan
from pretrain.training import checkpointer, mirror_uploads
from pretrain.training.checkpointer import Checkpointer
from pretrain.training.mirror_uploads import MirrorUploads
from pretrain.training_progress import TrainingProgress
from pretrain.world import World
from s3_server import Fault, Proxy, response
from waiting import wait_until


def save(folder: RunFolder, step: int) -> Path:
    checkpoint = folder.checkpoints / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / "state.json", {"step": step, "provenance": read_provenance(folder)})
    mark_complete(checkpoint)
    return checkpoint


@pytest.fixture
def mirror(tmp_path: Path) -> Mirror:
    """In a folder: requests to moto's server take longer."""
    return Mirror(f"file://{tmp_path}/store/run")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def failing(error: Exception) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def make_checkpointer(
    run: RunFolder, mirror: Mirror, patch: pytest.MonkeyPatch, plan: ResumePlan, alert: Any = print
) -> Any:
    """A checkpointer that copies checkpoints, and saves none."""
    settings = SimpleNamespace(checkpoint=SimpleNamespace(mirror=mirror.url))
    resolved = SimpleNamespace(folder=run, resume_plan=plan, config=settings)
    others: Any = dict.fromkeys(["engine", "model", "stream", "interval", "clock", "times", "provenance"])
    group: Any = SimpleNamespace(world=World())
    patch.setattr(checkpointer, "BackgroundSave", lambda *_: None)
    return Checkpointer(resolved, group=group, **others, alert=alert)  # type: ignore


def steps(mirror: Mirror) -> list[int]:
    return [int(name[-8:]) for name in mirror.complete()]


def test_new_checkpoints_are_copied_and_old_ones_deleted(mirror: Mirror, run: RunFolder) -> None:
    """Catches a mirror without the newest or the best checkpoint, or with all."""
    uploads = MirrorUploads(mirror, run, lambda alert: None)
    for step in (1, 2, 3, 4):
        save(run, step)
        uploads.update(Retention(keep_last=2, best=1 if step > 1 else None), step)
        wait_until(lambda step=step: step in steps(mirror))
    uploads.close()
    assert steps(mirror) == [1, 3, 4]
    assert uploads.problem is None


def test_the_best_checkpoint_is_kept_until_the_mirror_has_the_new_one(
    mirror: Mirror, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a mirror without any best checkpoint, or that names one that it lacks: while uploads are slower than
    saves, and after the save of the new best one has failed."""
    upload, order = Mirror.upload, list[int]()

    def save_next(step: int, best: int) -> None:
        save(run, step)
        write_best(run.checkpoints, best)
        uploads.update(Retention(keep_last=1, best=best), step)

    def record(mirror: Mirror, checkpoint: Path, known: bytes | None) -> bytes:
        order.append(int(checkpoint.name[-8:]))
        if order == [1, 3]:  # the best one is not copied yet
            assert named_in(mirror) == 1
            save_next(4, best=2)
        assert named_in(mirror) in (None, *steps(mirror))
        return upload(mirror, checkpoint)

    def named_in(mirror: Mirror) -> int | None:
        best = mirror.best()
        return None if best is None else int(best[-8:])

    monkeypatch.setattr(Mirror, "upload", record)
    uploads = MirrorUploads(mirror, run, lambda alert: None)
    save_next(1, best=1)
    wait_until(lambda: named_in(mirror) == 1)
    save(run, 2)
    save_next(3, best=2)
    wait_until(lambda: named_in(mirror) == 2 and steps(mirror) == [2, 4])
    save_next(6, best=5)  # its save has failed
    uploads.close()
    assert (steps(mirror), named_in(mirror)) == ([2, 6], 2)
    assert order == [1, 3, 2, 4, 6]


def test_checkpoints_of_an_earlier_attempt_are_copied(
    mirror: Mirror, run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a mirror that lacks what was saved just before a crash, or gets what need not be kept or is damaged."""
    for step in (1, 2, 3):
        save(run, step)
    uploads = MirrorUploads(mirror, run, lambda alert: None)
    caplog.set_level(logging.INFO)
    uploads.update(Retention(keep_last=1), 2, is_new=False)  # the run did not resume from step 3
    uploads.close()
    assert steps(mirror) == [2]
    assert caplog.text.count("copied") == 1


def test_checkpoints_that_the_run_did_not_resume_from(mirror: Mirror, run: RunFolder) -> None:
    """Catches a damaged checkpoint that takes the place of good ones, and an abandoned one that a new host resumes
    from."""
    for step in (100, 200):
        save(run, step)
        mirror.upload(run.checkpoints / f"step-{step:08d}")
    uploads = MirrorUploads(mirror, run, lambda alert: None)
    uploads.update(Retention(keep_last=1), 100, is_new=False)
    wait_until(lambda: uploads._known is not None and not uploads._is_wanted and uploads.uploading is None)
    assert steps(mirror) == [100, 200]  # the disk alone may be damaged
    save(run, 150)
    uploads.update(Retention(keep_last=1), 150)
    uploads.close()
    assert steps(mirror) == [150]


def test_incomplete_checkpoints_are_deleted(mirror: Mirror, run: RunFolder, tmp_path: Path) -> None:
    """Catches a bucket that grows with every attempt that ends during an upload; and a run that deletes what is
    another run's."""
    write_provenance(run, {}, [])
    for step in (7, 8):
        write_bytes(f"{mirror.url}/step-{step:08d}/state.json", b"{}")
    save(run, 8)
    mirror.upload(save(run, 9))
    uploads = MirrorUploads(mirror, run, lambda alert: None)
    uploads.update(Retention(keep_last=2), 9, is_new=False)
    uploads.close()
    assert list_folders(mirror.url) == ["run", "step-00000008", "step-00000009"]
    assert steps(mirror) == [8, 9]
    write_bytes(f"{mirror.url}/step-00000007/state.json", b"{}")
    other = RunFolder(tmp_path / "other")
    write_provenance(other, {}, [])
    save(other, 9)
    uploads = MirrorUploads(mirror, other, lambda alert: None)
    uploads.update(Retention(keep_last=1), 9)
    uploads.close()
    assert "step-00000007" in list_folders(mirror.url)


def test_an_outage_leaves_no_incomplete_checkpoint(
    mirror: Mirror, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a bucket that grows with every outage of a run of weeks."""
    upload = mirror_module.upload

    def break_off(path: Path, url: str) -> None:
        upload(path, url)
        if "step-00000002" in url:
            raise StorageError("timed out")

    monkeypatch.setattr(mirror_module, "upload", break_off)
    uploads = MirrorUploads(mirror, run, lambda alert: None)
    save(run, 1)
    uploads.update(Retention(keep_last=1), 1)
    wait_until(lambda: steps(mirror) == [1] and uploads.uploading is None)
    half = save(run, 2)
    uploads.update(Retention(keep_last=1), 2)
    wait_until(lambda: uploads.problem)
    assert half.name in list_folders(mirror.url)
    shutil.rmtree(half)
    save(run, 3)
    uploads.update(Retention(keep_last=1), 3)
    uploads.close()
    assert list_folders(mirror.url) == ["step-00000003"]


@pytest.mark.parametrize("may_delete", [True, False])
def test_a_mirror_makes_room_before_it_copies(
    mirror: Mirror, run: RunFolder, monkeypatch: pytest.MonkeyPatch, may_delete: bool
) -> None:
    """Catches a full mirror that stays full when `keep_last` is lowered, one that has no checkpoint meanwhile, or loses
    the best one; and one that gets no checkpoints because its user may not delete any."""
    upload, delete, seen = mirror_module.upload, mirror_module.delete, list[int]()
    for step in (1, 2, 3, 4):
        mirror.upload(save(run, step))
        shutil.rmtree(run.checkpoints / f"step-{step:08d}")
    mirror.write_best("step-00000002")

    def record(path: Path, url: str) -> None:
        if "step-00000005" in url:
            seen[:] = seen or steps(mirror)
        upload(path, url)

    def refuse(url: str) -> None:
        if "step-00000005" not in url:
            raise DeniedError("access denied")
        delete(url)

    uploads = MirrorUploads(mirror, run, lambda alert: None)
    save(run, 5)
    monkeypatch.setattr(mirror_module, "upload", record)
    if not may_delete:
        monkeypatch.setattr(mirror_module, "delete", refuse)
    uploads.update(Retention(keep_last=1), 5)
    uploads.close()
    if may_delete:
        assert (seen, steps(mirror), uploads.problem) == ([2, 4], [2, 5], None)
    else:
        assert (steps(mirror), uploads.problem) == ([1, 2, 3, 4, 5], "access denied")


def test_the_newest_checkpoint_does_not_wait_for_older_ones(
    mirror: Mirror, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a long run whose new mirror gets all old checkpoints before the one that was just saved."""
    order, upload = list[int](), Mirror.upload

    def record(mirror: Mirror, checkpoint: Path, known: bytes | None) -> bytes:
        order.append(int(checkpoint.name[-8:]))
        if order == [3]:
            save(run, 4)
            uploads.update(Retention(keep_last=9), 4)
        return upload(mirror, checkpoint)

    monkeypatch.setattr(Mirror, "upload", record)
    for step in (1, 2, 3):
        save(run, step)
    uploads = MirrorUploads(mirror, run, lambda alert: None)
    uploads.update(Retention(keep_last=9), 3, is_new=False)
    uploads.close()
    assert order == [3, 4, 2, 1]


def test_a_mirror_does_not_grow_while_uploads_are_slower_than_saves(
    mirror: Mirror, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches retention that waits until training ends."""
    held, upload = list[int](), Mirror.upload

    def record(mirror: Mirror, checkpoint: Path, known: bytes | None) -> bytes:
        step = int(checkpoint.name[-8:]) + 1
        if step <= 6:
            save(run, step)
            uploads.update(Retention(keep_last=2), step)
        held.append(len(steps(mirror)))
        return upload(mirror, checkpoint)

    monkeypatch.setattr(Mirror, "upload", record)
    save(run, 1)
    uploads = MirrorUploads(mirror, run, lambda alert: None)
    uploads.update(Retention(keep_last=2), 1)
    uploads.close()
    assert held == [0, 1, 2, 2, 2, 2]


def test_an_upload_does_not_hold_up_training(mirror: Mirror, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an `update` that waits, and uploads that never catch up with saves."""
    go = threading.Event()
    original = Mirror.upload

    def slow(self: Mirror, checkpoint: Path, known: bytes | None) -> bytes:
        assert go.wait(60)
        return original(self, checkpoint, known)

    monkeypatch.setattr(Mirror, "upload", slow)
    uploads = MirrorUploads(mirror, run, lambda alert: None)
    save(run, 1)
    uploads.update(Retention(keep_last=1), 1)
    wait_until(lambda: uploads.uploading == 1)
    for step in (2, 3):
        save(run, step)
        shutil.rmtree(run.checkpoints / f"step-{step - 1:08d}")  # retention
        uploads.update(Retention(keep_last=1), step)
    go.set()
    uploads.close()
    assert steps(mirror) == [3]
    assert uploads.problem is None


def test_failures_alert_and_are_tried_again(
    bucket: str, run: RunFolder, faulty: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a mirror that stops forever after an outage, or fails in silence."""
    alerts: list[Alert] = []
    faulty.lasting = Fault(answer=response("403 Forbidden", "ExpiredToken", "The provided token has expired."))
    mirror = Mirror(f"{bucket}/run")
    uploads = MirrorUploads(mirror, run, alerts.append, retry_seconds=0.05)
    save(run, 1)
    uploads.update(Retention(keep_last=1), 1)
    wait_until(lambda: alerts)
    assert alerts[0].event == "mirror"
    assert "access denied" in alerts[0].text
    wait_until(lambda: len(alerts) > 1)
    faulty.lasting = None
    wait_until(lambda: uploads.problem is None)
    assert steps(mirror) == [1]
    uploads.close()


@pytest.mark.parametrize(
    ("error", "logged"), [(StorageError("timed out"), ["timed out"]), (DeniedError("denied"), ["denied", "denied"])]
)
def test_an_outage_does_not_fill_the_log(
    mirror: Mirror,
    run: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    logged: list[str],
) -> None:
    """Catches a warning each minute for days, and an attempt each minute; and a new outage that is not logged."""
    alerts, delays, problem = list[Alert](), list[float](), list[Exception]([error])

    def check(mirror: Mirror, folder: RunFolder) -> None:
        if problem:
            raise problem[0]

    def on_alert(alert: Alert) -> None:
        delays.append(uploads._delay)
        alerts.append(alert)

    monkeypatch.setattr(mirror_uploads, "_MOST_RETRY_SECONDS", 0.04)
    monkeypatch.setattr(Mirror, "check_owner", check)
    uploads = MirrorUploads(mirror, run, on_alert, retry_seconds=0.01)
    for step in (1, 2):
        save(run, step)
        uploads.update(Retention(keep_last=1), step)
        tries = len(alerts) + 4
        wait_until(lambda tries=tries: len(alerts) >= tries)
    assert delays[:4] == [0.01, 0.02, 0.04, 0.04]
    assert [message.partition("run: ")[2].partition(";")[0] for message in caplog.messages] == logged
    problem.clear()
    wait_until(lambda: uploads.problem is None)
    problem.append(error)
    uploads.begin()
    wait_until(lambda: len(caplog.messages) == len(logged) + 1)
    uploads.close(seconds=0)


def test_a_mirror_that_cannot_be_written_is_found_at_the_start(
    mirror: Mirror, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that trains for hours before it warns that its mirror may only be read; and one that ends without
    checkpoints, for which the mirror then refuses a new run or another parent."""
    alerts = list[Alert]()
    write_provenance(run, {}, [])
    run.config.touch()
    with monkeypatch.context() as patch:
        patch.setattr(mirror_module, "upload", failing(DeniedError("access denied")))
        made = make_checkpointer(run, mirror, patch, ResumePlan(), alerts.append)
        wait_until(lambda: alerts)
    assert "access denied" in alerts[0].text
    made._uploads.begin()
    wait_until(lambda: made._uploads.problem is None)
    assert list(list_files(mirror.url)) == [f"{mirror.url}/run/config.yaml"]
    save(run, 1)
    made._uploads.update(Retention(keep_last=1), 1)
    made._uploads.close()
    assert mirror.provenance() == read_provenance(run)


def test_a_copy_has_the_state_that_an_interrupted_attempt_has_replaced(
    mirror: Mirror, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a copy without state.json, from which no run can resume."""
    checkpoint = save(run, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_on_disk, "list_state", failing(OSError("the disk is full")))
        with pytest.raises(OSError, match="the disk is full"):
            replace_state(checkpoint, {"step": 1, "is": "new"})
    make_checkpointer(run, mirror, monkeypatch, ResumePlan(checkpoint, step=1))._uploads.close()
    mirror.upload(checkpoint)
    mirror.restore(RunFolder(tmp_path / "other"), lambda: None)
    assert read_state(tmp_path / "other" / "checkpoints" / checkpoint.name) == {"step": 1, "is": "new"}


def test_a_run_without_checkpoints_does_not_wait_for_its_mirror(
    mirror: Mirror, run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches minutes at the end of a run that has nothing to copy, because the storage is down."""
    alerts, made = list[Alert](), list[RunFolder]()

    def fail(mirror: Mirror, folder: RunFolder) -> None:
        made.append(folder)
        raise StorageError("timed out")

    monkeypatch.setattr(Mirror, "check_owner", fail)
    uploads = MirrorUploads(mirror, run, alerts.append, retry_seconds=3)
    uploads.begin()
    wait_until(lambda: alerts)
    uploads.close(seconds=20)
    uploads._thread.join(60)
    assert not uploads._thread.is_alive()
    assert len(made) == 1
    assert "lacks checkpoints" not in caplog.text


def test_nothing_is_copied_to_the_mirror_of_another_run(mirror: Mirror, run: RunFolder, tmp_path: Path) -> None:
    """Catches two runs that both found the mirror empty when they started, and mix their checkpoints in it."""
    alerts, other = list[Alert](), RunFolder(tmp_path / "other")
    for step, folder in enumerate((run, other), start=1):
        write_provenance(folder, {}, [])
        save(folder, step)
        uploads = MirrorUploads(mirror, folder, alerts.append)
        uploads.update(Retention(keep_last=1), step)
        uploads.close()
    assert "belongs to another run" in alerts[0].text
    assert steps(mirror) == [1]
    mirror.check_owner(run)


def test_checkpoints_of_another_folder_are_not_deleted(mirror: Mirror, run: RunFolder, tmp_path: Path) -> None:
    """Catches a host that returns while the storage is down, and then deletes what another one has trained since."""
    alerts, other = list[Alert](), RunFolder(tmp_path / "other")
    write_provenance(run, {"host": "a"}, [])
    other.path.mkdir()
    shutil.copy(run.provenance, other.provenance)
    write_provenance(other, {"host": "b"})
    mirror.upload_run_files(other)
    mirror.upload(save(other, 5))
    save(run, 1)
    write_provenance(run, {"host": "a"})
    uploads = MirrorUploads(mirror, run, alerts.append)
    uploads.update(Retention(keep_last=1), 1)
    uploads.close()
    assert "was continued in another folder" in alerts[0].text
    assert steps(mirror) == [5]
    assert mirror.provenance() == read_provenance(other)


def test_no_checkpoint_is_copied_that_the_mirror_need_not_keep(
    mirror: Mirror, run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches gigabytes that are copied, then deleted, by a folder that has got newer checkpoints from the mirror."""
    for step in (1, 7, 8, 9):
        save(run, step)
    for step in (7, 8, 9):
        mirror.upload(run.checkpoints / f"step-{step:08d}")
    for step in (7, 8):
        shutil.rmtree(run.checkpoints / f"step-{step:08d}")
    caplog.set_level(logging.INFO)
    uploads = MirrorUploads(mirror, run, lambda alert: None)
    uploads.update(Retention(keep_last=3), 9, is_new=False)
    uploads.close()
    assert steps(mirror) == [7, 8, 9]
    assert "copied" not in caplog.text


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (StorageError("timed out"), 3),
        (OSError("stale"), 3),
        (DeniedError("denied"), 1),
        (UserError("belongs to another run"), 1),
    ],
)
def test_the_last_upload_is_tried_again(
    mirror: Mirror, run: RunFolder, monkeypatch: pytest.MonkeyPatch, error: Exception, attempts: int
) -> None:
    """Catches a run that ends during an outage of the network and leaves its last checkpoint on a disk that will be
    lost; and a run that waits for what does not pass."""
    made = list[RunFolder]()

    def fail_twice(mirror: Mirror, folder: RunFolder) -> None:
        wait_until(lambda: uploads._is_closing)
        made.append(folder)
        if len(made) <= 2:
            raise error

    monkeypatch.setattr(Mirror, "check_owner", fail_twice)
    uploads = MirrorUploads(mirror, run, lambda alert: None, retry_seconds=0.01)
    save(run, 1)
    uploads.update(Retention(keep_last=1), 1)
    uploads.close()
    assert (len(made), steps(mirror)) == (attempts, [1] if attempts == 3 else [])


def test_no_attempt_is_announced_for_after_the_end(
    mirror: Mirror, run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that waits for the end of its time without another attempt, which its warning promised."""

    def fail(mirror: Mirror, folder: RunFolder) -> None:
        wait_until(lambda: uploads._is_closing)
        raise StorageError("timed out")

    monkeypatch.setattr(Mirror, "check_owner", fail)
    uploads = MirrorUploads(mirror, run, lambda alert: None, retry_seconds=3600)
    save(run, 1)
    uploads.update(Retention(keep_last=1), 1)
    start = time.monotonic()
    uploads.close(seconds=600)
    assert time.monotonic() - start < 100
    assert f"checkpoints cannot be copied to {mirror.url}: timed out" in caplog.messages


def test_the_wait_at_the_end_is_limited(
    mirror: Mirror, run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that never ends because its bucket does not answer."""
    caplog.set_level(logging.INFO)
    go = threading.Event()
    monkeypatch.setattr(Mirror, "complete", lambda self: go.wait(60) and {})
    uploads = MirrorUploads(mirror, run, lambda alert: None)
    save(run, 1)
    uploads.update(Retention(keep_last=1), 1)
    start = time.monotonic()
    uploads.close(seconds=0.2)
    assert time.monotonic() - start < 50
    assert f"waiting for the last upload to {mirror.url}, at most 0 s" in caplog.messages
    assert f"the mirror {mirror.url} lacks checkpoints: not done after 0 s; the next start copies them" in caplog.text
    go.set()


def test_no_checkpoint_is_copied_while_it_is_replaced() -> None:
    """Catches an upload of the newest checkpoint that begins before the evaluation of its step is added."""
    calls: list[str] = []
    checkpointer = SimpleNamespace(
        saves=SimpleNamespace(saved_step=5, delete_superseded=lambda keep: None),
        _retention=lambda progress: Retention(1),
        update=lambda progress: calls.append("update"),
        _upload=lambda progress: calls.append("upload"),
    )
    progress = TrainingProgress(step=5)
    Checkpointer.save_at_start(checkpointer, progress, finished=False, evaluated=True)  # type: ignore[arg-type]
    assert calls == ["update"], "which begins the upload when the checkpoint is replaced"
