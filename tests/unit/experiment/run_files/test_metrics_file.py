import errno
import json
from pathlib import Path

import pytest

from experiment.run_files.metrics_file import AppendFile, JsonlTracker, read_events, read_last_events
from experiment.run_files.outcome_file import Outcome


def steps(path: Path) -> list[int]:
    return [event["step"] for event in read_events(path)]


def written(path: Path, *values: int) -> None:
    tracker = JsonlTracker(path, -1)
    for step in values:
        tracker.log({"step": step, "loss": step / 2})
    tracker.close(Outcome.DONE)


def test_an_event_is_in_the_file_when_log_returns(tmp_path: Path) -> None:
    """Catches buffering, with which the last events of a killed run are lost."""
    tracker = JsonlTracker(tmp_path / "m.jsonl", -1)
    tracker.log({"step": 1, "loss": 2.5, "mfu": None, "note": "é"})
    assert (tmp_path / "m.jsonl").read_text(encoding="utf-8") == '{"step": 1, "loss": 2.5, "mfu": null, "note": "é"}\n'


def test_events_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    """Catches steps that appear twice after a resume, or events before the checkpoint that are lost."""
    path = tmp_path / "m.jsonl"
    written(path, 0, 10, 20, 20, 30, 40)
    tracker = JsonlTracker(path, 20)
    assert steps(path) == [0, 10, 20, 20]
    tracker.log({"step": 30})
    assert steps(path) == [0, 10, 20, 20, 30]


def test_an_evaluation_that_is_repeated_is_dropped(tmp_path: Path) -> None:
    """Catches an evaluation that is in the file twice, and another event of its step, or of an earlier one, that is
    lost with it."""
    path = tmp_path / "m.jsonl"
    written(path, 10, 20)
    for step in (10, 20, 30):
        JsonlTracker(path, 30).log({"step": step, "eval/a/loss": None})
    JsonlTracker(path, 20, evaluates_again=True)
    assert [(event["step"], "loss" in event) for event in read_events(path)] == [(10, True), (20, True), (10, False)]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    """Catches events of an attempt that died before its first checkpoint, kept next to the new ones."""
    path = tmp_path / "m.jsonl"
    written(path, 0, 10)
    JsonlTracker(path, -1)
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "torn", [b'{"step": 20, "lo', b'{"step": 20, "name": "\xc3', b'{"loss": 1}\n', b"[1]\n", b"\n"]
)
def test_a_line_that_is_not_an_event_is_dropped(tmp_path: Path, torn: bytes) -> None:
    """Catches an incomplete last line that corrupts the first line after a resume."""
    path = tmp_path / "m.jsonl"
    written(path, 10)
    path.write_bytes(path.read_bytes() + torn)
    assert steps(path) == [10]
    JsonlTracker(path, 20).log({"step": 30})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 30]


def test_text_may_hold_any_line_separator(tmp_path: Path) -> None:
    """Catches reading by str.splitlines, which splits a JSON line at U+2028 in a corpus name."""
    path = tmp_path / "m.jsonl"
    JsonlTracker(path, -1).log({"step": 1, "eval/a\u2028b/loss": 1.0})
    assert read_events(path) == [{"step": 1, "eval/a\u2028b/loss": 1.0}]


def test_nan_and_infinity_become_null(tmp_path: Path) -> None:
    """Catches NaN in the file, which strict JSON parsers reject."""
    path = tmp_path / "m.jsonl"
    JsonlTracker(path, -1).log({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    assert path.read_text() == '{"step": 1, "loss": null, "grad_norm": null}\n'


def test_no_file_means_no_events(tmp_path: Path) -> None:
    """Catches a stack trace for a run that has not logged yet."""
    assert read_events(tmp_path / "m.jsonl") == []


def test_the_last_events_of_a_long_run(tmp_path: Path) -> None:
    """Catches a status that reads the events of weeks, or takes a part of a line for an event."""
    path = tmp_path / "m.jsonl"
    assert read_last_events(path) == []
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(30_000)) + '{"step": 1')
    last = read_last_events(path)
    assert 1000 < len(last) < 20_000
    assert last == read_events(path)[-len(last) :]


@pytest.mark.parametrize("failures", [1, 2, 5])
@pytest.mark.parametrize("truncating", ["works", "fails too"])
@pytest.mark.parametrize("written", [0, 4, None])
def test_a_full_disk_leaves_no_half_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int, truncating: str, written: int | None
) -> None:
    """Catches a partial record to which the next one is appended once there is space again, a position that is wrong
    after several failed writes, a record that `append` has accepted and a later failure removes, and the remains of
    the last record in a closed file.

    written: bytes of the record that reach the file before the write fails; None: all, then the write raises.
    """
    path = tmp_path / "m.jsonl"
    appended = AppendFile(path)
    file = appended._file

    class FullDisk:
        def write(self, record: bytes) -> int:
            if written is None:
                file.write(record)
                raise OSError(errno.EIO, "No space left, or another error")
            return file.write(record[:written])

        def truncate(self, size: int) -> int:
            if truncating == "works":
                return file.truncate(size)
            raise OSError(errno.EIO, "No space left, or another error")

    expected = []
    for _ in range(3):
        monkeypatch.setattr(appended, "_file", FullDisk())
        for failure in range(failures):
            with pytest.raises(OSError, match="No space left"):
                appended.append(b"failed" + failure * b"x" + b"\n")
        monkeypatch.setattr(appended, "_file", file)
        appended.append(b"written\n")
        expected.append(b"written")
        assert path.read_bytes().splitlines() == expected
    monkeypatch.setattr(appended, "_file", FullDisk())
    with pytest.raises(OSError, match="No space left"):
        appended.append(b"failed\n")
    monkeypatch.setattr(appended, "_file", file)
    appended.close()
    assert path.read_bytes().splitlines() == expected
