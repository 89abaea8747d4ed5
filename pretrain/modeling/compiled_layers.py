"""Compile the layers of the encoder with `torch.compile`.

All layers of a kind share one graph, because they are compiled one by one. Rows and width of a microbatch are symbols
in it, so that new shapes need no new graph: a resumed run, which meets them in another order, computes with the same
kernels. Evaluation runs the layers as they are.

Compiled code is kept in a cache on disk. If a file in it is damaged the cache is deleted and the layers are compiled
again; if that fails too, the run continues without compiled code.
"""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

log = logging.getLogger(__name__)

Forward = Callable[..., Any]


def encoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The repeated layers of the encoder; empty for the few types of models that do not mark them."""
    return [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model: PreTrainedModel, cache: Path) -> set[type[nn.Module]]:
    """Compile the layers, at the first microbatch. Call before DeepSpeed adds its hooks; it has to leave the modules
    inside of a layer alone. Returns the types of the layers.

    cache: folder for compiled code, shared by runs.
    """
    compiler = _Compiler(cache)
    layers = encoder_layers(model)
    for layer in layers:
        # With activation checkpointing, a layer's forward is wrapped: what is compiled is inside of the wrapper.
        inner: Forward = getattr(type(layer).forward, "__wrapped__", type(layer).forward)
        forward = compiler.compile(MethodType(inner, layer))
        if layer.gradient_checkpointing:
            layer.gradient_checkpointing = False
            forward = partial(_checkpointed, layer, forward)
        layer.forward = forward
    return {type(layer) for layer in layers}


def _checkpointed(layer: nn.Module, forward: Forward, *inputs: Any, **options: Any) -> Any:
    if not layer.training:
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, **options)


class _Compiler:
    """Compiles functions, and calls them as they are once compiling has failed twice."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._failures = 0
        use_cache(cache)
        torch._inductor.config.compile_threads = 1  # no pool of processes, which could outlive this one
        torch._functorch.config.force_non_lazy_backward_lowering = True  # so that all that may fail does so in forward

    def compile(self, forward: Forward) -> Forward:
        compiled = torch.compile(forward, dynamic=True, fullgraph=True)

        def run(*inputs: Any, **options: Any) -> Any:
            while self._failures < 2 and torch.is_grad_enabled():
                try:
                    return compiled(*inputs, **options)
                except TorchDynamoException as error:
                    self._recover(error)
            return forward(*inputs, **options)

        return run

    def _recover(self, error: TorchDynamoException) -> None:
        """After the first failure compile again with an empty cache, of this process alone."""
        self._failures += 1
        torch._dynamo.reset()
        if self._failures == 1:
            _delete(self._cache)
            use_cache(Path(tempfile.mkdtemp(prefix="deepcloze-compiled-")))
            return
        log.warning("the layers run without torch.compile, which failed: %s", str(error).strip().partition("\n")[0])


def use_cache(folder: Path) -> None:
    """Where torch keeps compiled code."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def _delete(folder: Path) -> None:
    """Other processes may be reading or writing there."""
    with contextlib.suppress(OSError):
        damaged = Path(tempfile.mkdtemp(prefix="damaged-", dir=folder.parent))
        folder.rename(damaged / folder.name)
        shutil.rmtree(damaged, ignore_errors=True)
