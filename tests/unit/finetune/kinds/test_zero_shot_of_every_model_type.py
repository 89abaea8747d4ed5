"""Zero-shot cloze scores of every type of transformers that has masked LMs."""

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModelForMaskedLM

from finetune.encoding.encoder import Tokens
from finetune.encoding.examples import Example, Padding, collate
from finetune.kinds.cloze import Config, Kind, _Blank, _Masked
from tiny_models import tiny_fields

QUICK = ("bert", "mobilebert", "perceiver")  # the latter two have no module for the output layer that is called
TYPES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.soak)
    for name, config in CONFIG_MAPPING.items()
    if config in MODEL_FOR_MASKED_LM_MAPPING
]
IDS = {"vocab_size": 100, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
MASK = 3


def masked_lm(model_type: str) -> nn.Module:
    """A tiny one, with large random weights, so that its scores differ."""
    torch.manual_seed(0)
    fields = tiny_fields(model_type) | IDS | {"initializer_range": 0.1}
    if "text_config" in fields:
        fields["text_config"] |= {**IDS, "cls_token_id": 0, "sep_token_id": 2}
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **fields)).eval()  # type: ignore[no-any-return]


def blank(length: int) -> Example:
    """A sequence with a mask in its middle, for which there are two options: the tokens 11 and 12."""
    ids = torch.randint(10, 100, (length,))
    ids[0], ids[-1], ids[length // 2] = 0, 2, MASK
    return Example((Tokens(ids, None),), None, _Blank(0, (1, 1), (_Masked(length // 2, {0: 11, 1: 12}),)))


@pytest.mark.parametrize("model_type", TYPES)
def test_the_scores_are_those_at_the_mask(model_type: str) -> None:
    """Catches scores of the first position, for a type whose output layer is no module of its own or is not called."""
    model = masked_lm(model_type)
    blanks = [blank(length) for length in (5, 32, 9)]
    kind = Kind(Config(train="f", validation="f", scoring="zero_shot"), ())
    batch = collate(kind, blanks, Padding(1, "right", 0), torch.device("cpu"))
    with torch.inference_mode():
        logits = model(**batch.inputs).logits
        expected = [row[mask].log_softmax(-1)[[11, 12]] for row, mask in zip(logits, (2, 16, 4), strict=True)]
        torch.testing.assert_close(kind.forward(model, batch), torch.stack(expected))
