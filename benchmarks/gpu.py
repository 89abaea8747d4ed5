"""MFU and peak memory of pretraining on a GPU, and the time of each kernel alone.

    python -m benchmarks.gpu [--models bert-base] [--lengths 128,512] [--full] [--rounds 2] [--output gpu.json]

BERT-base, BERT-large and a model of ModernBERT-base's shape train with random weights and text; each case in a process
of its own, after some untimed first steps. There are ten default cases. The first five flags select others: all
combinations of their values. With --full, the remaining flags have all values.

All cases run once per round, so that a slow minute of the machine affects all. Prints tables and writes a JSON file,
which is kept up to date while the benchmark runs. MFU is as in `pretrain.modeling.structure`: padding and recomputed
activations do not count.

Without a CUDA device it ends with exit code 2. `--smoke` runs the same code on a CPU with tiny models, to test it; the
figures mean nothing.
"""

import json
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import fire
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_kernels import KernelSettings, KernelTime
from benchmarks.measuring import describe_machine, run_module, spread

_BERT = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 1024}
MODELS: dict[str, dict[str, Any]] = {
    "bert-base": _BERT,
    "bert-large": _BERT
    | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "modernbert-base": {"model_type": "modernbert"},  # the defaults of transformers, with 50,368 tokens
}
_DEFAULT_CASES = (  # the others of a model and length are compared with the first
    ("bert-base", 512, "bf16", 1, False),
    ("bert-base", 512, "bf16", 1, True),
    ("bert-base", 512, "fp16", 1, True),
    ("bert-base", 512, "bf16", 3, True),
    ("bert-base", 128, "bf16", 1, True),
    ("bert-large", 512, "bf16", 1, True),
    ("bert-large", 128, "bf16", 1, True),
    ("modernbert-base", 512, "bf16", 1, False),
    ("modernbert-base", 512, "bf16", 1, True),
    ("modernbert-base", 1024, "bf16", 1, True),
)
_ALL: dict[str, tuple[Any, ...]] = {
    "models": tuple(MODELS),
    "lengths": (128, 512, 1024),
    "precisions": ("bf16", "fp16"),
    "stages": (1, 2, 3),
    "compiled": ("off", "on"),
}
_FEW = _ALL | {"lengths": (512,), "precisions": ("bf16",), "stages": (1,)}
_KERNEL_TOKENS = 32_768
_SMOKE_NOTE = "smoke test with tiny models on a CPU: the figures mean nothing"


@dataclass(frozen=True)
class TrainingCase:
    """A training run to measure."""

    model: str  # of MODELS
    length: int  # of the longest sequence, in tokens
    precision: str
    zero_stage: int
    compile: bool
    microbatch_tokens: int
    steps: int
    warmup: int  # steps before, not timed
    tiny: bool  # a tiny model of the same type


@dataclass(frozen=True)
class TrainingResult:
    """Measurements of a training run, or an error."""

    device: str = ""
    tokens_per_second: float | None = None
    mfu: float | None = None  # None: the device's peak is unknown
    step_ms: float | None = None
    memory: int | None = None  # peak, in bytes
    fill: float | None = None  # real tokens per slot
    error: str = ""


Choice = tuple[str, int, str, int, bool]
"""Model, length, precision, ZeRO stage, and whether layers are compiled."""
Trained = dict[TrainingCase, list[TrainingResult]]
"""One result per round."""
Timed = dict[str, list[KernelTime]]
"""Kernels by precision."""


def gpu(
    models: str | tuple[str, ...] | None = None,
    lengths: int | tuple[int, ...] | None = None,
    precisions: str | tuple[str, ...] | None = None,
    stages: int | tuple[int, ...] | None = None,
    compiled: str | tuple[str, ...] | None = None,
    *,
    full: bool = False,
    rounds: int = 2,
    microbatch_tokens: int = 65_536,
    steps: int = 20,
    kernels: bool = True,
    output: str = "gpu.json",
    smoke: bool = False,
) -> None:
    """Measure, print tables and write JSON.

    Args:
        models: names, comma-separated; as are the values of the next four flags
        lengths: of the longest sequence, in tokens; default: 512
        precisions: bf16, fp16; default: bf16
        stages: ZeRO stages; default: 1
        compiled: off, on; default: both
        full: all values of the flags above that are not given
        rounds: how often each case runs
        microbatch_tokens: slots of a microbatch; a step has one
        steps: timed steps of each case and round
        kernels: whether to time kernels alone too
        output: JSON file
        smoke: tiny models on a CPU
    """
    if not smoke and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and there is none; --smoke tests it on a CPU", file=sys.stderr)
        sys.exit(2)
    given = {"models": models, "lengths": lengths, "precisions": precisions, "stages": stages, "compiled": compiled}
    chosen = choose_cases({name: _values(value) for name, value in given.items() if value is not None}, full)
    cases = [TrainingCase(*case, microbatch_tokens, steps, warmup=5, tiny=False) for case in chosen]
    settings = _kernel_settings(cases) if kernels else []
    if smoke:
        cases = [replace(case, microbatch_tokens=4 * case.length, steps=2, warmup=1, tiny=True) for case in cases]
        settings = [
            replace(one, device="cpu", tokens=2 * max(one.lengths), rounds=1, vocabularies=(200,)) for one in settings
        ]
    _print(*_measure(cases, settings, rounds, Path(output), smoke), smoke)


def choose_cases(given: dict[str, tuple[Any, ...]], full: bool) -> list[Choice]:
    """Each case once. `given`: values by flag."""
    if not given and not full:
        return list(_DEFAULT_CASES)
    cases = (
        (model, length, precision, _used_stage(stage, precision), {"off": False, "on": True}[switch])
        for model, length, precision, stage, switch in product(*((_ALL if full else _FEW) | given).values())
    )
    return list(dict.fromkeys(cases))


def _used_stage(stage: int, precision: str) -> int:
    """The ZeRO stage of the run: 0 is for fp32 only, see `pretrain.engine.deepspeed_settings`."""
    return stage if precision == "fp32" else max(1, stage)


def _values(given: Any) -> tuple[Any, ...]:
    """Fire reads `1,2` as a tuple, `1` as a number, and names as one text."""
    if isinstance(given, str):
        return tuple(given.split(","))
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def _kernel_settings(cases: Sequence[TrainingCase]) -> list[KernelSettings]:
    """One for each precision of the cases."""
    lengths = tuple(sorted({case.length for case in cases}))
    precisions = dict.fromkeys(case.precision for case in cases)
    return [KernelSettings("cuda", precision, lengths, _KERNEL_TOKENS, rounds=20) for precision in precisions]


def _measure(
    cases: Iterable[TrainingCase], settings: Iterable[KernelSettings], rounds: int, output: Path, smoke: bool
) -> tuple[Trained, Timed]:
    trained: Trained = {case: [] for case in cases}
    timed: Timed = {}
    for one in settings:
        timed[one.precision] = _time_kernels(one, smoke)
        _write(output, trained, timed, smoke)
    for number in range(rounds):
        for case, results in trained.items():
            results.append(_train(case, smoke))
            speed = " · ".join(filter(None, _cells(results[-1:], results[-1:])))
            print(f"round {number + 1} of {rounds}: {_describe(case)}: {speed}", file=sys.stderr)
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
    """The JSON output of a module."""
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
        "training": [
            asdict(case) | {"round": number} | asdict(result)
            for case, results in trained.items()
            for number, result in enumerate(results, start=1)
        ],
        "kernels": {precision: [asdict(row) for row in rows] for precision, rows in timed.items()},
    }
    output.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _print(trained: Trained, timed: Timed, smoke: bool) -> None:
    console = Console()
    devices = {result.device for results in trained.values() for result in results if result.device}
    columns = ("tokens/s: median (min – max)", "ratio", "ms per step", "peak memory", "real tokens per slot")
    training = Table("case", "MFU", *columns, title=_SMOKE_NOTE if smoke else ", ".join(devices))
    training.caption = "ratio: of tokens/s, to the first case of the same model and length"
    first: dict[tuple[str, int], list[TrainingResult]] = {}
    for case, results in trained.items():
        reference = first.setdefault((case.model, case.length), results)
        training.add_row(_describe(case), *_cells(results, reference))
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


def _cells(results: Sequence[TrainingResult], reference: Sequence[TrainingResult]) -> list[str]:
    if errors := [result.error for result in results if result.error]:
        return ["", errors[0], "", "", "", ""]
    mfu, rates, ms, memory, fill = (
        [getattr(result, name) for result in results]
        for name in ("mfu", "tokens_per_second", "step_ms", "memory", "fill")
    )
    ratio = ""
    if results is not reference and not any(result.error for result in reference):
        others = (result.tokens_per_second for result in reference)
        ratio = spread([rate / other for rate, other in zip(rates, others, strict=True)], ".2f")
    return [
        "" if None in mfu else f"{statistics.median(mfu):.1%}",
        spread(rates, ",.0f"),
        ratio,
        f"{statistics.median(ms):.1f}",
        f"{max(memory) / 2**30:.1f} GiB",
        f"{statistics.median(fill):.3f}",
    ]


if __name__ == "__main__":
    fire.Fire(gpu)
