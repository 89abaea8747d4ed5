import shutil
import sys
from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.outcome_file import Outcome
from experiment.run_folder import RunFolder
from experiment.tracking import TrackedRun, check_tracking, event_file, open_trackers
from experiment.tracking.config import TrackingConfig
from experiment.tracking.event_file import TensorBoardTracker


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard shows: steps and values. Its slow loader is asked to drop nothing by itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def attempt(folder: Path, resumed_step: int, events: list[dict[str, float]], again: bool = False) -> TensorBoardTracker:
    """Log events and leave the file open, as a killed process does."""
    tracker = TensorBoardTracker(folder, resumed_step, again)
    for event in events:
        tracker.log(event)  # type: ignore[arg-type]
    return tracker


def test_numbers_are_shown_by_step_and_at_once(tmp_path: Path) -> None:
    """Catches another x axis than ours, unknown values that become 0, and events that a kill would lose."""
    attempt(tmp_path, -1, [{"step": 5, "loss": 2.5, "tokens": 7, "mfu": None, "name": "text"}])  # type: ignore[dict-item]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert accumulator.Tags()["scalars"] == ["loss", "tokens"]
    assert scalars(tmp_path, "loss") == [(5, 2.5)]
    assert scalars(tmp_path, "tokens") == [(5, 7.0)]


def test_lost_steps_are_removed(tmp_path: Path) -> None:
    """Catches steps that appear twice after a crash, or stay although the resumed run has other ones, in readers that
    ignore `purge_step`; and kept steps that are lost."""
    attempt(tmp_path, -1, [{"step": step, "loss": step} for step in range(10, 60, 10)])
    attempt(tmp_path, 20, [{"step": step, "loss": -step} for step in (25, 50)])
    attempt(tmp_path, 25, [{"step": 30, "loss": 3}])
    assert scalars(tmp_path, "loss") == [(10, 10), (20, 20), (25, -25), (30, 3)]
    assert len(list(tmp_path.iterdir())) == 1


def test_the_evaluation_of_the_resumed_step_is_not_doubled(tmp_path: Path) -> None:
    """Catches an evaluation that is repeated because the checkpoint lacks it, and shown twice."""
    attempt(tmp_path, -1, [{"step": 10, "loss": 1}, {"step": 10, "eval/docs/loss": 2}])
    attempt(tmp_path, 10, [{"step": 10, "eval/docs/loss": 3}], again=True)
    assert scalars(tmp_path, "loss") == [(10, 1)]
    assert scalars(tmp_path, "eval/docs/loss") == [(10, 3)]


def test_kept_steps_keep_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a resume after which all earlier steps have the time of the resume."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patch:
        patch.setattr(event_file.time, "time", lambda: 1000.0)
        attempt(tmp_path, -1, [{"step": 1, "loss": 1}])
    attempt(tmp_path, 1, [])
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert [event.wall_time for event in accumulator.Scalars("loss")] == [1000.0]


def test_files_of_a_killed_start(tmp_path: Path) -> None:
    """Catches steps that appear twice if an attempt is killed before it has removed the file that it has copied, and an
    incomplete record that hides what follows."""
    first, other = tmp_path / "run", tmp_path / "copy"
    attempt(first, -1, [{"step": step, "loss": step} for step in (1, 2, 3)])
    shutil.copytree(first, other)
    attempt(first, 2, [{"step": 3, "loss": 30}])
    (old,) = other.iterdir()
    shutil.copy(old, first / old.name)
    (new,) = [path for path in first.iterdir() if path.name != old.name]
    with new.open("ab") as file:
        file.write(b"\x20\0\0\0\0\0\0\0torn")
    attempt(first, 3, [{"step": 4, "loss": 4}])
    assert scalars(first, "loss") == [(1, 1), (2, 2), (3, 30), (4, 4)]


def test_a_later_file_is_read_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches names in the wrong order if rank 0 resumes on a host whose clock is behind."""
    attempt(tmp_path, -1, [{"step": 1, "loss": 1}])
    (before,) = tmp_path.iterdir()
    monkeypatch.setattr(event_file.time, "time_ns", lambda: 5)
    attempt(tmp_path, 1, [])
    (after,) = tmp_path.iterdir()
    assert after.name > before.name


def test_it_is_written_into_the_run_folder_if_enabled(tmp_path: Path) -> None:
    """Catches a key without effect, and one that is on by default."""
    run = TrackedRun("id", {}, total_steps=1, resumed_step=-1)
    for enabled in (False, True):
        folder = RunFolder(tmp_path)
        trackers = open_trackers(TrackingConfig(tensorboard=enabled), folder, run, console=False)
        trackers.log({"step": 1, "loss": 2.0})
        trackers.close(Outcome.DONE)
        assert folder.tensorboard.exists() == enabled
    assert scalars(tmp_path / "tensorboard", "loss") == [(1, 2.0)]


def test_a_missing_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that trains for days without the event files that it was asked for."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr(event_file, "find_spec", lambda name: None)
    check_tracking(TrackingConfig())
    with pytest.raises(UserError, match=r"pip install 'deepcloze\[tensorboard\]'"):
        check_tracking(TrackingConfig(tensorboard=True))
