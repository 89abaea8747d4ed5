"""What of `benchmarks.gpu` can be tested without a GPU."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_kernels, gpu_training
from benchmarks.gpu_cases import MODELS, KernelSettings, TrainingCase

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
        tmp_path, "--models=bert-base,modernbert-base", "--lengths=32", "--stages=2", "--compiled=off"
    )
    assert "the figures mean nothing" in printed
    assert "the figures mean nothing" in content["note"]
    assert [row["error"] for row in content["training"]] == ["", ""]
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
    trained, timed = gpu._measure([CASE], [settings], tmp_path / "gpu.json", smoke=True)
    gpu._print(trained, timed, smoke=True)
    assert ([result.error for _, result in trained], [row.error for row in timed["bf16"]]) == (2 * (["exit code 1"],))


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
    rows = gpu_kernels.run(KernelSettings("cpu", "bf16", (8,), 8, 1))
    assert len(rows) > 5
    assert {(row.ms, row.error) for row in rows} == {(None, "out of memory")}


@pytest.mark.soak
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_smoke_with_compiled_layers(tmp_path: Path, stage: int) -> None:
    """Catches a ZeRO stage with which it fails, or layers that cannot be compiled before the engine is built."""
    flags = ("--models=modernbert-base", "--lengths=32", "--compiled=on", f"--stages={stage}", "--kernels=False")
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
