"""Profile a few steps of a run: `deepcloze pretrain --profile`. docs/performance.md explains how to read the result."""

import errno
import io
import logging
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from experiment.files import atomic_write, write_json, write_text
from experiment.progress import terminal
from pretrain.engine.phases import PREFIX

log = logging.getLogger(__name__)

SKIPPED, PROFILED = 4, 3  # steps; the first ones allocate memory and may compile
_OPERATIONS = 10
_CUDA_CALL = re.compile(r"cu(da)?[A-Z]")  # cudaLaunchKernel, cuLaunchKernel


class StepProfiler:
    """Profiles steps `SKIPPED` + 1 to `SKIPPED` + `PROFILED` of this process. Writes trace.json, for Perfetto or
    chrome://tracing, profile.json (`StepTimes`) and profile.txt to the folder, and prints the latter."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._on_gpu = torch.cuda.is_available()
        cuda = [ProfilerActivity.CUDA] if self._on_gpu else []
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *cuda],
            schedule=schedule(wait=SKIPPED - 1, warmup=1, active=PROFILED, repeat=1),
            on_trace_ready=self._finish,
            acc_events=True,  # without it, torch 2.11 warns that other cycles are not kept; there is one
        )
        self._done = False
        self._steps = 0
        self._profile.start()

    def step(self) -> None:
        """Call after each step."""
        self._steps += 1
        if self._on_gpu and self._steps in (SKIPPED, SKIPPED + PROFILED):
            torch.cuda.synchronize()  # the host runs ahead: kernels of the previous step would be counted
        self._profile.step()

    def close(self) -> None:
        """Call at the end of training."""
        if not self._done:
            log.warning("the run ended before its steps %d to %d were profiled", SKIPPED + 1, SKIPPED + PROFILED)
            self._profile.on_trace_ready = None
        self._profile.stop()

    def _finish(self, finished: Any) -> None:
        self._done = True
        try:
            self._write(finished)
        except OSError as error:  # training does not need it
            log.warning("not all of the profile was written to %s: %s", self._folder, error)

    def _write(self, finished: Any) -> None:
        times = _step_times(finished, self._on_gpu)
        write_json(self._folder / "profile.json", asdict(times))
        tables = [_phase_table(times), _operation_table(finished.key_averages(), times.step, self._on_gpu)]
        text = io.StringIO()
        for console in (Console(file=text, width=110), terminal()):
            for table in tables:
                console.print(table)
        write_text(self._folder / "profile.txt", text.getvalue())
        with atomic_write(self._folder / "trace.json") as temporary:
            try:
                finished.export_chrome_trace(str(temporary))
                if not temporary.exists():  # torch raises nothing if it cannot write
                    raise OSError(errno.EIO, "torch did not write trace.json")
            finally:
                temporary.with_name(temporary.name + ".tmp").unlink(missing_ok=True)
        log.info("profile written to %s", self._folder)


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of rank 0's clock per step. On a GPU a phase ends when its work is queued, so the GPU's own time is
    given too."""

    step: float
    phases: dict[str, float]
    gpu: dict[str, float]  # by phase; empty without a GPU


def _step_times(finished: Any, on_gpu: bool) -> StepTimes:
    events = finished.events()
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    steps = [event for event in on_cpu if event.name.startswith("ProfilerStep")]
    phases = [event for event in on_cpu if event.name.startswith(PREFIX)]
    cpu: defaultdict[str, float] = defaultdict(float)
    for event in phases:
        cpu[event.name.removeprefix(PREFIX)] += event.cpu_time_total / 1e3 / PROFILED
    gpu = {name: time / 1e3 / PROFILED for name, time in _gpu_phases(events, phases).items()} if on_gpu else {}
    step = sum(event.cpu_time_total for event in steps) / 1e3 / PROFILED
    return StepTimes(step, dict(cpu), gpu)


def _gpu_phases(events: Sequence[Any], phases: Sequence[Any]) -> dict[str, float]:
    """Return microseconds of the kernels that were launched in each phase, on any thread: autograd launches kernels of
    the backward pass on a thread of its own, so they are not part of the phase's own `device_time_total`."""
    annotations = {event.name for event in events if event.is_user_annotation}
    ordered = sorted(phases, key=lambda phase: phase.time_range.start)
    starts = [phase.time_range.start for phase in ordered]
    total = {phase.name.removeprefix(PREFIX): 0.0 for phase in ordered}
    for event in events:
        # torch matches kernels to operations by number, and calls of CUDA have numbers of their own.
        if event.device_type != DeviceType.CPU or _CUDA_CALL.match(event.name):
            continue
        number = bisect_right(starts, event.time_range.start) - 1
        if number >= 0 and event.time_range.start < ordered[number].time_range.end:
            kernels = [kernel.duration for kernel in event.kernels if kernel.name not in annotations]
            total[ordered[number].name.removeprefix(PREFIX)] += sum(kernels)
    return total


def _is_on_gpu(event: Any) -> bool:
    """Return whether this is a kernel, copy or fill: not its launch on the CPU, nor an annotation around several."""
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


def _phase_table(times: StepTimes) -> Table:
    title = f"{PROFILED} steps of {times.step:,.0f} ms on rank 0"
    table = Table("part of the step", "ms per step", "share", *(["GPU ms per step"] if times.gpu else []), title=title)
    for name, milliseconds in sorted(times.phases.items(), key=lambda phase: -phase[1]):
        gpu = [f"{times.gpu[name]:,.1f}"] if times.gpu else []
        table.add_row(name, *_row(milliseconds, times.step), *gpu)
    table.add_row("the rest", *_row(times.step - sum(times.phases.values()), times.step))
    return table


def _operation_table(events: Sequence[Any], step: float, on_gpu: bool) -> Table:
    title = f"the {_OPERATIONS} most expensive operations, {'on the GPU' if on_gpu else 'by time on this rank'}"
    table = Table("operation", "ms per step", "share", "calls per step", title=title)
    if on_gpu:  # the operations on the CPU that launched the kernels have their time too
        found = [(event.self_device_time_total, event) for event in events if _is_on_gpu(event)]
    else:
        ours = (PREFIX, "ProfilerStep")
        found = [(event.self_cpu_time_total, event) for event in events if not event.key.startswith(ours)]
    for time, event in sorted(found, key=lambda entry: -entry[0])[:_OPERATIONS]:
        table.add_row(event.key[:60], *_row(time / 1e3 / PROFILED, step), f"{event.count / PROFILED:,.0f}")
    return table


def _row(milliseconds: float, step: float) -> tuple[str, str]:
    return f"{milliseconds:,.1f}", f"{milliseconds / step:.0%}"
