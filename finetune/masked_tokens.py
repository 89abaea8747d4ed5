"""Masked tokens: their scores, and advice for masks and blanks that are written in other characters."""

import threading
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

_HOOKED = threading.Lock()  # one thread at a time: a hook applies to all threads that compute the model
_BRACKETS = str.maketrans("【】", "[]")  # typed with the keys [ and ] in Chinese input methods


def masked_logits(
    model: nn.Module, inputs: Mapping[str, Tensor], sequences: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """Compute MV scores of the vocabulary at M positions, given by sequence and place in it, counted without padding.

    Only these positions reach the output layer, which would otherwise take most of time and memory. Some models,
    such as MobileBERT and Perceiver, do not call an output layer: all positions are computed.
    """
    mask = inputs["attention_mask"]
    rows = torch.tensor(sequences, device=mask.device)
    columns = torch.tensor(positions, device=mask.device) + mask.argmax(dim=1)[rows]  # behind padding of the left side

    selected = False

    def select(_: nn.Module, values: tuple[Tensor]) -> tuple[Tensor]:
        nonlocal selected
        selected = True
        return (values[0][rows, columns][:, None],)

    output_layer = model.get_output_embeddings()  # type: ignore[operator]
    with _HOOKED, nullcontext() if output_layer is None else output_layer.register_forward_pre_hook(select):
        logits: Tensor = model(**inputs).logits
    return (logits[:, 0] if selected else logits[rows, columns]).float()


def full_width_advice(mark: str, text: str) -> str:
    """Return advice for a text whose marks may have full-width characters, as Chinese input methods write them."""
    ascii_text = unicodedata.normalize("NFKC", text).translate(_BRACKETS)
    found = ascii_text.count(mark) - text.count(mark)
    return f"; it has {found} in full-width characters: write '{mark}' in ASCII" if found > 0 else ""
