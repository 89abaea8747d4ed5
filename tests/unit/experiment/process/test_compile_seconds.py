import time

import torch

from experiment.run_files.goodput import compile_seconds


def test_compiling_is_timed_once() -> None:
    """Catches a release of torch that no longer times compiling, calls that count as compiling, and nested phases that
    count twice."""

    def cube(x: torch.Tensor) -> torch.Tensor:
        return (x * x * x).sum()

    x = torch.ones(3, requires_grad=True)
    before, started = compile_seconds(), time.perf_counter()
    compiled = torch.compile(cube, backend="aot_eager")
    compiled(x).backward()
    after, wall_clock = compile_seconds(), time.perf_counter() - started
    assert wall_clock / 10 < after - before <= wall_clock
    compiled(x).backward()
    assert compile_seconds() == after
