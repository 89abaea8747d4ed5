"""Runs on the simulated GPU, as cases for a pool of ranks."""

import contextlib
import gc
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.world import World
from runs import Tree, pretrain_case
from simulated_gpu.gpu import SimulatedGpu, simulated_gpu

_WARMUP = 2  # steps; in the first ones DeepSpeed's ZeRO 3 compares the order of parameters between ranks


@dataclass
class Findings:
    """Of a run on one rank."""

    outcome: str = ""
    calls: Counter[str] = field(default_factory=Counter)  # of kernels
    mixed: list[str] = field(default_factory=list)  # operators whose inputs are on different devices
    races: list[str] = field(default_factory=list)
    waits_in_microbatches: list[str] = field(default_factory=list)  # of the host
    waits_in_steps: list[list[str]] = field(default_factory=list)  # without their microbatches
    waits_elsewhere: list[str] = field(default_factory=list)


Fault = Callable[[pytest.MonkeyPatch], None]


def gpu_case(world: World, tree: Tree, stop_after: int | None = None, fault: Fault | None = None) -> Findings:
    """`pretrain_case` on the simulated GPU. `fault`: a mistake in the code."""
    from pretrain.modeling import head

    head._is_fused_loss_usable.cache_clear()  # so that each run calls the same kernels
    gc.collect()  # engines of earlier runs, which wait for the device when they are destroyed
    with pytest.MonkeyPatch.context() as patch, simulated_gpu() as gpu:
        if fault is not None:
            fault(patch)
        with _counted_waits(gpu, Findings(calls=gpu.calls, mixed=gpu.mixed, races=gpu.races)) as findings:
            findings.outcome = pretrain_case(world, tree, stop_after)
            return findings


def evaluation_case(_world: World, checkpoint: Path, corpus: Path, on_gpu: bool) -> tuple[Any, list[str]]:
    """What `deepcloze evaluate` prints, and the operators that mix devices or memory without an order."""
    from pretrain.evaluate import evaluate_command

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if not on_gpu:
            evaluate_command(str(checkpoint), str(corpus), as_json=True)
            return json.loads(printed.getvalue()), []
        with simulated_gpu() as gpu:
            evaluate_command(str(checkpoint), str(corpus), as_json=True)
            return json.loads(printed.getvalue()), [*gpu.mixed, *gpu.races]


def other_dropout_case(_world: World) -> bool:
    """Whether a kernel is used whose backward pass drops other weights than its forward pass."""
    from pretrain.modeling import attention, varlen_attention

    with simulated_gpu(), pytest.MonkeyPatch.context() as patch:
        kernel = varlen_attention.varlen_qkv_attention

        def call(*args: Any) -> torch.Tensor:
            output, other = kernel(*args), kernel(*args)
            return output.detach() + other - other.detach()

        patch.setattr(varlen_attention, "varlen_qkv_attention", call)
        return attention._tried_varlen_kernels(torch.bfloat16, True) is not None


def varlen_kernel_case(_world: World) -> list[bool]:
    """Whether our own attention kernel is used if an evaluation is the first to ask for it."""
    from pretrain.modeling import attention

    used = []
    for context in (torch.no_grad(), torch.inference_mode()):
        with simulated_gpu(), context:
            used.append(attention._tried_varlen_kernels(torch.bfloat16, True) is not None)
    return used


def lengths_case(world: World, tree: Tree) -> list[tuple[int | None, int]]:
    """The step of each microbatch, None in an evaluation, and the length beyond which attention does not look."""
    from pretrain.engine.engine import Engine
    from pretrain.modeling import masked_lm

    steps: list[int | None] = []
    found: list[tuple[int | None, int]] = []
    accumulate, packing = Engine.accumulate, masked_lm.Packing

    def begin(engine: Engine, microbatch: Any, masked: int, step: int, number: int) -> torch.Tensor:
        steps.append(step)
        return accumulate(engine, microbatch, masked, step, number)

    def pack(segments: torch.Tensor, bounds: torch.Tensor, longest: int, *others: Any) -> Any:
        found.append((steps[-1] if torch.is_grad_enabled() else None, longest))
        return packing(segments, bounds, longest, *others)

    with pytest.MonkeyPatch.context() as patch, simulated_gpu():
        patch.setattr(Engine, "accumulate", begin)
        patch.setattr(masked_lm, "Packing", pack)
        pretrain_case(world, tree)
    return found


@contextlib.contextmanager
def _counted_waits(gpu: SimulatedGpu, findings: Findings) -> Iterator[Findings]:
    """Sort the waits of the host by where the engine is."""
    from pretrain.engine.engine import Engine

    steps = 0

    def take_waits() -> list[str]:
        taken = gpu.waits[:]
        gpu.waits.clear()
        return taken

    def recording(call: Any, record: Callable[[list[str]], object]) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            findings.waits_elsewhere.extend(take_waits())
            result = call(*args, **options)
            waits = take_waits()
            if steps >= _WARMUP:
                record(waits)
            return result

        return run

    def record_step(waits: list[str]) -> None:
        findings.waits_in_steps.append(waits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "accumulate", recording(Engine.accumulate, findings.waits_in_microbatches.extend))
        step = recording(Engine.step, record_step)

        def counted_step(*args: Any, **options: Any) -> Any:
            nonlocal steps
            result = step(*args, **options)
            steps += 1
            return result

        patch.setattr(Engine, "step", counted_step)
        yield findings
        findings.waits_elsewhere.extend(take_waits())
