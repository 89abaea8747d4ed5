"""The encoder's last layer, computed for predicted positions only: the head needs no others.

After attention, a layer computes each position on its own. So the last layer runs twice: with all positions until it
has computed its attention, and then with the predicted ones, for which attention returns what the first run computed.
That needs no code per architecture. The second run computes queries, keys and values that are not used, for 15 % of the
positions and without a backward pass.

Shapes: B rows, W slots, M predicted positions.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from experiment.positions import first_position
from pretrain.modeling.attention import AttentionOutput, AttentionReached, Packing, Predicted
from pretrain.modeling.encoder_layers import Forward, encoder_layers, forward_without_checkpointing
from pretrain.modeling.packability import packed_inputs

_TOLERANCE = 1e-4  # absolute and relative, on fp32 logits
_WIDTH, _LENGTHS = 12, (7, 4)  # of a row, and of the sequences in it
_PREDICTED = (1, 5, 9)


def shorten_last_layer(model: PreTrainedModel) -> bool:
    """Let the last layer return [1, M, hidden], of the slots that its `Packing` names in `predicted`, if it does.

    Returns False, and leaves the model as it is, if the logits would differ or its layers are not marked. On the meta
    device, where there are no values, only shapes are compared.

    model: uses the packed attention; not yet partitioned.
    """
    layers = encoder_layers(model)
    if not layers:
        return False
    layer = layers[-1]
    layer.forward = partial(_forward, layer, forward_without_checkpointing(layer))
    if not _computes_same_logits(model, layer):
        del layer.forward
        return False
    return True


def _forward(layer: GradientCheckpointingLayer, forward: Forward, *inputs: Any, **options: Any) -> Any:
    packing = options.get("packing")
    if isinstance(packing, Packing) and packing.predicted is not None:
        forward = partial(_run_twice, forward, packing.predicted.positions)
    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(partial(forward, **options), *inputs)
    return forward(*inputs, **options)


def _run_twice(
    forward: Forward, positions: Tensor, hidden_BWD: Tensor, *inputs: Any, packing: Packing, **options: Any
) -> Any:
    try:
        forward(hidden_BWD, *inputs, packing=packing.until_attention(), **options)
    except AttentionReached as reached:
        output = AttentionOutput(reached.output)
    else:
        raise RuntimeError("the layer does not use the packed attention")
    select = partial(_select, slots=hidden_BWD.shape[:2], positions=positions)
    hidden_1MD, inputs, options = tree_map_only(Tensor, select, (hidden_BWD, inputs, options))
    return forward(hidden_1MD, *inputs, packing=output, **options)


def _select(tensor: Tensor, slots: torch.Size, positions: Tensor) -> Tensor:
    """[1, M, …] of a tensor [B, W, …], such as one with rotary positions. Others are returned as they are."""
    return tensor.flatten(0, 1)[positions][None] if tensor.shape[:2] == slots else tensor


@torch.no_grad()
def _computes_same_logits(model: PreTrainedModel, layer: GradientCheckpointingLayer) -> bool:
    runs: list[None] = []  # of the layer, which some models (ALBERT) have in place of others too
    hook = layer.register_forward_hook(lambda *_: runs.append(None))
    training = model.training
    model.eval()
    try:
        with next(model.parameters()).device:
            inputs = packed_inputs(torch.arange(1, 1 + sum(_LENGTHS)), _LENGTHS, _WIDTH, first_position(model))
            positions = torch.tensor(_PREDICTED)
        expected = model(**inputs).logits[0, positions]
        packing = inputs["packing"]
        assert isinstance(packing, Packing)
        packing.predicted = Predicted(positions, columns=positions[None], entries=torch.arange(len(positions)))
        found = model(**inputs).logits[0]
    except (TypeError, ValueError, AttributeError, RuntimeError, AssertionError, IndexError):
        return False
    finally:
        hook.remove()
        model.train(training)
    if len(runs) != 2 or found.shape != expected.shape:
        return False
    return expected.is_meta or torch.allclose(found, expected, atol=_TOLERANCE, rtol=_TOLERANCE)
