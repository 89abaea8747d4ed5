"""Mistakes in code for GPUs that no test on CPUs finds, for tests that have to find them."""

import functools
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from pretrain.batching.batch import Microbatch
from pretrain.engine import zero_step
from pretrain.engine.engine import Engine
from pretrain.modeling import attention
from pretrain.modeling.masked_lm import MaskedLanguageModel


def swapped_query_and_key(patch: pytest.MonkeyPatch) -> None:
    attend = attention.flash_attention
    patch.setattr(attention, "flash_attention", lambda query, key, *others: attend(key, query, *others))


def swapped_key_and_value(patch: pytest.MonkeyPatch) -> None:
    attend = attention.flash_attention
    patch.setattr(attention, "flash_attention", lambda query, key, value, *others: attend(query, value, key, *others))


def short_maximum_length(patch: pytest.MonkeyPatch) -> None:
    attend = attention.flash_attention

    def shortened(query: Tensor, key: Tensor, value: Tensor, packing: attention.Packing, *others: Any) -> Tensor:
        packing.max_length = 8
        return attend(query, key, value, packing, *others)

    patch.setattr(attention, "flash_attention", shortened)


def query_in_fp32(patch: pytest.MonkeyPatch) -> None:
    attend = attention.flash_attention
    patch.setattr(
        attention,
        "flash_attention",
        lambda *inputs: attend(*(tensor.float() for tensor in inputs[:3]), *inputs[3:]),
    )


def activations_in_fp32(patch: pytest.MonkeyPatch) -> None:
    """Attention falls back to a mask."""
    attend = attention.packed_attention.__wrapped__  # type: ignore[attr-defined]

    def in_fp32(module: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> Any:
        output, _ = attend(module, query.float(), key.float(), value.float(), *others, **options)
        return output.to(query.dtype), None

    patch.setattr(attention, "packed_attention", attention.interruptible(in_fp32))


def labels_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    move = Engine._on_device

    def moved(engine: Engine, microbatch: Microbatch) -> list[Tensor]:
        fields = dict(zip(Microbatch._fields, move(engine, microbatch), strict=True))
        return list((fields | {"labels": microbatch.labels}).values())

    patch.setattr(Engine, "_on_device", moved)


def loss_read_in_a_microbatch(patch: pytest.MonkeyPatch) -> None:
    forward = MaskedLanguageModel.forward

    def reading(model: MaskedLanguageModel, *inputs: Tensor) -> Any:
        predictions = forward(model, *inputs)
        predictions.loss_sum.item()
        return predictions

    patch.setattr(MaskedLanguageModel, "forward", reading)


def gathers_that_do_not_wait(patch: pytest.MonkeyPatch) -> None:
    """For the update, at ZeRO 3."""
    patch.setattr(zero_step, "_let_gathers_wait", lambda _: None)


def copies_that_are_not_awaited(patch: pytest.MonkeyPatch) -> None:
    """Of microbatches, on a stream of their own."""
    move = Engine._on_device
    stream = functools.cache(torch.cuda.Stream)

    def moved(engine: Engine, microbatch: Microbatch) -> list[Tensor]:
        with torch.cuda.stream(stream()):
            return move(engine, microbatch)

    patch.setattr(Engine, "_on_device", moved)


def pinned_memory_used_again(patch: pytest.MonkeyPatch) -> None:
    """For the next microbatch, while this one is copied to the GPU."""
    move = Engine._on_device
    pinned = functools.cache(lambda: torch.empty(4096, dtype=torch.int64).pin_memory())

    def moved(engine: Engine, microbatch: Microbatch) -> list[Tensor]:
        ids = pinned()[: microbatch.input_ids.numel()].view(microbatch.input_ids.shape).copy_(microbatch.input_ids)
        return move(engine, microbatch._replace(input_ids=ids))

    patch.setattr(Engine, "_on_device", moved)


def checkpoint_that_is_not_awaited(patch: pytest.MonkeyPatch) -> None:
    """Its copies to the host."""
    patch.setattr(torch.cuda, "synchronize", lambda *_: None)


def gathered_on_another_stream(patch: pytest.MonkeyPatch) -> None:
    """The small weights, after the update at ZeRO 3."""
    gather = zero_step._gather

    def gathered(parameters: Any) -> None:
        with get_accelerator().stream(get_accelerator().Stream()):
            gather(parameters)

    patch.setattr(zero_step, "_gather", gathered)


def reduced_gradients_not_awaited(patch: pytest.MonkeyPatch) -> None:
    """At ZeRO 3, after each backward pass."""
    install = zero_step._let_streams_wait

    def installed(optimizer: Any) -> None:
        install(optimizer)
        optimizer.reduce_and_partition_stream.synchronize = lambda: None

    patch.setattr(zero_step, "_let_streams_wait", installed)
