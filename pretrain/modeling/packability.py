"""Whether a model can be packed: several sequences in one row, none of which influences another.

Tested with a forward pass: a model may use the packed attention and still mix sequences elsewhere (convolutions,
relative positions, statistics of a whole row).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pretrain.modeling.attention import PACKED, Packing, register_packed_attention
from pretrain.modeling.random_model import first_line

_TOLERANCE = 1e-4  # absolute and relative, on fp32 logits
_WIDTH, _LENGTHS = 12, (7, 4)  # a row of two sequences and padding


def why_not_packed(model: PreTrainedModel, first_position: int) -> str | None:
    """None if the model computes the same logits for packed sequences as for each one alone, else the reason.

    Switches the model to the packed attention. `first_position`: position id of a sequence's first token.
    """
    if not type(model)._supports_attention_backend:
        return "its attention cannot be replaced through transformers' attention interface"
    register_packed_attention()
    model.set_attn_implementation(PACKED)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (sum(_LENGTHS),), generator=torch.Generator().manual_seed(0))
    if getattr(model.config, "mask_token_id", None) is not None:
        ids[:3] = model.config.mask_token_id  # ESM scales a row's embeddings by its share of masked tokens
    try:
        with evaluation_mode(model):
            same = _same_logits(model, ids, first_position)
    except (TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        return f"it does not accept packed input ({first_line(error)})"
    return None if same else "packed sequences would influence each other"


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switch the model to evaluation mode in the block. Afterwards all its modules have the mode that it had before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.inference_mode()
def _same_logits(model: PreTrainedModel, ids: Tensor, first_position: int) -> bool:
    packed = model(**packed_inputs(ids, _LENGTHS, _WIDTH, first_position)).logits[0]
    start = 0
    for length in _LENGTHS:
        end = start + length
        alone = model(**packed_inputs(ids[start:end], (length,), length, first_position)).logits[0]
        if not torch.allclose(alone, packed[start:end], atol=_TOLERANCE, rtol=_TOLERANCE):
            return False
        start = end
    return True


def packed_inputs(
    ids: Tensor, lengths: tuple[int, ...], width: int, first_position: int
) -> dict[str, Tensor | Packing]:
    """One row of `width` slots as in a `pretrain.batching.batch.Microbatch`: sequences, then padding."""
    free = width - sum(lengths)
    positions = torch.cat([torch.arange(length) for length in (*lengths, free)]) + first_position
    segments = torch.cat([torch.full((length,), number + 1) for number, length in enumerate(lengths)])
    boundaries = torch.cumsum(torch.tensor([0, *lengths, *([free] if free else [])]), 0)
    return {
        "input_ids": torch.cat([ids, ids.new_zeros(free)])[None],
        "position_ids": positions[None],
        "packing": Packing(torch.cat([segments, segments.new_zeros(free)])[None].int(), boundaries.int()),
    }
