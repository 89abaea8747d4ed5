from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.engine.phases import PREFIX
from pretrain.training.profiler import PROFILED, SKIPPED, StepProfiler, _cpu_communication


def event(name: str, start: float, end: float) -> Any:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))


def test_time_in_which_several_collectives_are_in_flight_counts_once() -> None:
    """Catches a share of communication that adds up sends and receives, or counts the agreement on the next batch,
    which is in flight while the step is computed."""
    phases = [event(PREFIX + "forward", 2, 50), event(PREFIX + "reduce gradients", 50, 80)]
    waiting = event(PREFIX + "wait for ranks", 90, 95)
    agreement = event("gloo:all_reduce", 1, 94)
    sent = [event("gloo:recv", 60, 70), event("gloo:send", 55, 65), event("gloo:send", 72, 75)]
    computed = event("aten::mm", 50, 80)
    assert _cpu_communication([*phases, waiting, agreement, *sent, computed], [*phases, waiting]) == 15 + 3 + 5


def profile_steps(folder: Path, steps: int) -> None:
    profiler = StepProfiler(folder)
    for _ in range(steps):
        torch.ones(2).sum()
        profiler.step()
    profiler.close()


@pytest.mark.parametrize("link", ["", "trace.json", "profile.json", "profile.txt"])
def test_a_profile_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, link: str
) -> None:
    """Catches a run that ends on rank 0 alone because the disk of its profile is full, or its folder not writable."""
    folder = tmp_path / "profile"
    if link:
        folder.mkdir()
        (folder / link).symlink_to("/dev/full")
    else:
        folder.touch()
    profile_steps(folder, SKIPPED + PROFILED + 1)
    assert link == "trace.json" or f"no profile was written to {folder}" in caplog.text
    assert not torch.autograd._profiler_enabled()


@pytest.mark.parametrize("steps", [0, SKIPPED - 1, SKIPPED, SKIPPED + 1, SKIPPED + PROFILED, SKIPPED + PROFILED + 1])
def test_nothing_is_recorded_after_the_end(tmp_path: Path, steps: int) -> None:
    """Catches a run that ends within the profiled steps: its process would record, and fill its memory, until its end,
    or write a profile of fewer steps."""
    profile_steps(tmp_path / "profile", steps)
    assert not torch.autograd._profiler_enabled()
    assert (tmp_path / "profile").exists() == (steps >= SKIPPED + PROFILED)
