"""Times of kernels on a GPU."""

import pytest

from benchmarks import gpu_kernels
from benchmarks.gpu_kernels import KernelTime


@pytest.mark.parametrize(("error", "fails"), [("", False), ("CUDA out of memory", False), ("no kernel image", True)])
def test_a_broken_kernel_fails_the_job(monkeypatch: pytest.MonkeyPatch, error: str, fails: bool) -> None:
    """Catches a kernel that does not compile, in a job that counts as passed and is not repeated."""
    times = [KernelTime("a", "bf16", "1", error=error), KernelTime("b", "bf16", "1", ms=1.0)]
    monkeypatch.setattr(gpu_kernels, "run", lambda _: iter(times))
    if fails:
        with pytest.raises(SystemExit, match="1"):
            gpu_kernels.main(["bf16"])
    else:
        gpu_kernels.main(["bf16"])
