"""Whether a model can be packed: several sequences in one row, none of which influences another.

Tested with a forward pass: a model may use the packed attention and still mix sequences elsewhere (convolutions,
relative positions, statistics of a whole row).
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from experiment.errors import first_line
from experiment.models.model_folder import first_use
from experiment.models.transformers_models import first_position, quiet_transformers
from pretrain.modeling.attention import Packing, use_packed_attention, uses_packed_attention
from pretrain.modeling.random_model import random_model

# Of fp32 logits, relative to their standard deviation. Rounding made 3e-4 in 24 layers with random weights and outlier
# features; the least influence of another position, that of padding in Nyströmformer, was 4e-3.
_TOLERANCE = 1e-3
_WIDTH, _LENGTHS = 12, (7, 4)  # a row of two sequences and padding
_PROBE_LENGTH = 8

# Sizes on which packability does not depend, under the names that configs have for them.
_HEADS = 4
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "dim", "d_model", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "hidden_dim"), 64),
    **dict.fromkeys(("num_attention_heads", "n_heads"), _HEADS),
    **dict.fromkeys(("num_hidden_layers", "n_layers"), 2),
}
_PER_LAYER = ("layer_types", "per_layer_config", "head_dim", "attention_head_size")  # depend on these sizes


def why_not_packed(model: PreTrainedModel) -> str | None:
    """Return None if the model computes the same logits for packed sequences as with transformers' own attention for
    each one alone, else the reason.

    Switches the model to the packed attention.
    """
    if not type(model)._supports_attention_backend:
        return "its attention cannot be replaced through transformers' attention interface"
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (sum(_LENGTHS),), generator=torch.Generator().manual_seed(0))
    mask = getattr(model.config, "mask_token_id", None)
    if mask is not None and 0 <= mask < vocabulary:  # a folder may keep that of another vocabulary
        ids[:3] = mask  # ESM scales a row's embeddings by its share of masked tokens
    ids[ids == model.config.get_text_config().pad_token_id] = ids[0]  # RoBERTa gives padding no position
    try:
        with evaluation_mode(model), torch.inference_mode():
            model.set_attn_implementation("eager")  # which rounds as the packed attention does
            alone = [
                model(input_ids=part[None], attention_mask=torch.ones_like(part)[None]).logits[0]
                for part in torch.split(ids, list(_LENGTHS))
            ]
            use_packed_attention(model)
            packed = model(**packed_inputs(ids, _LENGTHS, _WIDTH, first_position(model))).logits[0, : len(ids)]
            same = same_logits(packed, torch.cat(alone))
    except Exception as error:  # of any type of model
        return f"it does not accept packed input ({first_line(error)})"
    return None if same else "packed sequences would get other logits"


def ignores_padding(model: PreTrainedModel) -> bool:
    """Return whether the logits of a sequence stay the same if padding follows, which the attention mask hides:
    convolutions (ConvBERT) and Fourier transforms (FNet) see it. Raises UserError for a model that cannot compute."""
    length, vocabulary = _LENGTHS[0], model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    padded = F.pad(ids, (0, _WIDTH - length), value=model.config.pad_token_id or 0)
    visible = F.pad(torch.ones_like(ids), (0, _WIDTH - length))
    with first_use(model), torch.inference_mode(), evaluation_mode(model), quiet_transformers():
        # Perceiver has logits for all its positions, however short the sequence is.
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :length]
        together = model(input_ids=padded, attention_mask=visible).logits[:, :length]
    # MobileBERT reads the embedding of the next token. That of a new padding token is zero until it is trained.
    return same_logits(together, alone) and not getattr(model.config, "trigram_input", False)


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switch the model to evaluation mode in the block. Afterwards all its modules have the mode that it had before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def probe(model: PreTrainedModel) -> Tensor:
    """Return the logits of a short sequence, without dropout."""
    with next(model.parameters()).device:
        ids = torch.arange(3, 3 + _PROBE_LENGTH) % model.config.get_text_config().vocab_size
        if uses_packed_attention(model):
            inputs: dict[str, Any] = packed_inputs(ids, (_PROBE_LENGTH,), _PROBE_LENGTH, first_position(model))
        else:
            inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    with evaluation_mode(model), quiet_transformers():
        logits: Tensor = model(**inputs).logits
    return logits


def same_logits(actual: Tensor, expected: Tensor) -> bool:
    """Return whether logits are equal except for rounding, which grows with their usual spread. Those of vocabulary
    rows without a token may be infinite."""
    finite = expected.isfinite()
    usual = expected[finite]
    deviation = 1.5 * (usual - usual.median()).abs().median()  # the standard deviation, if few are extreme
    deviation = deviation or usual.std()  # most are equal
    return bool(torch.where(finite, (actual - expected).abs() <= _TOLERANCE * deviation, actual == expected).all())


def packed_inputs(
    ids: Tensor, lengths: tuple[int, ...], width: int, first_position: int
) -> dict[str, Tensor | Packing]:
    """Build a row of `width` slots as in a `pretrain.batching.batch.Microbatch`: sequences, then padding."""
    free = width - sum(lengths)
    positions = torch.cat([torch.arange(length) for length in (*lengths, free)]) + first_position
    segments = torch.cat([torch.full((length,), number + 1) for number, length in enumerate(lengths)])
    boundaries = torch.cumsum(torch.tensor([0, *lengths, *([free] if free else [])]), 0)
    return {
        "input_ids": torch.cat([ids, ids.new_zeros(free)])[None],
        "position_ids": positions[None],
        "packing": Packing(torch.cat([segments, segments.new_zeros(free)])[None].int(), boundaries.int()),
    }


def is_packed(config: PreTrainedConfig) -> bool:
    """Return whether a model of this config can be packed, tested with a small model of the same kind: its own weights
    may not fit here."""
    with quiet_transformers():
        try:
            model = random_model(AutoConfig.for_model(**_small(config.to_dict())))
        except Exception:  # transformers raises many types for sizes that do not fit
            model = random_model(config)
        return why_not_packed(model.float()) is None


def _small(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a small config, also where they are configs of parts, such as a text and a vision model."""
    small = {name: _SMALL.get(name, value) for name, value in fields.items() if name not in _PER_LAYER}
    if (heads := fields.get("num_key_value_heads")) is not None:  # one per attention head, one for all, or in between
        small["num_key_value_heads"] = {1: 1, fields["num_attention_heads"]: _HEADS}.get(heads, 2)
    return {name: _small(value) if isinstance(value, dict) else value for name, value in small.items()}


def least_row_width(config: PreTrainedConfig) -> int:
    """Return the slots whose memory a padded row takes, however narrow it is: Longformer pads rows to its attention
    window, Perceiver computes on latents, as many for each row."""
    if hasattr(config, "num_latents"):
        return sys.maxsize
    window = getattr(config, "attention_window", 0)
    return max(window) if isinstance(window, list) else window
