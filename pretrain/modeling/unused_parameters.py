"""Parameters that a masked-LM model has and does not use, such as a pooler or Longformer's global attention.

Weight decay must not shrink them: ZeRO gives every parameter a gradient, zeros if there is none.
"""

from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from transformers import PreTrainedModel

from experiment.transformers_models import quiet_transformers
from pretrain.modeling.packability import evaluation_mode, packed_inputs

_LENGTH = 8  # tokens of the forward pass


def unused_parameters(model: PreTrainedModel, packed: bool, first_position: int) -> frozenset[str]:
    """The names of the parameters from which no path of autograd leads to the logits. The model is on the CPU.

    Empty where autograd cannot tell: a function written in Python, as in Reformer's reversible layers, may use
    parameters that are not its arguments. `first_position`: position id of a sequence's first token.
    """
    ids = torch.arange(3, 3 + _LENGTH) % model.config.get_text_config().vocab_size
    inputs: dict[str, Any] = {"input_ids": ids[None], "attention_mask": torch.ones(1, _LENGTH, dtype=torch.int64)}
    if packed:
        inputs = packed_inputs(ids, (_LENGTH,), _LENGTH, first_position)
    with torch.enable_grad(), evaluation_mode(model), quiet_transformers():
        nodes = [model(**inputs).logits.grad_fn]
    seen, used = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, BackwardCFunction):
            return frozenset()
        if hasattr(node, "variable"):
            used.add(id(node.variable))
        found = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= found
        nodes += found
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) not in used)
