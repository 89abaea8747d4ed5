import io
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from experiment import progress as module
from experiment.progress import print_warning, progress, quiet, terminal, track
from waiting import LIMIT

REPOSITORY = Path(__file__).parents[3]
Screen = tuple[Console, io.StringIO]


@pytest.fixture(params=[False, True], ids=["pipe", "terminal"])
def screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Screen:
    """What progress is shown on."""
    written = io.StringIO()
    console = module._console(file=written, width=80, force_terminal=request.param, force_interactive=request.param)
    monkeypatch.setattr(module, "terminal", lambda: console)
    return console, written


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches names of files, columns and labels that rich reads as styles or emoji."""
    terminal().print("[bold]:smile:[/bold]")
    assert capsys.readouterr().err == "[bold]:smile:[/bold]\n"


def test_warnings_of_data_are_printed_again(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a quiet block that changes what is printed after it in another one."""
    with quiet():
        with quiet(warnings=False):
            print_warning("hidden")
        print_warning("shown")
    assert capsys.readouterr().err == "shown\n"


def test_long_work_is_shown(screen: Screen) -> None:
    """Catches control characters in a log file, a pipe without a sign of life for hours, and an empty terminal."""
    console, written = screen
    seconds = iter([0.0, 0.5, 2.0, 11.0, 11.5, 11.8])
    with progress("reading [x]", 4_000, "files", clock=lambda: next(seconds)) as advance:
        for _ in range(4):
            advance(1_000)
    if console.is_interactive:
        assert "reading [x]" in written.getvalue()
        assert "2,000 of 4,000 files" in written.getvalue()
        assert written.getvalue().count("\x1b[?25l") <= written.getvalue().count("\x1b[?25h"), "the cursor is hidden"
    else:
        assert written.getvalue() == "reading [x]: 3,000 of 4,000 files\n"


def test_short_and_hidden_work_is_not_shown(screen: Screen) -> None:
    """Catches lines about work that takes a moment, and lines beside JSON."""
    _, written = screen
    assert list(track("abc", "reading", 3, "files")) == ["a", "b", "c"]
    seconds = iter([0.0, 100.0, 200.0])
    with progress("reading", 2, "files", shown=False, clock=lambda: next(seconds)) as advance:
        advance(1)
    assert written.getvalue() == ""


def test_a_bar_in_a_bar_is_left_out(screen: Screen) -> None:
    """Catches a traceback of rich, which shows one bar at a time."""
    console, _ = screen
    seconds = itertools.count(step=100.0)
    with Progress(console=console), progress("reading", 2, "files", clock=lambda: next(seconds)) as advance:
        advance(1)
        advance(1)


_PROGRESS = (
    "import sys\nfrom experiment.progress import terminal\nsys.stdin.readline()\n"
    "for _ in range(3):\n    terminal().print('step')\n    print('step', file=sys.stderr, flush=True)\n"
)
_QUIET_WARNING = (
    "import logging, sys\nfrom pathlib import Path\nfrom tempfile import TemporaryDirectory\n"
    "from experiment.progress import quiet\nfrom experiment.run_files.run_folder import RunFolder\n"
    "from experiment.tracking.rank_logs import set_up_logging\n"
    "with quiet(), TemporaryDirectory() as folder:\n"
    "    set_up_logging(RunFolder(Path(folder)), 0)\n    sys.stdin.readline()\n"
    "    logging.getLogger('pretrain').warning('careful')\n"
)


@pytest.mark.parametrize("code", [_PROGRESS, _QUIET_WARNING], ids=["progress", "a warning of a quiet run"])
def test_output_that_nobody_reads_ends_no_run(code: str) -> None:
    """Catches a run that fails because `tee` or `head`, which read its output, have ended."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stderr=pipe, cwd=REPOSITORY) as process:
        process.stderr.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.wait(LIMIT) == 0
