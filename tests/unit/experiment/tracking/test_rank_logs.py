import io
import logging
import sys
import time
import warnings
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from experiment.progress import quiet
from experiment.run_files.outcome_file import Outcome
from experiment.run_files.run_folder import RunFolder
from experiment.tracking import rank_logs
from experiment.tracking.progress_line import ConsoleTracker
from experiment.tracking.rank_logs import logging_set_up, set_up_logging
from small_disk import SmallDisk


def test_a_quiet_run_prints_warnings_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches progress of a rank that is to be quiet, a warning that is lost, and a log file without its lines."""
    with quiet():
        set_up_logging(RunFolder(tmp_path), 0)
        logging.getLogger("pretrain.training").info("saved")
        tracker = ConsoleTracker(10)
        tracker.log({"step": 1, "loss": 2.0})
        tracker.close(Outcome.DONE)
        logging.getLogger("pretrain.training").warning("careful")
    assert capsys.readouterr() == ("", "warning: careful\n")
    written = RunFolder(tmp_path).rank_log(0).read_text(encoding="utf-8")
    assert all(text in written for text in ("saved", "step 1/10 · loss 2.0000", "careful"))


def test_times_have_an_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches logs of hosts in different time zones whose lines cannot be put in order."""
    for zone in ("UTC-2", "UTC"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        set_up_logging(RunFolder(tmp_path), 0)
        logging.getLogger("pretrain.training").info("saved")
    monkeypatch.undo()
    time.tzset()
    lines = RunFolder(tmp_path).rank_log(0).read_text().splitlines()
    times = [datetime.fromisoformat(line.partition(" INFO ")[0]) for line in lines]
    assert [written.utcoffset() for written in times] == [timedelta(hours=2), timedelta()]
    assert times[1] - times[0] < timedelta(minutes=30)


def test_rank_0_prints_our_messages_and_all_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a terminal full of the libraries' messages, or without their warnings."""
    set_up_logging(RunFolder(tmp_path), 0)
    logging.getLogger("pretrain.training").info("saved [step] %d", 5)
    logging.getLogger("deepspeed").info("chatter")
    logging.getLogger("deepspeed").info("")
    logging.getLogger("datasets").warning("careful")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    captured = capsys.readouterr()
    assert captured.err == "saved [step] 5\nwarning: careful\n"
    assert captured.out == ""
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    for text in (
        "INFO pretrain.training: saved [step] 5",
        "INFO deepspeed: chatter",
        "careful",
        "DeprecationWarning: old",
    ):
        assert text in log
    assert log[:4].isdigit(), "a line begins with the date"
    assert "deepspeed: \n" not in log


def test_the_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches messages printed once per rank."""
    set_up_logging(RunFolder(tmp_path), 3)
    logging.getLogger("pretrain").error("lost")
    assert capsys.readouterr() == ("", "")
    assert "lost" in (tmp_path / "logs" / "rank-3.log").read_text()


def test_handlers_of_libraries_do_not_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches lines that DeepSpeed's and transformers' own handlers print over the progress bar."""
    library = logging.getLogger("some_library")
    library.propagate = False
    library.setLevel(logging.INFO)
    library.addHandler(logging.StreamHandler(sys.stdout))
    kept = logging.FileHandler(tmp_path / "own.log")
    library.addHandler(kept)
    set_up_logging(RunFolder(tmp_path), 0)
    library.info("chatter")
    kept.close()
    library.handlers.clear()
    assert capsys.readouterr() == ("", "")
    assert "chatter" in (tmp_path / "logs" / "rank-0.log").read_text()
    assert (tmp_path / "own.log").read_text() == "chatter\n"


def test_handlers_of_a_script_are_back_after_the_call(tmp_path: Path) -> None:
    """Catches messages of a script that are gone after it has called `deepcloze.finetune`."""
    written = io.StringIO()
    own = logging.getLogger("script")
    own.propagate = False
    own.addHandler(logging.StreamHandler(written))
    with logging_set_up(RunFolder(tmp_path)):
        own.warning("during")
    own.warning("after")
    own.handlers.clear()
    assert written.getvalue() == "after\n"
    assert not own.propagate
    assert "during" in RunFolder(tmp_path).rank_log(0).read_text(encoding="utf-8")


@pytest.mark.parametrize("captured", [False, True])
def test_handlers_of_a_script_show_no_more_than_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], captured: bool
) -> None:
    """Catches messages that a script with `logging.basicConfig()` shows twice, messages of libraries that it does not
    show otherwise, and Python's warnings that it no longer logs after the call."""
    root, written = logging.getLogger(), io.StringIO()
    root.setLevel(logging.WARNING)
    handlers = [logging.StreamHandler(written), logging.FileHandler(tmp_path / "own.log")]
    for handler in handlers:
        root.addHandler(handler)
    logging.captureWarnings(captured)
    show_warning = warnings.showwarning
    with logging_set_up(RunFolder(tmp_path)):
        for name in ("finetune", "library", "experiment.progress"):
            logging.getLogger(name).info("information of %s", name)
        for name in ("finetune", "library"):
            logging.getLogger(name).warning("warning of %s", name)
    handlers[1].close()
    printed = ["information of finetune", "warning: warning of finetune", "warning: warning of library"]
    assert capsys.readouterr().err.splitlines() == printed
    assert written.getvalue() == ""
    assert (tmp_path / "own.log").read_text() == "warning of finetune\nwarning of library\n"
    logging.getLogger("finetune").warning("after")
    assert written.getvalue() == "after\n"
    assert [(handler.level, handler.filters) for handler in handlers] == [(0, []), (0, [])]
    assert warnings.showwarning == show_warning


def test_setting_up_twice_logs_once_and_a_second_attempt_appends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches duplicate lines, and a resume that deletes the log of the failure."""
    set_up_logging(RunFolder(tmp_path), 0)
    logging.getLogger("pretrain").info("first")
    set_up_logging(RunFolder(tmp_path), 0)
    logging.getLogger("pretrain").info("second")
    assert capsys.readouterr().err == "first\nsecond\n"
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert (log.count("first"), log.count("second")) == (1, 1)


def test_an_exception_is_logged_with_its_trace(tmp_path: Path) -> None:
    """Catches a log without the stack trace of a failure."""
    set_up_logging(RunFolder(tmp_path), 1)
    try:
        raise KeyError("x")
    except KeyError:
        logging.getLogger("pretrain").exception("failed")
    assert "Traceback" in (tmp_path / "logs" / "rank-1.log").read_text()


def test_a_colored_warning_does_not_color_the_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a style that is also applied to the progress bar."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, force_interactive=True, color_system="standard", width=99)
    monkeypatch.setattr(rank_logs, "warning_console", lambda: console)
    set_up_logging(RunFolder(tmp_path), 0)
    tracker = ConsoleTracker(10, console=console)
    tracker.log({"step": 1, "loss": 1.0})
    before = output.tell()
    logging.getLogger("pretrain").warning("careful")
    after = output.getvalue()[before:]
    tracker.close(Outcome.DONE)
    assert "\x1b[33mwarning: careful\x1b[0m" in after
    assert "loss 1.0000" in after
    assert after.count("\x1b[33m") == 1


def test_a_full_disk_drops_messages_quietly(
    small_disk: SmallDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback on the terminal for every message, a log that stays silent once there is room, and an error
    when the log is closed."""
    set_up_logging(RunFolder(small_disk.path), 0)
    small_disk.fill()
    for number in range(3):
        logging.getLogger("pretrain").info("lost %d", number)
    assert capsys.readouterr().err == "lost 0\nlost 1\nlost 2\n"
    small_disk.free()
    logging.getLogger("pretrain").info("kept")
    assert "kept" in (small_disk.path / "logs" / "rank-0.log").read_text()
    small_disk.fill()
    logging.getLogger("pretrain").info("lost")
    set_up_logging(RunFolder(tmp_path), 0)
