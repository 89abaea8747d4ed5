"""One vector for a text from the hidden states of its tokens."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from experiment.errors import UserError
from experiment.files import read_json

Pooling = Literal["mean", "cls"]
"""The mean over all tokens, special ones included; or the first token, such as [CLS]."""


def declared_pooling(folder: Path) -> Pooling | None:
    """Return the pooling of a sentence-transformers model. None if it names none. Raises UserError if its vectors are
    made in another way, or if its config is damaged."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    try:
        config = dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if (declared := config.get("pooling_mode")) is None:  # as earlier versions write it, and we: pooling_mode_cls_token
        flag = "pooling_mode_"
        declared = [key.removeprefix(flag) for key, value in config.items() if key.startswith(flag) and value]
    modes = declared if isinstance(declared, list) else [declared]
    found = {str(mode).removesuffix("_tokens").removesuffix("_token") for mode in modes}
    others = {layer.name for layer in folder.glob("[2-9]_*") if not layer.name.endswith(("_Normalize", "_Dropout"))}
    others |= found if len(found) > 1 else found.difference(get_args(Pooling))
    if others:
        raise UserError(
            f"{folder} makes vectors by {', '.join(sorted(others))}, which is not supported; set task.pooling to mean "
            "or cls to train its encoder alone"
        )
    return next((mode for mode in get_args(Pooling) if mode in found), None)


def hidden_states(encoder: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the last hidden states STD of an encoder without its head. Raises UserError if it has none for each token:
    Funnel's shortens sequences, Perceiver's takes no token ids, T5's needs some for its decoder."""
    try:
        hidden_STD: Tensor = encoder(**inputs).last_hidden_state
        fits = hidden_STD.shape[:2] == inputs["attention_mask"].shape
    except (TypeError, ValueError):  # other arguments, such as those of a decoder
        fits = False
    if not fits:
        raise UserError("the model has no hidden state for each token, of which vectors are made")
    return hidden_STD


def pool(hidden_STD: Tensor, mask_ST: Tensor, pooling: Pooling) -> Tensor:
    """Return the vectors SD of S texts, in fp32. mask_ST: 0 for padding, which may be on either side."""
    if pooling == "cls":
        return hidden_STD[torch.arange(len(mask_ST), device=mask_ST.device), mask_ST.argmax(dim=1)].float()
    mask_ST1 = mask_ST.unsqueeze(-1).float()
    return (hidden_STD.float() * mask_ST1).sum(dim=1) / mask_ST1.sum(dim=1)
