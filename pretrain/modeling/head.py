"""The loss of a masked-LM head: from its logits, or fused with its last linear layer.

`choose_head` fuses where the logits are the output of one linear layer, which a probe of the model shows. On CUDA the
logits [M, V] are then never kept, see `pretrain.modeling.fused_cross_entropy`; on a CPU, in training, they are kept
once, see `pretrain.modeling.cpu_cross_entropy`. The fused loss is computed in place of that layer's `forward`, so that
ZeRO 3 gathers its weights as for any other layer.

Shapes: D hidden, V vocabulary, M masked positions.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiment.errors import first_line
from experiment.models.fast_linear import FastLinear
from pretrain.batching.batch import IGNORED
from pretrain.modeling import cpu_cross_entropy, fused_cross_entropy
from pretrain.modeling.packability import probe
from pretrain.modeling.structure import decoder_of

log = logging.getLogger(__name__)

_CPU_DTYPES = (torch.float32, torch.bfloat16)  # fp16 would have to be scaled before it is rounded

Head = Callable[[Tensor, bool], AbstractContextManager[None]]
"""Takes labels, int64 [M], and whether correct predictions are counted; returns a context in which the model returns
the input of `cross_entropy` for these positions."""

Losses = Callable[[nn.Linear, Tensor, Tensor], Tensor]
"""Takes a decoder, labels and the decoder's input; returns what `fused_head` documents."""


def logits_head(_labels: Tensor, _count: bool) -> AbstractContextManager[None]:
    """Return a context that changes nothing: the model returns logits."""
    return nullcontext()


@contextmanager
def fused_head(decoder: nn.Linear, labels: Tensor, count: bool, losses: Losses | None = None) -> Iterator[None]:
    """The decoder returns the summed loss in place of logits, fp32 [1]; on a GPU, without gradients also the number of
    correct predictions, fp32 [2]. To count these on a CPU, logits are kept.

    decoder: as from `find_linear_decoder`. losses: None: the function for the device.
    """
    if losses is None:
        losses = gpu_losses if labels.is_cuda else _cpu_losses
    if losses is _cpu_losses and (count or decoder.weight.dtype not in _CPU_DTYPES):
        yield
        return
    decoder.forward = partial(losses, decoder, labels)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del decoder.forward


def gpu_losses(decoder: nn.Linear, labels: Tensor, values: Tensor) -> Tensor:
    """Return fp32 [1], the summed loss; without gradients [2], also the number of correct predictions."""
    rows = values.reshape(-1, decoder.in_features)
    loss_sum, correct = fused_cross_entropy.linear_cross_entropy(rows, decoder.weight, decoder.bias, labels)
    return loss_sum[None] if correct is None else torch.stack([loss_sum, correct.float()])


def _cpu_losses(decoder: nn.Linear, labels: Tensor, values: Tensor) -> Tensor:
    rows = values.reshape(-1, decoder.in_features)
    return cpu_cross_entropy.linear_cross_entropy(rows, decoder.weight, decoder.bias, labels)[None]


def cross_entropy(output: Tensor, labels: Tensor, count: bool) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss in fp32, and with `count` the number of correct predictions. `output`: of the model in
    place of its logits, in the context of a head."""
    if output.ndim == 1:
        return output[0], output[1].long() if count else None
    logits_MV = output.reshape(-1, output.shape[-1]).float()
    loss_sum = F.cross_entropy(logits_MV, labels, ignore_index=IGNORED, reduction="sum")
    return loss_sum, (logits_MV.argmax(dim=-1) == labels).sum() if count else None


def choose_head(model: PreTrainedModel) -> Head:
    """Choose a head. `model`: on the CPU and not yet partitioned."""
    if torch.cuda.is_available() and not _is_fused_loss_usable():
        return logits_head
    return choose_fused_head(model)


def choose_fused_head(model: PreTrainedModel, losses: Losses | None = None) -> Head:
    """Return `fused_head`, or `logits_head` where that is impossible. `model`: as above, or on the meta device."""
    decoder = find_linear_decoder(model)
    return logits_head if decoder is None else partial(fused_head, decoder, losses=losses)


def find_linear_decoder(model: PreTrainedModel) -> nn.Linear | None:
    """Return the layer whose output the model returns as its logits, unchanged. None if there is none."""
    decoder = decoder_of(model)
    if decoder is None or type(decoder) not in (nn.Linear, FastLinear):
        return None
    outputs: list[tuple[Tensor, int]] = []
    hook = decoder.register_forward_hook(lambda _module, _inputs, output: outputs.append((output, output._version)))
    try:
        with torch.no_grad():
            logits = probe(model)
    except (TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError):  # it needs more than token ids
        return None
    finally:
        hook.remove()
    unchanged = len(outputs) == 1 and logits is outputs[0][0] and logits._version == outputs[0][1]
    return decoder if unchanged else None


@functools.cache
def _is_fused_loss_usable() -> bool:
    """Return whether Triton is installed and its kernel works on this rank's device; warns once if not."""
    try:
        # In fp16: 16-bit products use `addmm` with `out_dtype`, fp32 does not.
        hidden, weight = (torch.eye(2, 16, dtype=torch.float16, device="cuda", requires_grad=True) for _ in range(2))
        labels = torch.tensor([0, IGNORED], device="cuda")
        fused = fused_cross_entropy.linear_cross_entropy(hidden, weight, None, labels).loss_sum
        expected, _ = cross_entropy(F.linear(hidden, weight), labels, count=False)
        torch.testing.assert_close(fused, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (fused, expected)))
    except Exception as error:  # of a missing package, compiler or driver
        log.warning("the fused cross-entropy does not work here, so logits are kept: %s", first_line(error))
        return False
    return True
