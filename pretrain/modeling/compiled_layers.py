"""Compile the layers of the encoder with `torch.compile`.

All layers of a kind share one graph, because they are compiled one by one. Rows and width of a microbatch are symbols
in it, so that new shapes need no new graph. Evaluation runs the layers as they are. Of a last layer that computes
predicted positions only (`pretrain.modeling.last_layer`), the part before its attention is compiled.

Compiled code is kept in a cache on disk. If compiling fails it is tried once more with an empty cache, because a
process that was killed may have left a damaged file. If that fails too, the layers run as they are.
"""

import atexit
import contextlib
import logging
import os
import shutil
import stat
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch._inductor.utils import clear_caches
from torch.utils.checkpoint import checkpoint

from experiment.errors import first_line
from experiment.files import temporary_folder
from pretrain.modeling.fast_gelu import use_fast_gelu
from pretrain.modeling.fused_modules import use_fused_modules
from pretrain.modeling.last_layer import ShortForward
from pretrain.modeling.masked_lm import MaskedLanguageModel
from pretrain.modeling.structure import Forward, encoder_layers, forward_without_checkpointing

log = logging.getLogger(__name__)


def compile_layers(model: MaskedLanguageModel, cache: Path) -> set[type[nn.Module]]:
    """Compile the layers, at the first microbatch. Call before DeepSpeed adds its hooks; it has to leave the modules
    inside of a layer alone. Returns the types of the layers.

    cache: folder for compiled code, shared by runs; TORCHINDUCTOR_CACHE_DIR takes precedence.
    """
    layers = [layer for layer in encoder_layers(model.model) if layer is not model.short_layer]
    if not layers:
        log.warning("'%s' runs without torch.compile: it has no layers to compile", model.model.config.model_type)
        return set()
    use_fast_gelu(model.model)
    use_fused_modules(model.model)
    compiler = _Compiler(_open_cache(cache))
    for layer in layers:
        forward = compiler.compile(forward_without_checkpointing(layer))
        if layer.gradient_checkpointing:
            layer.gradient_checkpointing = False
            forward = partial(_checkpointed, layer, forward)
        layer.forward = forward
    if model.short_layer is not None:
        short_forward = model.short_layer.forward
        assert isinstance(short_forward, ShortForward)
        short_forward.attend = compiler.compile(short_forward.attend)
    return {type(layer) for layer in layers}


def _checkpointed(layer: nn.Module, forward: Forward, *inputs: Any, **options: Any) -> Any:
    if not layer.training:
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, **options)


class _Compiler:
    """Compiles functions, and calls them as they are once that has failed."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._inode = _inode(cache)  # of the cache that this process began with: another one may replace it
        self._trial: Path | None = None  # an empty cache, tried because compiling has failed with the usual one
        self._failed = False
        torch._dynamo.config.specialize_float = True  # variables, such as dropout, cost time in each call
        torch._inductor.config.compile_threads = 1  # no pool of processes, which could outlive this one
        torch._functorch.config.force_non_lazy_backward_lowering = True  # so that all that may fail does so in forward
        _use_cache(cache)

    def compile(self, forward: Forward) -> Forward:
        compiled = torch.compile(forward, dynamic=True, fullgraph=True)

        def run(*inputs: Any, **options: Any) -> Any:
            while not self._failed and torch.is_grad_enabled():
                try:
                    output = compiled(*inputs, **options)
                except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                    self._recover(error)
                else:
                    self._keep_trial()
                    return output
            return forward(*inputs, **options)

        return run

    def _recover(self, error: Exception) -> None:
        """Try again with an empty cache: a file in the usual one may be damaged. After that, give up."""
        torch._dynamo.reset()
        clear_caches()  # in memory: libraries that could not be loaded, since torch 2.14
        tried = self._trial is not None
        self._delete_trial()
        if not tried and not isinstance(error, FailOnRecompileLimitHit):
            with contextlib.suppress(OSError):  # a full disk
                self._trial = Path(tempfile.mkdtemp(prefix="compiling-", dir=self._cache.parent))
        self._failed = self._trial is None
        if self._failed:
            log.warning("the layers run without torch.compile, which failed: %s", first_line(error))
        _use_cache(self._trial or self._cache)  # Triton still compiles the loss

    def _keep_trial(self) -> None:
        """Put the cache with which the layers compile in the place of the damaged one, unless another process has been
        faster."""
        if self._trial is None:
            return
        if _inode(self._cache) in (self._inode, None):
            shutil.rmtree(self._cache, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._trial.rename(self._cache)
        self._delete_trial()
        self._inode = _inode(self._cache)
        _use_cache(self._cache)

    def _delete_trial(self) -> None:
        if self._trial is not None:
            shutil.rmtree(self._trial, ignore_errors=True)
            self._trial = None


def _open_cache(usual: Path) -> Path:
    """Return a folder for compiled code that this process can write: below the one that the user has set for torch, or
    the usual one, or else one among temporary files."""
    configured = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    set_by_user = configured is not None and configured not in (default_cache_dir(), str(usual))  # torch sets it too
    folder = Path(configured) / "deepcloze" if configured is not None and set_by_user else usual
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    return folder if writable else _private_folder() / "compiled"


def _private_folder() -> Path:
    """Return the folder of this user among temporary files, or else one for this process: code is loaded from it, so
    no other user may write there."""
    root = Path(tempfile.gettempdir())
    folder = root / f"deepcloze-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return folder
    process = contextlib.ExitStack()
    atexit.register(process.close)
    return process.enter_context(temporary_folder(root, "deepcloze-compiled-"))


def _inode(folder: Path) -> int | None:
    with contextlib.suppress(OSError):
        return folder.stat().st_ino
    return None


def _use_cache(folder: Path) -> None:
    """Let torch and Triton keep compiled code in a folder from now on."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
