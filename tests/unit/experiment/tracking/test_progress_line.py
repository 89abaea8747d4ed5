import io
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from experiment.formatting import counted, describe_duration, format_epochs, format_perplexity
from experiment.run_files.outcome_file import Outcome
from experiment.tracking.progress_line import (
    RATE_EVENTS,
    ConsoleTracker,
    TimedStep,
    describe_evaluation,
    describe_training,
    estimate_left,
)

TRAINING: dict[str, Any] = {"loss": 6.12341, "lr": 5e-4, "tokens_per_second": 12345.6, "memory": 1 << 30, "mfu": None}
EVALUATION = {
    "eval/wiki/loss": 3.21,
    "eval/wiki/perplexity": 24.78,
    "eval/wiki/accuracy": 0.41234,
    "eval/a/b/loss": None,
}


def plain(
    total: int | None, seconds: list[float], rate_events: int | None = RATE_EVENTS, paused: Sequence[float] = ()
) -> tuple[ConsoleTracker, io.StringIO]:
    """A tracker without a terminal whose clock returns `seconds` in turn, and its output. paused: the same of the
    seconds in evaluations."""
    output = io.StringIO()
    clock, pauses = iter(seconds), iter(paused)
    console = Console(file=output, width=40, soft_wrap=True)
    tracker = ConsoleTracker(
        total, rate_events=rate_events, paused=lambda: next(pauses, 0.0), console=console, clock=lambda: next(clock)
    )
    return tracker, output


def on_terminal(total: int | None, width: int = 120) -> tuple[ConsoleTracker, io.StringIO]:
    output = io.StringIO()
    console = Console(
        file=output, width=width, soft_wrap=True, force_terminal=True, force_interactive=True, color_system=None
    )
    return ConsoleTracker(total, resumed_step=10, console=console), output


def test_without_a_terminal_each_event_is_one_line() -> None:
    """Catches control characters, wrapped lines and missing values in log files."""
    tracker, output = plain(100, [0.0, 20.0, 30.0])
    for step in (10, 20, 30):
        tracker.log({"step": step, **TRAINING})
    tracker.log({"step": 30, **EVALUATION})
    tracker.close(Outcome.DONE)
    figures = "loss 6.1234 · lr 5.00e-04 · 12,346 tokens/s"
    assert output.getvalue().splitlines() == [
        f"step 10/100 · {figures}",
        f"step 20/100 · {figures} · 2m40s left",
        f"step 30/100 · {figures} · 1m45s left",
        "step 30: wiki loss 3.21, perplexity 24.78, accuracy 0.4123 · a/b loss –",
    ]


def test_the_time_left_follows_the_recent_pace() -> None:
    """Catches an estimate that stays wrong for hours after a slow start."""
    tracker, output = plain(1000, [0.0, *(1000.0 + step for step in range(1, 101))])
    for step in range(101):
        tracker.log({"step": step, "loss": 1.0})
    assert output.getvalue().splitlines()[-1].endswith("15m00s left")


def test_the_time_left_counts_evaluations_as_often_as_they_are() -> None:
    """Catches an estimate that doubles after an evaluation, and forgets evaluations between two; one that takes the
    evaluation before the first step for one of many; and one from the speed before and after a rewind."""
    points, now, paused, left = [TimedStep(0.0, 0, 0.0), TimedStep(900.0, 0, 900.0)], 900.0, 900.0, {}
    for step in range(10, 3001, 10):
        now += 10.0
        if step > 10 and step % 500 == 10:
            now, paused = now + 300.0, paused + 300.0
        points.append(TimedStep(now, step, paused))
        left[step] = estimate_left(points, 3000)
    assert left[500] == 2500.0, "no evaluation is known"
    evaluations = {step: 300.0 * ((3000 - step) // 500) for step in range(1000, 2500, 10)}
    assert all(left[step] == pytest.approx(3000 - step + evaluations[step], rel=0.25) for step in evaluations)
    assert left[3000] == 0.0
    points += [TimedStep(now + 10.0, 2500, paused), TimedStep(now + 20.0, 2510, paused)]
    assert estimate_left(points, 3000) is None
    assert estimate_left(points[:2], 3000) is None


def test_the_console_knows_of_evaluations() -> None:
    """Catches the time left at the speed of the last events, which have an evaluation or have none."""
    tracker, output = plain(1000, [0.0, *(400.0 + step for step in range(2, 101))], paused=[0.0, *[300.0] * 99])
    for step in range(1, 101):
        tracker.log({"step": step, "loss": 1.0})
    assert output.getvalue().splitlines()[-1].endswith(" · 1h00m left")  # 900 steps of a second, 9 pauses of 303 s


def test_the_time_left_does_not_jump_between_seeds() -> None:
    """Catches an estimate from the last events only: 30 s of predicting and loading lie between two seeds."""
    steps = range(1, 301)
    tracker, output = plain(300, [step + 30.0 * ((step - 1) // 100) for step in steps], rate_events=None)
    for step in steps:
        tracker.log({"step": step, "loss": 1.0})
    before, after = (output.getvalue().splitlines()[step - 1].split(" · ")[-1] for step in (200, 201))
    assert (before, after) == ("1m55s left", "2m09s left")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3.9712, "3.971"),
        (66.6, "66.60"),
        (999.94, "999.9"),
        (999.96, "1,000"),
        (8448.3, "8,448"),
        (30522.0, "30,522"),
        (1e304, "1.000e+304"),
        (math.nan, "nan"),
        (None, "–"),
    ],
)
def test_the_format_of_a_perplexity(value: float | None, expected: str) -> None:
    """Catches exponents at the start of a run, and too few digits at its end."""
    assert format_perplexity(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.02134, "0.0213 epochs"),
        (1.0, "1 epoch"),
        (1.5, "1.5 epochs"),
        (999.6, "1,000 epochs"),
        (8832.4, "8,832 epochs"),
    ],
)
def test_the_format_of_epochs(value: float, expected: str) -> None:
    """Catches an exponent for many epochs of a small corpus, and "1 epochs"."""
    assert format_epochs(value) == expected


def test_no_time_left_without_a_known_end() -> None:
    """Catches a time left where the end is unknown."""
    tracker, output = plain(None, [0.0, 1.0])
    tracker.log({"step": 1, "loss": 1.0})
    assert output.getvalue() == "step 1 · loss 1.0000\n"


def test_the_time_left_of_a_budget() -> None:
    """Catches a time budget that is known and not shown, and a negative rest while the last step ends."""
    output, clock = io.StringIO(), iter([10.0, 40.0, 140.0])
    tracker = ConsoleTracker(
        None, seconds_left=120.0, console=Console(file=output, soft_wrap=True), clock=lambda: next(clock)
    )
    for step in (1, 2):
        tracker.log({"step": step, "loss": 1.0})
    assert output.getvalue() == "step 1 · loss 1.0000 · 1m30s left\nstep 2 · loss 1.0000 · 0s left\n"


def test_on_a_terminal_the_progress_bar_stays_below_the_other_lines() -> None:
    """Catches evaluations that the progress bar overwrites, and counts that start at 0 after a resume."""
    tracker, output = on_terminal(100)
    tracker.log({"step": 50, **TRAINING})
    tracker.log({"step": 50, **EVALUATION})
    tracker.close(Outcome.DONE)
    text = output.getvalue()
    assert "10/100" in text
    assert "step 50: wiki loss 3.21" in text
    assert text.rindex("loss 6.1234") > text.rindex("50/100") > text.rindex("step 50: wiki")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_a_narrow_terminal_shows_everything() -> None:
    """Catches a bar, a step or a time left that a long line of values pushes off the screen."""
    tracker, output = on_terminal(1_000_000, width=60)
    slow = {"slowest_rank": 3, "slowest_rank_ratio": 2.0}
    tracker.log({"step": 50, **TRAINING, **slow})
    tracker.close(Outcome.DONE)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[?\d;]*\w", "", output.getvalue()))
    assert max(map(len, lines)) <= 60
    assert any(re.fullmatch(r"step .{24} +50/1000000", line.rstrip()) for line in lines)
    assert describe_training({**TRAINING, **slow}) in " ".join(" ".join(lines).split())


def test_a_killed_run_leaves_the_cursor_visible() -> None:
    """Catches a terminal without a cursor after SIGKILL, when no handler can restore it."""
    tracker, output = on_terminal(None)
    tracker.log({"step": 1, "loss": 1.0})
    assert output.getvalue().rindex("\x1b[?25h") > output.getvalue().rindex("\x1b[?25l")
    tracker.close(Outcome.FAILED)


def test_names_are_not_read_as_markup() -> None:
    """Catches corpus names read as markup."""
    tracker, output = plain(None, [])
    tracker.log({"step": 1, "eval/[red]x:smile:/loss": 1.0})
    assert output.getvalue() == "step 1: [red]x:smile: loss 1\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0.4, "0s"), (59.6, "1m00s"), (130, "2m10s"), (3599.9, "1h00m"), (90000, "25h00m"), (-1, "0s")],
)
def test_durations_read_well(seconds: float | None, text: str) -> None:
    """Catches "60s" and minutes without a leading zero."""
    assert describe_duration(seconds) == text


def test_unknown_values_are_left_out() -> None:
    """Catches 'None tokens/s'."""
    assert describe_training({"step": 1, "loss": 1.0, "lr": None}) == "loss 1.0000"
    assert describe_training({"step": 1, "loss": float("nan")}) == "loss nan"
    assert describe_evaluation({"step": 1, "loss": 1.0}) == ""


def test_one_is_singular() -> None:
    """Catches "1 shards", and "0 shard"."""
    assert [counted(number, "shard") for number in (0, 1, 2000)] == ["0 shards", "1 shard", "2,000 shards"]
    assert counted(2, "microbatch", "es") == "2 microbatches"
