"""What `benchmarks.gpu_session` measures, with tiny models on a CPU."""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from benchmarks import gpu_kernels, gpu_pretraining, gpu_training
from benchmarks.gpu_kernels import KernelSettings
from benchmarks.gpu_results import read_figures
from benchmarks.gpu_training import MODELS, TrainingResult, parse_case
from runs import soak

ROOT = Path(__file__).resolve().parents[3]
CASE = parse_case("bert-base-8-bf16-zero1-eager", tiny=True)


EAGER = "bert-base-32-bf16-zero2-eager"
COMPILED = [(f"modernbert-base-32-bf16-zero{stage}-compiled", False) for stage in (1, 3)]
PROFILE = {"profile.txt", "profile.json", "trace.json.gz"}


@pytest.mark.parametrize(("name", "profiled"), [(EAGER, False), *soak((EAGER, True), *COMPILED)])
def test_a_case(name: str, profiled: bool, tmp_path: Path, handed_over: Mapping[str, str]) -> None:
    """Catches a benchmark that no longer fits the engine, and layers that cannot be compiled before it is built."""
    command = [sys.executable, "-m", "benchmarks.gpu_training", name, "--tiny"]
    command += ["--profile", str(tmp_path)] if profiled else []
    # On busy cores, threads wait for each other in each operation.
    variables = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | handed_over
    finished = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    result: dict[str, Any] = list(read_figures(finished.stdout))[-1]
    assert (result["case"], result["device"], result["mfu"], result["error"]) == (name, "CPU", None, "")
    assert 0.7 < result["fill"] <= 1.0
    assert result["tokens_per_second"] > 0
    if profiled:
        assert {path.name for path in tmp_path.iterdir()} == PROFILE


def test_a_profile_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a profile of too few steps, of which nothing is written, and a trace that is not compressed."""

    def train(_engine: object, _batches: object, _first: int, steps: int, after_step: Callable[[], object]) -> None:
        for _ in range(steps):
            torch.ones(2).sum()
            after_step()

    monkeypatch.setattr(gpu_training, "_train", train)
    engine: Any = None
    gpu_training._profile(engine, [], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == PROFILE


@pytest.mark.soak
@pytest.mark.parametrize("name", ["bert-base-32-bf16-zero1-compiled", "modernbert-base-32-bf16-zero1-compiled"])
def test_a_case_finds_its_layers_compiled(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a `--compile` that fills no cache, and a kind of layer that is not among the first layers."""
    variables = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.gpu_training", "--tiny", name]
    subprocess.run([*command, "--compile"], cwd=ROOT, env=os.environ | variables, check=True)
    assert f"{name}: compiled\n" in capfd.readouterr().out
    compiled = set(tmp_path.rglob("*"))
    subprocess.run([*command, "--layers", "10"], cwd=ROOT, env=os.environ | variables, check=True)
    assert compiled
    assert set(tmp_path.rglob("*")) == compiled


@pytest.mark.soak
def test_a_case_that_fails_to_compile_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a measurement that starts with an empty cache although all seems well."""
    assert gpu_training.compile_cases(["no-such-case"]) == 1
    assert "no-such-case: failed" in capfd.readouterr().out


@pytest.mark.parametrize(("warning", "code"), [("the layers run without torch.compile", 1), ("attention is slow", 0)])
def test_a_case_that_runs_without_compiled_layers_has_failed(
    warning: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches layers that could not be compiled, and pass for compiled ones."""
    output = "FIGURES " + json.dumps({"case": "any", "error": "", "warnings": [warning]})
    process = SimpleNamespace(communicate=lambda: (output, None), returncode=0)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: process)
    assert gpu_training.compile_cases(["any"]) == code
    assert f"any: {warning if code else 'compiled'}\n" in capsys.readouterr().out


def test_warnings_of_a_case_are_kept_and_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches figures of compiled layers or of our kernels that are those of torch, and nothing says so."""

    def measure(*_: object) -> list[TrainingResult]:
        logging.getLogger("pretrain.modeling.attention").warning("attention is that of %s", "torch")
        return [TrainingResult("any"), TrainingResult("any")]

    run_without_engine(monkeypatch)
    monkeypatch.setattr(gpu_training, "_measure", measure)
    assert [result.warnings for result in gpu_training.run(CASE)] == [("attention is that of torch",)] * 2
    assert capsys.readouterr().err == "attention is that of torch\n"


def test_a_case_has_several_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a range of one round, and one that is measured before the clock of the GPU has settled."""
    timed: list[tuple[int, int]] = []

    def train(_engine: object, _batches: object, first: int, steps: int) -> float:
        timed.append((first, steps))
        return float(len(timed))

    batch = SimpleNamespace(
        tokens=8, squared_lengths=1, masked_tokens=1, microbatches=[SimpleNamespace(input_ids=torch.ones(10))]
    )
    monkeypatch.setattr(gpu_training, "_train", train)
    monkeypatch.setattr(gpu_training, "make_batches", lambda *_, **__: [batch])
    built: Any = SimpleNamespace(flops=SimpleNamespace(per_step=lambda *_: 1.0))
    engine: Any = SimpleNamespace(device=torch.device("cpu"))
    results = gpu_training._measure(parse_case(CASE.name), built, engine, None)
    assert timed == [(0, 5), (5, 5), (10, 5), (15, 20), (35, 20), (55, 20), (75, 20), (95, 20)]
    assert [result.tokens_per_second for result in results] == [160 / seconds for seconds in (4, 5, 6, 7, 8)]
    assert {result.fill for result in results} == {0.8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bert-base-512"], "no case 'bert-base-512'; expected one like"),
        (["bert-base-512-bf16-zero0-eager"], "no case 'bert-base-512-bf16-zero0-eager'; expected"),
        (["bert-base-2048-bf16-zero1-eager"], "-eager': expected a length from 8 to 1,024 tokens"),
        (["modernbert-base-2-bf16-zero1-eager"], "-eager': expected a length from 8 to 8,192 tokens"),
        ([CASE.name, CASE.name], "expected one case without --compile, found 2"),
        ([CASE.name, "--layers=0"], "--layers: expected at least 1, found 0"),
    ],
)
def test_a_wrong_argument_says_so(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback."""
    with pytest.raises(SystemExit, match="2"):
        gpu_training.main(arguments)
    assert message in capsys.readouterr().err


def run_without_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_training, "connect", lambda *_: None)
    monkeypatch.setattr(gpu_training, "disconnect", lambda: None)
    monkeypatch.setattr(gpu_training, "_build", lambda *_: (None, SimpleNamespace(close=lambda: None)))


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.cuda.OutOfMemoryError


@pytest.mark.parametrize("step", ["_build", "_measure"])
def test_a_case_that_runs_out_of_memory_says_so(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an engine that does not fit on the device and is reported as an exit code."""
    run_without_engine(monkeypatch)
    monkeypatch.setattr(gpu_training, step, out_of_memory)
    assert [result.error for result in gpu_training.run(CASE)] == ["out of memory"]


def test_a_case_that_cannot_connect_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a process that waits forever: `sys.exit` in a thread ends the thread only."""
    codes: list[int] = []

    def connect(_: object, end_process: Callable[[str], object]) -> None:
        thread = threading.Thread(target=end_process, args=["not connected"])
        thread.start()
        thread.join()
        raise RuntimeError

    monkeypatch.setattr(gpu_training, "connect", connect)
    monkeypatch.setattr(os, "_exit", codes.append)
    with pytest.raises(RuntimeError):
        gpu_training.run(CASE)
    assert codes == [1]


KERNELS = KernelSettings("cpu", "bf16", lengths=(8,), tokens=8, rounds=1, vocabularies=(200,))


def test_kernels() -> None:
    """Catches a kernel whose arguments have changed."""
    rows = list(gpu_kernels.run(KERNELS))
    assert {row.kernel for row in rows} > {"head, logits kept", "dropout", "layer norm"}
    assert all(row.ms is not None and row.precision == "bf16" and not row.error for row in rows)


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error\nmore")])
@pytest.mark.parametrize("step", ["_milliseconds", "_draw"])
def test_a_kernel_that_fails_says_so(step: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches other kernels that are not measured because one, or its inputs, do not fit on the device."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(gpu_kernels, step, fail)
    rows = list(gpu_kernels.run(KERNELS))
    assert len(rows) > 5
    assert {(row.ms, row.error) for row in rows} == {(None, str(error).splitlines()[0])}


@pytest.mark.parametrize("arguments", [[], ["fp8"]])
def test_a_wrong_precision_says_so(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback."""
    with pytest.raises(SystemExit, match="2"):
        gpu_kernels.main(arguments)
    assert "precision" in capsys.readouterr().err


def test_times_are_of_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches small kernels whose time is that of the host, which the GPU waits for in the first call."""
    events: list[str] = []
    event = SimpleNamespace(
        record=lambda: events.append("event"), synchronize=lambda: None, elapsed_time=lambda _: 20.0
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    assert gpu_kernels._time_on_gpu(lambda: events.append("call")) == 2.0
    assert events == ["event", *["call"] * 10, "event"]


def test_the_learning_rate_of_a_large_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a large model that Muon trains at the rate of the demo's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    optimizer = gpu_pretraining._config(tmp_path, tmp_path, 120)["optimizer"]
    assert (optimizer["name"], optimizer["lr"], optimizer["muon"]["lr"]) == ("muon", 5e-4, 5e-4)


def test_a_run_that_compiles_for_a_minute_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a budget that ends before SIGTERM, because compiling is a part of it."""
    stops: list[float] = []

    def stop_after(seconds: float, *_: object) -> None:
        stops.append(seconds)
        raise SystemExit

    monkeypatch.setattr(gpu_pretraining, "deepcloze", lambda *_: None)
    monkeypatch.setattr(gpu_pretraining, "_write_text", lambda _: None)
    monkeypatch.setattr(gpu_pretraining, "stop_after", stop_after)
    with pytest.raises(SystemExit):
        gpu_pretraining.pretrain(tmp_path, 120)
    assert stops[0] + 60 < 120


def test_the_models_are_of_their_published_size() -> None:
    """Catches figures of a model that is smaller than its name says."""
    from transformers import AutoConfig

    from pretrain.modeling.random_model import meta_model

    sizes = {
        name: sum(parameter.numel() for parameter in meta_model(AutoConfig.for_model(**fields)).parameters()) / 1e6
        for name, fields in MODELS.items()
    }
    assert sizes == pytest.approx({"bert-base": 110, "bert-large": 336, "modernbert-base": 149}, rel=0.01)
