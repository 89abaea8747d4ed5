"""MFU and peak memory of pretraining on a GPU, and the time of each kernel alone.

    python -m benchmarks.gpu [--models bert-base,bert-large] [--lengths 512] [--output gpu.json]

BERT-base, BERT-large and a model of ModernBERT-base's shape, with random weights and text, train at each length,
precision and ZeRO stage, with and without compiled layers; each in a process of its own, after some untimed first
steps. Prints tables and writes a JSON file, which is kept up to date while the benchmark runs. MFU is as in
`pretrain.modeling.flops`: padding and recomputed activations do not count.

Without a CUDA device it ends with exit code 2. `--smoke` runs the same code on a CPU with tiny models, to test it; the
figures mean nothing.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import fire
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_cases import MODELS, KernelSettings, KernelTime, TrainingCase, TrainingResult
from benchmarks.machine import describe_machine
from benchmarks.processes import run_module

_LENGTHS, _PRECISIONS, _STAGES = (128, 512, 1024), ("fp16", "bf16"), (0, 1, 2, 3)
_KERNEL_TOKENS = 32_768
_SMOKE_NOTE = "smoke test with tiny models on a CPU: the figures mean nothing"

Trained = list[tuple[TrainingCase, TrainingResult]]
Timed = dict[str, list[KernelTime]]
"""Kernels by precision."""


def gpu(
    models: str | tuple[str, ...] = tuple(MODELS),
    lengths: int | tuple[int, ...] = _LENGTHS,
    precisions: str | tuple[str, ...] = _PRECISIONS,
    stages: int | tuple[int, ...] = _STAGES,
    compiled: str | tuple[str, ...] = ("off", "on"),
    *,
    microbatch_tokens: int = 65_536,
    steps: int = 20,
    kernels: bool = True,
    output: str = "gpu.json",
    smoke: bool = False,
) -> None:
    """Measure, print tables and write JSON.

    Args:
        models: names, comma-separated; as are the values of the next four flags
        lengths: of the longest sequence, in tokens
        precisions: fp16, bf16
        stages: ZeRO stages
        compiled: off, on
        microbatch_tokens: slots of a microbatch; a step has one
        steps: timed steps of each case
        kernels: whether to time kernels alone too
        output: JSON file
        smoke: tiny models on a CPU
    """
    if not smoke and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and there is none; --smoke tests it on a CPU", file=sys.stderr)
        sys.exit(2)
    switches = [{"off": False, "on": True}[switch] for switch in _values(compiled)]
    chosen = product(_values(models), _values(lengths), _values(precisions), _values(stages), switches)
    cases = [TrainingCase(*choice, microbatch_tokens, steps, warmup=5, tiny=False) for choice in chosen]
    settings = [
        KernelSettings("cuda", precision, _values(lengths), _KERNEL_TOKENS, rounds=20)
        for precision in _values(precisions)
        if kernels
    ]
    if smoke:
        cases = [replace(case, microbatch_tokens=4 * case.length, steps=2, warmup=1, tiny=True) for case in cases]
        settings = [replace(one, device="cpu", tokens=2 * max(one.lengths), rounds=1) for one in settings]
    _print(*_measure(cases, settings, Path(output), smoke), smoke)


def _values(given: Any) -> tuple[Any, ...]:
    """Fire reads `1,2` as a tuple, `1` as a number, and names as one text."""
    if isinstance(given, str):
        return tuple(given.split(","))
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def _measure(
    cases: Iterable[TrainingCase], settings: Iterable[KernelSettings], output: Path, smoke: bool
) -> tuple[Trained, Timed]:
    trained: Trained = []
    timed: Timed = {}
    for one in settings:
        timed[one.precision] = _time_kernels(one, smoke)
        _write(output, trained, timed, smoke)
    for case in cases:
        result = _train(case, smoke)
        trained.append((case, result))
        print(f"{_describe(case)}: {_speed(result)}", file=sys.stderr)
        _write(output, trained, timed, smoke)
    return trained, timed


def _time_kernels(settings: KernelSettings, smoke: bool) -> list[KernelTime]:
    try:
        return [KernelTime(**row) for row in _run("benchmarks.gpu_kernels", asdict(settings), smoke)]
    except subprocess.CalledProcessError as error:
        return [KernelTime("all", "", error=f"exit code {error.returncode}")]


def _train(case: TrainingCase, smoke: bool) -> TrainingResult:
    try:
        return TrainingResult(**_run("benchmarks.gpu_training", asdict(case), smoke))
    except subprocess.CalledProcessError as error:
        return TrainingResult(error=f"exit code {error.returncode}")


def _run(module: str, settings: dict[str, Any], smoke: bool) -> Any:
    """What a module prints as JSON."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if smoke:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return run_module(module, settings, environment=environment)


def _write(output: Path, trained: Trained, timed: Timed, smoke: bool) -> None:
    content = {
        "note": _SMOKE_NOTE if smoke else "",
        "machine": describe_machine(),
        "training": [asdict(case) | asdict(result) for case, result in trained],
        "kernels": {precision: [asdict(row) for row in rows] for precision, rows in timed.items()},
    }
    output.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _print(trained: Trained, timed: Timed, smoke: bool) -> None:
    console = Console()
    devices = {result.device for _, result in trained if result.device}
    training = Table("case", "MFU", "tokens/s", "ms per step", "peak memory", "real tokens per slot")
    training.title = _SMOKE_NOTE if smoke else ", ".join(devices)
    for case, result in trained:
        training.add_row(_describe(case), *_cells(result))
    console.print(training)
    for precision, rows in timed.items():
        kernels = Table("kernel, forward and backward", "shape", "ms", "TFLOP/s", title=precision)
        for row in rows:
            rate = "" if row.tflops is None else f"{row.tflops:,.1f}"
            kernels.add_row(row.kernel, row.shape, row.error or f"{row.ms:.3f}", rate)
        console.print(kernels)
    print(describe_machine())


def _describe(case: TrainingCase) -> str:
    layers = "compiled" if case.compile else "eager"
    return f"{case.model}, {case.length} tokens, {case.precision}, ZeRO {case.zero_stage}, {layers}"


def _speed(result: TrainingResult) -> str:
    return result.error or " · ".join(filter(None, _cells(result)))


def _cells(result: TrainingResult) -> list[str]:
    if result.error:
        return ["", result.error, "", "", ""]
    assert result.tokens_per_second is not None
    assert result.step_ms is not None
    assert result.memory is not None
    assert result.fill is not None
    mfu = "" if result.mfu is None else f"{100 * result.mfu:.1f} %"
    memory = f"{result.memory / 2**30:.1f} GiB"
    return [mfu, f"{result.tokens_per_second:,.0f}", f"{result.step_ms:.1f}", memory, f"{result.fill:.3f}"]


if __name__ == "__main__":
    fire.Fire(gpu)
