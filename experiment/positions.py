"""Position limits of transformers models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def first_position(model: "nn.Module") -> int:
    """Position id of a sequence's first token: 0, or padding_idx + 1 if the position embeddings have a padding row, as
    in the RoBERTa family."""
    from torch import nn

    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def max_positions(model: "PreTrainedModel") -> int | None:
    """Length in tokens of the longest sequence the model has positions for; None if it has no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return None if limit is None or limit <= 0 else int(limit) - first_position(model)


def limit_tokenizer(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> None:
    """Let `truncation=True` cut texts at the length that the model has positions for, without which transformers fails
    on long ones."""
    if (limit := max_positions(model)) is not None:
        tokenizer.model_max_length = limit
