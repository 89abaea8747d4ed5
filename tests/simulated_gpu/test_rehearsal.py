"""tests/gpu and the benchmarks of `benchmarks.gpu_session` run on the simulated GPU, as far as it goes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CASES = (
    "test_fp32_on_a_gpu_follows_the_cpu",
    "test_16_bit_follows_fp32[bf16-1]",
    "test_16_bit_follows_fp32[fp16-3]",
    "test_offload_changes_nothing[bf16_zero2_cpu_offload-adamw]",
    "test_offload_changes_nothing[fp16_zero3_cpu_offload-muon]",
    "test_a_bad_batch_after_which_a_microbatch_is_queued[bf16-skip]",
    "test_a_bad_batch_after_which_a_microbatch_is_queued[fp32-rewind]",
)
MEASURE = """
import json, os, sys
from dataclasses import asdict
from benchmarks.gpu_training import parse_case, run
from launcher.hosts.machine import free_port
from simulated_gpu.gpu import simulated_gpu
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
with simulated_gpu():
    print(json.dumps(asdict(run(parse_case(sys.argv[1], tiny=True))[-1])))
"""

pytestmark = pytest.mark.soak


def run(*arguments: str) -> str:
    """Run Python with the helpers of tests. Returns stdout."""
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_tests_of_training() -> None:
    """Catches mistakes in tests that only a GPU would run otherwise."""
    tests = [f"{TESTS}/gpu/test_gpu_training.py::{case}" for case in CASES]
    printed = run("-m", "pytest", "-p", "simulated_gpu.rehearsal", "-q", *tests)
    assert f"{len(CASES)} passed" in printed


@pytest.mark.parametrize("case", ["bert-base-128-bf16-zero1-eager", "modernbert-base-128-fp16-zero3-eager"])
def test_benchmark_of_training(case: str) -> None:
    """Catches a benchmark that fails, or measures another device."""
    printed = run("-c", MEASURE, case)
    result = json.loads(printed.splitlines()[-1])
    assert (result["case"], result["device"], result["error"]) == (case, "NVIDIA H100 80GB HBM3", "")
    assert result["mfu"] > 0
