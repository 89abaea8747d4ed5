from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from pretrain.engine.phases import PREFIX
from pretrain.training import profiler as profiler_module
from pretrain.training.profiler import (
    PROFILED,
    SKIPPED,
    StepProfiler,
    _operation_table,
    _step_times,
)


def event(name: str, start: float, end: float) -> Any:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))


def on_cpu(name: str, start: float, end: float, *kernels: tuple[str, float], annotation: bool = False) -> Any:
    """An event of the CPU, in microseconds. `kernels`: (name, duration) of those that it launched."""
    launched = [SimpleNamespace(name=name, duration=duration) for name, duration in kernels]
    return SimpleNamespace(
        **vars(event(name, start, end)),
        device_type=DeviceType.CPU,
        is_user_annotation=annotation,
        kernels=launched,
        cpu_time_total=end - start,
    )


def on_gpu(name: str, start: float, end: float, annotation: bool = False) -> Any:
    """An event of the GPU, in microseconds: a kernel, or an annotation around some."""
    return SimpleNamespace(
        **vars(event(name, start, end)),
        device_type=DeviceType.CUDA,
        is_user_annotation=annotation,
        kernels=[],
        key=name,
        self_device_time_total=end - start,
        count=PROFILED,
    )


def test_a_phase_has_the_kernels_that_every_thread_launched_in_it() -> None:
    """Catches a backward pass of 0 ms on the GPU, whose kernels autograd's own thread launches; kernels that count
    once for each annotation around them, or again for the call of CUDA with the number of their operation; and kernels
    that count for the phase in which they run, in place of the one in which they were launched."""
    events = [
        on_cpu("ProfilerStep#5", 0, 3000, annotation=True),
        on_cpu(PREFIX + "forward", 0, 1000, (PREFIX + "forward", 6000), annotation=True),
        on_cpu("aten::linear", 10, 40),
        on_cpu("aten::addmm", 20, 30, ("gemm", 6000)),
        on_cpu("cudaLaunchKernel", 25, 26, ("gemm", 6000)),
        on_cpu(PREFIX + "backward", 1000, 2000, annotation=True),
        on_cpu("autograd::engine::evaluate_function: AddmmBackward0", 1100, 1400),  # of another thread, as those below
        on_cpu("aten::mm", 1200, 1210, ("gemm", 3000), ("splitKreduce", 900)),
        on_cpu("aten::copy_", 2500, 2510, ("Memcpy DtoH", 9000)),  # in no phase
        on_gpu(PREFIX + "forward", 900, 6900, annotation=True),
        on_gpu("gemm", 900, 6900),
        on_gpu("gemm", 6900, 9900),
        on_gpu("splitKreduce", 9900, 10800),
    ]
    times = _step_times(SimpleNamespace(events=lambda: events), on_gpu=True)
    assert times.gpu == pytest.approx({"forward": 6 / PROFILED, "backward": 3.9 / PROFILED})
    assert times.phases == pytest.approx({"forward": 1 / PROFILED, "backward": 1 / PROFILED})


def test_the_most_expensive_operations_of_a_gpu_are_those_that_ran_there() -> None:
    """Catches a table in which an operation of the CPU and the kernel that it launched share the same time, and one
    with annotations, whose time is that of the kernels within."""
    launcher = on_cpu("aten::addmm", 20, 30, ("gemm", 800))
    averages = [
        SimpleNamespace(**vars(launcher), key="aten::addmm", self_device_time_total=800.0, count=PROFILED),
        on_gpu("gemm", 0, 800),
        on_gpu("Memset (Device)", 0, 200),
        on_gpu(PREFIX + "forward", 0, 1000, annotation=True),
    ]
    table = _operation_table(averages, step=1.0, on_gpu=True)
    assert list(table.columns[0].cells) == ["gemm", "Memset (Device)"]


def profile_steps(folder: Path, steps: int) -> None:
    profiler = StepProfiler(folder)
    for _ in range(steps):
        torch.ones(2).sum()
        profiler.step()
    profiler.close()


@pytest.mark.parametrize("name", ["", "trace.json", "profile.json", "profile.txt"])
def test_a_profile_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Catches a run that ends on rank 0 alone because the folder of its profile, or a file in it, is not writable."""
    folder = tmp_path / "profile"
    if name:
        (folder / name / "in the way").mkdir(parents=True)
    else:
        folder.touch()
    profile_steps(folder, SKIPPED + PROFILED + 1)
    assert f"not all of the profile was written to {folder}" in caplog.text
    assert name in caplog.text
    assert not torch.autograd._profiler_enabled()


def test_a_trace_that_torch_could_not_write_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a part of a trace that stays on a full disk, and a message about another file."""

    def write_part(_: object, path: str) -> None:
        Path(path + ".tmp").write_text('{"part":')

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", write_part)
    profile_steps(tmp_path, SKIPPED + PROFILED + 1)
    assert f"not all of the profile was written to {tmp_path}: " in caplog.text
    assert "torch did not write trace.json" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.json", "profile.txt"]


@pytest.mark.parametrize("steps", [0, SKIPPED - 1, SKIPPED, SKIPPED + 1, SKIPPED + PROFILED, SKIPPED + PROFILED + 1])
def test_nothing_is_recorded_after_the_end(tmp_path: Path, steps: int) -> None:
    """Catches a run that ends within the profiled steps: its process would record, and fill its memory, until its end,
    or write a profile of fewer steps."""
    profile_steps(tmp_path / "profile", steps)
    assert not torch.autograd._profiler_enabled()
    assert (tmp_path / "profile").exists() == (steps >= SKIPPED + PROFILED)


def test_the_gpu_is_synchronized_before_and_after_the_profiled_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches a profile that includes kernels of the previous step, because the host runs ahead of the GPU."""
    calls: list[str] = []
    recorder = SimpleNamespace(start=lambda: None, step=lambda: calls.append("step"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(profiler_module, "profile", lambda **_: recorder)
    profiler = StepProfiler(tmp_path)
    for _ in range(SKIPPED + PROFILED + 1):
        profiler.step()
    before = ["step"] * (SKIPPED - 1)
    assert calls == [*before, "wait", "step", *["step"] * (PROFILED - 1), "wait", "step", "step"]
