"""The encoder's last layer, computed for predicted positions only: the head needs no others.

After attention, a layer computes each position on its own. So the last layer runs twice: with all positions until it
has computed its attention, and then with the predicted ones, for which attention returns the results of the first run.
That needs no code per architecture. The second run computes queries, keys and values that are not used, for 15 % of the
positions and without a backward pass.

This is wrong for a layer with dropout before its attention whose result is also added after it: the two runs would draw
two masks. None of transformers' layers is like that.

Shapes: B rows, W slots, M predicted positions.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from experiment.errors import first_line
from experiment.models.transformers_models import first_position
from pretrain.modeling.attention import LayerInterrupted, Packing, PrecomputedAttention, Predicted
from pretrain.modeling.packability import evaluation_mode, same_logits
from pretrain.modeling.structure import Forward, encoder_layers, forward_without_checkpointing

log = logging.getLogger(__name__)

# Two sequences and padding, twice: with two rows, a layer with one input per row, or one for all rows, is detected.
_SEGMENTS = (1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0)
_POSITIONS = (0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 0)
_BOUNDS = (0, 7, 11, 12, 19, 23, 24)
_PREDICTED = (1, 5, 9, 14)
_COLUMNS = ((1, 5, 9), (2, 0, 0))  # of the predicted slots, by row


def shorten_last_layer(model: PreTrainedModel) -> GradientCheckpointingLayer | None:
    """Let the last layer return predicted positions only, [1, M, hidden], where its `Packing` has some (`predicted`).

    Returns the layer. Leaves the model as it is, and returns None, if the logits would differ, or if there are no
    `encoder_layers`. On the meta device, where there are no values, only shapes are compared.

    model: in fp32, with the packed attention; not yet partitioned.
    """
    layers = encoder_layers(model)
    if not layers:
        return None
    layer = layers[-1]
    layer.forward = ShortForward(layer)
    reason = _why_not_short(model, layer)
    if reason is not None:
        log.info("the last layer of '%s' computes all positions: %s", model.config.model_type, reason)
        del layer.forward
        return None
    return layer


class ShortForward:
    """Takes the place of a layer's `forward`."""

    attend: Callable[..., Tensor]  # the first run: arguments of the layer to the output of its attention, [1, M, H, D]

    def __init__(self, layer: GradientCheckpointingLayer) -> None:
        self._layer = layer
        self._forward = forward_without_checkpointing(layer)
        self.attend = partial(_attend, self._forward)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        packing = options.get("packing")
        forward = self._forward
        if isinstance(packing, Packing) and packing.predicted is not None:
            forward = partial(self._run_twice, packing.predicted.positions)
        if self._layer.gradient_checkpointing and self._layer.training:
            return self._layer._gradient_checkpointing_func(partial(forward, **options), *inputs)
        return forward(*inputs, **options)

    def _run_twice(self, positions: Tensor, hidden_BWD: Tensor, *inputs: Any, packing: Packing, **options: Any) -> Any:
        precomputed = PrecomputedAttention(self.attend(hidden_BWD, *inputs, packing=packing.interrupting(), **options))
        select = partial(_select, slots=hidden_BWD.shape[:2], positions=positions)
        hidden_1MD, inputs, options = tree_map_only(Tensor, select, (hidden_BWD, inputs, options))
        return self._forward(hidden_1MD, *inputs, packing=precomputed, **options)


def _attend(forward: Forward, *inputs: Any, **options: Any) -> Tensor:
    try:
        forward(*inputs, **options)
    except LayerInterrupted as interrupted:
        output: Tensor = interrupted.args[0]  # torch.compile does not support other attributes
        return output
    raise RuntimeError("it does not use the packed attention")


def _select(tensor: Tensor, slots: torch.Size, positions: Tensor) -> Tensor:
    """Select [1, M, …] of a tensor [B, W, …], such as one with rotary positions. Others, which have other first sizes,
    are returned as they are."""
    return tensor.flatten(0, 1)[positions][None] if tensor.shape[:2] == slots else tensor


@torch.no_grad()
def _why_not_short(model: PreTrainedModel, layer: GradientCheckpointingLayer) -> str | None:
    """Return None if the logits of predicted slots are the same as without `_run_twice`, else the reason."""
    runs: list[None] = []  # of the layer, which some models (ALBERT) have in place of others too
    hook = layer.register_forward_hook(lambda *_: runs.append(None))
    try:
        with next(model.parameters()).device:
            ids = torch.arange(1, 25).view(2, 12) % model.config.get_text_config().vocab_size
            positions = torch.tensor((_POSITIONS,) * 2) + first_position(model)
            packing = Packing(torch.tensor((_SEGMENTS,) * 2, dtype=torch.int32), torch.tensor(_BOUNDS).int())
            predicted = Predicted(torch.tensor(_PREDICTED), torch.tensor(_COLUMNS), torch.arange(len(_PREDICTED)))
        with evaluation_mode(model):
            logits = model(input_ids=ids, position_ids=positions, packing=packing).logits
            expected = logits.flatten(0, 1)[predicted.positions]
            packing.predicted = predicted
            actual = model(input_ids=ids, position_ids=positions, packing=packing).logits[0]
    except Exception as error:  # of any type of model
        return first_line(error)
    finally:
        hook.remove()
    if len(runs) != 2:
        return f"it runs {len(runs) / 2:g} times"
    if actual.shape != expected.shape:
        return f"its logits have the shape {list(actual.shape)}"
    return None if expected.is_meta or same_logits(actual, expected) else "its logits would differ"
