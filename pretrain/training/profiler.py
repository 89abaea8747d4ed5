"""Profile a few steps of a run: `deepcloze pretrain --profile`. docs/performance.md explains how to read the result."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from pretrain.engine.phases import PREFIX

log = logging.getLogger(__name__)

SKIPPED, PROFILED = 4, 3  # steps; the first ones allocate memory and may compile
_OPERATIONS = 10
_COLLECTIVES = ("gloo:", "nccl:", "c10d::", "ncclDevKernel")


class StepProfiler:
    """Profiles steps `SKIPPED` + 1 to `SKIPPED` + `PROFILED` of this process. Writes trace.json, for Perfetto or
    chrome://tracing, and profile.txt to the folder, and prints the latter."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *cuda],
            schedule=schedule(wait=SKIPPED - 1, warmup=1, active=PROFILED, repeat=1),
            on_trace_ready=self._write,
        )
        self._done = False
        self._profile.start()

    def step(self) -> None:
        """Call after each step."""
        if not self._done:
            self._profile.step()

    def close(self) -> None:
        """Call at the end of training."""
        if not self._done:
            log.warning("the run ended before its steps %d to %d were profiled", SKIPPED + 1, SKIPPED + PROFILED)
            self._done = True

    def _write(self, finished: Any) -> None:
        self._done = True
        self._folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self._folder / "trace.json"))
        with (self._folder / "profile.txt").open("w", encoding="utf-8") as file:
            for console in (Console(file=file, width=110), Console(stderr=True)):
                for table in _tables(finished):
                    console.print(table)
        log.info("profile written to %s", self._folder)


def _tables(finished: Any) -> list[Table]:
    events = finished.key_averages()
    steps = [event for event in finished.events() if event.name.startswith("ProfilerStep")]
    seconds = sum(event.cpu_time_total for event in steps if event.device_type == DeviceType.CPU) / 1e6
    return [_phase_table(events, seconds), _operation_table(events, seconds)]


def _phase_table(events: Sequence[Any], seconds: float) -> Table:
    """Wall clock of rank 0. On a GPU a phase ends when its work is queued, so the GPU's own time is shown too."""
    on_gpu = torch.cuda.is_available()
    title = f"{PROFILED} steps of {1e3 * seconds / PROFILED:,.0f} ms on rank 0"
    table = Table("part of the step", "ms per step", "share", *(["GPU ms per step"] if on_gpu else []), title=title)
    phases = [event for event in events if event.key.startswith(PREFIX) and event.device_type == DeviceType.CPU]
    rest = seconds * 1e6
    for event in sorted(phases, key=lambda event: -event.cpu_time_total):
        gpu = [f"{event.device_time_total / 1e3 / PROFILED:,.1f}"] if on_gpu else []
        table.add_row(event.key.removeprefix(PREFIX), *_share(event.cpu_time_total, seconds), *gpu)
        rest -= event.cpu_time_total
    table.add_row("the rest", *_share(rest, seconds))
    sent = [event for event in events if event.key.startswith(_COLLECTIVES)]
    collectives = sum(event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in sent)
    table.add_row("collectives, which are part of the above", *_share(collectives, seconds))
    return table


def _operation_table(events: Sequence[Any], seconds: float) -> Table:
    on_gpu = torch.cuda.is_available()
    title = f"the {_OPERATIONS} most expensive operations, {'on the GPU' if on_gpu else 'by time on this rank'}"
    table = Table("operation", "ms per step", "share", "calls per step", title=title)
    found = {
        event: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in events
        if not event.key.startswith((PREFIX, "ProfilerStep"))
    }
    for event in sorted(found, key=lambda event: -found[event])[:_OPERATIONS]:
        table.add_row(event.key[:60], *_share(found[event], seconds), f"{event.count / PROFILED:,.0f}")
    return table


def _share(microseconds: float, seconds: float) -> tuple[str, str]:
    return f"{microseconds / 1e3 / PROFILED:,.1f}", f"{microseconds / 1e6 / seconds:.0%}"
