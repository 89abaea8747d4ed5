"""The matrix products of a training step on a CPU, alone: an upper bound for any implementation.

`benchmarks.throughput` runs it in a separate process; it prints one JSON object. It computes the products of the linear
layers of a BERT with a masked-LM head, forward and backward, for one microbatch without padding. In the last layer only
keys and values are needed for all tokens, the rest for masked ones. Products of attention are left out. Each product
uses the fastest implementation: `torch.mm`, oneDNN's linear layer or, in fp32 with one thread, NumPy's OpenBLAS. In
fp32 torch uses MKL, which is slower on many CPUs; in bf16 `torch.mm` is faster for gradients of weights. With several
threads OpenBLAS is left out: it has its own, which compete with torch's.
"""

import json
import statistics
import sys
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from experiment.process.hardware import keep_freed_memory

_MASKED = 0.15
_ROUNDS = 20
_TRIES = 3  # of each implementation


@dataclass(frozen=True)
class ProductSettings:
    """Shapes, precision and threads."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    tokens: int  # of a microbatch
    precision: str  # bf16 or fp32
    threads: int


def run(settings: ProductSettings) -> float:
    """Return tokens per second, from the median time of the products."""
    torch.set_num_threads(settings.threads)
    keep_freed_memory()
    products = list(_products(settings))

    def compute() -> None:
        for multiply in products:
            multiply()

    return settings.tokens / statistics.median(timeit.repeat(compute, number=1, repeat=_ROUNDS))


def _products(settings: ProductSettings) -> Iterator[Callable[[], object]]:
    hidden, masked = settings.hidden, round(_MASKED * settings.tokens)
    layer = [(hidden, hidden)] * 4 + [(hidden, settings.intermediate), (settings.intermediate, hidden)]
    keys_and_values = 2
    for inputs, outputs in layer * (settings.layers - 1) + layer[:keys_and_values]:
        yield from _linear_layer(settings.tokens, inputs, outputs, settings.precision)
    for inputs, outputs in [*layer[keys_and_values:], (hidden, hidden), (hidden, settings.vocabulary)]:
        yield from _linear_layer(masked, inputs, outputs, settings.precision)


def _linear_layer(rows: int, inputs: int, outputs: int, precision: str) -> Iterator[Callable[[], object]]:
    """Yield the outputs, and the gradients of inputs and weight."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    sizes = (rows, inputs), (outputs, inputs), (rows, outputs)
    values, weight, gradient = (torch.randn(*size, dtype=dtype) for size in sizes)
    for left, right in ((values, weight), (gradient, weight.t()), (gradient.t(), values.t())):
        ways: list[Callable[[], object]] = [
            partial(torch.ops.mkldnn._linear_pointwise, left, right, None, "none", [], ""),
            partial(torch.mm, left, right.t()),
        ]
        if dtype == torch.float32 and torch.get_num_threads() == 1:
            ways.append(partial(np.dot, left.numpy(), right.t().numpy()))
        yield min(ways, key=lambda multiply: min(timeit.repeat(multiply, number=1, repeat=_TRIES)))


if __name__ == "__main__":
    print(json.dumps({"tokens_per_second": run(ProductSettings(**json.loads(sys.argv[1])))}), flush=True)
