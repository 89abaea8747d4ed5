"""`benchmarks.gpu` without a GPU."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_kernels, gpu_training
from benchmarks.gpu import MODELS, TrainingCase, TrainingResult
from benchmarks.gpu_kernels import KernelSettings

ROOT = Path(__file__).resolve().parents[3]
CASE = TrainingCase("bert-base", 8, "bf16", 1, compile=False, microbatch_tokens=8, steps=1, warmup=1, tiny=True)


def run_benchmark(*flags: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.gpu", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    """Catches a traceback, and figures of a CPU that are taken for those of a GPU."""
    finished = run_benchmark("--output", str(tmp_path / "gpu.json"))
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "needs a CUDA device, and there is none" in finished.stderr
    assert len(finished.stderr.splitlines()) == 1
    assert not (tmp_path / "gpu.json").exists()


def smoke(tmp_path: Path, *flags: str) -> tuple[str, dict[str, Any]]:
    output = tmp_path / "gpu.json"
    finished = run_benchmark("--smoke", "--precisions=bf16", "--output", str(output), *flags)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, json.loads(output.read_text(encoding="utf-8"))


def test_smoke(tmp_path: Path) -> None:
    """Catches a benchmark that no longer fits the engine, or drops a case that fails."""
    printed, content = smoke(
        tmp_path, "--models=bert-base", "--lengths=32", "--stages=2", "--compiled=off", "--rounds=1"
    )
    assert "the figures mean nothing" in printed
    assert "the figures mean nothing" in content["note"]
    assert [row["error"] for row in content["training"]] == [""]
    for row in content["training"]:
        assert (row["device"], row["mfu"]) == ("CPU", None)
        assert 0.7 < row["fill"] <= 1.0
        assert row["tokens_per_second"] > 0
    assert {row["kernel"] for row in content["kernels"]["bf16"]} > {"head, logits kept", "dropout", "layer norm"}


def test_a_process_that_fails_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a benchmark that ends at the first kernel or case that fails."""

    def failing(*_: object) -> None:
        raise subprocess.CalledProcessError(1, "python")

    monkeypatch.setattr(gpu, "_run", failing)
    settings = KernelSettings("cpu", "bf16", (8,), 8, 1)
    trained, timed = gpu._measure([CASE], [settings], 2, tmp_path / "gpu.json", smoke=True)
    gpu._print(trained, timed, smoke=True)
    assert [result.error for result in trained[CASE]] == 2 * ["exit code 1"]
    assert [row.error for row in timed["bf16"]] == ["exit code 1"]


def test_cases_alternate_and_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a case that runs in a slow minute only, and a ratio of the medians instead of that of each round."""
    compiled = replace(CASE, compile=True)
    rates = iter([100.0, 150.0, 50.0, 100.0, 80.0, 240.0])
    order: list[TrainingCase] = []

    def train(case: TrainingCase, _: bool) -> TrainingResult:
        order.append(case)
        return TrainingResult("CPU", next(rates), None, 1.0, 2**30, 1.0)

    monkeypatch.setattr(gpu, "_train", train)
    trained, timed = gpu._measure([CASE, compiled], [], 3, tmp_path / "gpu.json", smoke=True)
    assert order == 3 * [CASE, compiled]
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["training"]
    assert [(row["compile"], row["round"]) for row in rows] == [
        (on, number) for on in (False, True) for number in (1, 2, 3)
    ]
    assert gpu._cells(trained[CASE], trained[CASE])[:3] == ["", "80 (50 – 100)", ""]
    assert gpu._cells(trained[compiled], trained[CASE])[:3] == ["", "150 (100 – 240)", "2.00 (1.50 – 3.00)"]
    gpu._print(trained, timed, smoke=True)
    assert "ratio" in capsys.readouterr().out


def test_each_case_runs_once() -> None:
    """Catches 16-bit cases at ZeRO 0, which run at ZeRO 1, and a long default list."""
    few = gpu.choose_cases({}, full=False)
    assert len(set(few)) == len(few) <= 12
    full = gpu.choose_cases({}, full=True)
    assert {*few} < {*full}
    assert len(set(full)) == len(full) == 3 * 3 * 2 * 3 * 2
    stages = {"stages": (0, 1), "models": ("bert-base",), "compiled": ("on",)}
    assert gpu.choose_cases(stages, full=False) == [("bert-base", 512, "bf16", 1, True)]
    assert [case[3] for case in gpu.choose_cases(stages | {"precisions": ("fp32",)}, full=False)] == [0, 1]


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.cuda.OutOfMemoryError


@pytest.mark.parametrize("step", ["_build", "_measure"])
def test_a_case_that_runs_out_of_memory_says_so(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an engine that does not fit on the device and is reported as an exit code."""
    engine = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(gpu_training, "connect", lambda *_: None)
    monkeypatch.setattr(gpu_training, "disconnect", lambda: None)
    monkeypatch.setattr(gpu_training, "_build", lambda *_: (None, engine))
    monkeypatch.setattr(gpu_training, step, out_of_memory)
    assert gpu_training.run(CASE).error == "out of memory"


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


def test_a_kernel_that_runs_out_of_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches other kernels that are not measured because one does not fit on the device."""
    monkeypatch.setattr(gpu_kernels, "_milliseconds", out_of_memory)
    rows = gpu_kernels.run(KernelSettings("cpu", "bf16", (8,), 8, 1, (200,)))
    assert len(rows) > 5
    assert {(row.ms, row.error) for row in rows} == {(None, "out of memory")}


@pytest.mark.soak
@pytest.mark.parametrize("stage", [1, 3])
def test_smoke_with_compiled_layers(tmp_path: Path, stage: int) -> None:
    """Catches a ZeRO stage with which it fails, or layers that cannot be compiled before the engine is built."""
    flags = (
        "--models=modernbert-base",
        "--lengths=32",
        "--compiled=on",
        f"--stages={stage}",
        "--kernels=False",
        "--rounds=1",
    )
    _, content = smoke(tmp_path, *flags)
    assert [(row["zero_stage"], row["compile"], row["error"]) for row in content["training"]] == [(stage, True, "")]


def test_the_models_are_of_their_published_size() -> None:
    """Catches figures of a model that is smaller than its name says."""
    from transformers import AutoConfig

    from pretrain.modeling.random_model import meta_model

    sizes = {
        name: sum(parameter.numel() for parameter in meta_model(AutoConfig.for_model(**fields)).parameters()) / 1e6
        for name, fields in MODELS.items()
    }
    assert sizes == pytest.approx({"bert-base": 110, "bert-large": 336, "modernbert-base": 149}, rel=0.01)
