import shutil
from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.run_files.outcome_file import Outcome
from experiment.run_files.run_folder import RunFolder
from experiment.tracking import event_file, tracker
from experiment.tracking.config import TrackingConfig
from experiment.tracking.event_file import SeedsTensorBoardTracker, TensorBoardTracker, tag_of
from experiment.tracking.tracker import TrackedRun, check_tracking, open_trackers


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
    assert accumulator.Tags()["scalars"] == ["train/loss", "train/tokens"]
    assert scalars(tmp_path, "train/loss") == [(5, 2.5)]
    assert scalars(tmp_path, "train/tokens") == [(5, 7.0)]


def test_lost_steps_are_removed(tmp_path: Path) -> None:
    """Catches steps that appear twice after a crash, or stay although the resumed run has other ones, in readers that
    ignore `purge_step`; and kept steps that are lost."""
    attempt(tmp_path, -1, [{"step": step, "loss": step} for step in range(10, 60, 10)])
    attempt(tmp_path, 20, [{"step": step, "loss": -step} for step in (25, 50)])
    attempt(tmp_path, 25, [{"step": 30, "loss": 3}])
    assert scalars(tmp_path, "train/loss") == [(10, 10), (20, 20), (25, -25), (30, 3)]
    assert len(list(tmp_path.iterdir())) == 1


def test_the_evaluation_of_the_resumed_step_is_not_doubled(tmp_path: Path) -> None:
    """Catches an evaluation that is repeated because the checkpoint lacks it, and shown twice."""
    attempt(tmp_path, -1, [{"step": 10, "loss": 1}, {"step": 10, "eval/docs/loss": 2}])
    attempt(tmp_path, 10, [{"step": 10, "eval/docs/loss": 3}], again=True)
    assert scalars(tmp_path, "train/loss") == [(10, 1)]
    assert scalars(tmp_path, "eval/docs/loss") == [(10, 3)]


def test_kept_steps_of_version_0_2_0_have_the_tags_of_today(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a resume after an upgrade that shows each curve as two, `loss` and `train/loss`, or at new times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patch:
        patch.setattr(event_file, "tag_of", lambda name: name)
        patch.setattr(event_file.time, "time", lambda: 1000.0)
        attempt(tmp_path, -1, [{"step": 1, "loss": 2, "mfu": 0.5}, {"step": 1, "eval/docs/loss": 4}])
    attempt(tmp_path, 1, [{"step": 2, "loss": 1, "mfu": 0.25}])
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert sorted(accumulator.Tags()["scalars"]) == ["eval/docs/loss", "speed/mfu", "train/loss"]
    assert scalars(tmp_path, "train/loss") == [(1, 2), (2, 1)]
    assert scalars(tmp_path, "speed/mfu") == [(1, 0.5), (2, 0.25)]
    assert accumulator.Scalars("train/loss")[0].wall_time == 1000.0


def test_kept_steps_keep_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a resume after which all earlier steps have the time of the resume."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patch:
        patch.setattr(event_file.time, "time", lambda: 1000.0)
        attempt(tmp_path, -1, [{"step": 1, "loss": 1}])
    attempt(tmp_path, 1, [])
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert [event.wall_time for event in accumulator.Scalars("train/loss")] == [1000.0]


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
    assert scalars(first, "train/loss") == [(1, 1), (2, 2), (3, 30), (4, 4)]


def test_tags_are_in_groups() -> None:
    """Catches a chart of its own for each of 20 metrics in one list, and names of corpora that lose their group."""
    names = ("loss", "lr", "skipped_steps", "tokens_per_second", "memory", "tokens/books", "eval/a/b/loss")
    tags = ["train/loss", "train/lr", "train/skipped_steps", "speed/tokens_per_second", "speed/memory"]
    assert [tag_of(name) for name in names] == [*tags, "tokens/books", "eval/a/b/loss"]


def test_seeds_have_files_and_steps_of_their_own(tmp_path: Path) -> None:
    """Catches seeds in one curve, steps that continue from the seed before, steps that appear twice after a resume,
    and finished seeds that are lost or written again."""
    first = SeedsTensorBoardTracker(tmp_path, 0, seed_steps=20)
    for seed, step in ((7, 10), (7, 20), (8, 30), (8, 40), (9, 50)):
        first.log({"step": step, "seed": seed, "loss": float(step)})
    first.log({"step": 30, "seed": 8, "eval/validation/loss": 1.0})
    (finished,) = (tmp_path / "seed-7").iterdir()
    before = finished.read_bytes()
    second = SeedsTensorBoardTracker(tmp_path, 30, True, seed_steps=20)  # seed 8 evaluates its step 10 again
    second.log({"step": 30, "seed": 8, "eval/validation/loss": 2.0})
    for seed, step in ((8, 40), (9, 45), (9, 60)):
        second.log({"step": step, "seed": seed, "loss": -float(step)})
    second.close(Outcome.DONE)
    assert finished.read_bytes() == before
    found = {path.name: scalars(path, "train/loss") for path in sorted(tmp_path.iterdir())}
    assert found == {"seed-7": [(10, 10), (20, 20)], "seed-8": [(10, 30), (20, -40)], "seed-9": [(5, -45), (20, -60)]}
    assert scalars(tmp_path / "seed-8", "eval/validation/loss") == [(10, 2)]


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
    assert scalars(tmp_path / "tensorboard", "train/loss") == [(1, 2.0)]


@pytest.mark.parametrize(
    ("asked", "install"),
    [
        (TrackingConfig(tensorboard=True), r"pip install 'deepcloze\[tensorboard\]'"),
        (TrackingConfig(wandb="offline"), "pip install wandb"),
    ],
)
def test_a_missing_package_is_refused(monkeypatch: pytest.MonkeyPatch, asked: TrackingConfig, install: str) -> None:
    """Catches a run that trains for days without the metrics that it was asked for, and one that needs a package for
    what it was not asked for."""
    monkeypatch.setattr(tracker, "find_spec", lambda name: None)
    check_tracking(TrackingConfig())
    with pytest.raises(UserError, match=install):
        check_tracking(asked)
