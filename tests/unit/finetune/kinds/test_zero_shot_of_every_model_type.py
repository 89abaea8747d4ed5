"""Zero-shot cloze scores of every type of transformers that has masked LMs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from finetune.data.records import Record, Table
from finetune.device import MicrobatchSize
from finetune.encoding.encoder import Tokens
from finetune.encoding.examples import Example, Padding, Split
from finetune.inference import Inference, collate
from finetune.kinds.cloze import Config, Kind, _Blank, _Masked
from finetune.model_trial import adapt_to_model
from finetune.prepared_task import PreparedTask
from runs import sampled
from tiny_models import tiny_fields

QUICK = ("bert", "mobilebert", "perceiver")  # the latter two have no module for the output layer that is called
TYPES = sampled(MODEL_FOR_MASKED_LM_MAPPING_NAMES, QUICK)
PADDED = {"convbert", "fnet", "funnel", "nystromformer", "yoso"}  # their outputs depend on padding
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
    """Catches scores of the first position, for types without an output layer module or whose forward skips it."""
    model = masked_lm(model_type)
    blanks = [blank(length) for length in (5, 32, 9)]
    kind = Kind(Config(train="f", validation="f", scoring="zero_shot"), ())
    batch = collate(kind, blanks, Padding(1, "right", 0), torch.device("cpu"))
    with torch.inference_mode():
        logits = model(**batch.inputs).logits
        expected = [row[mask].log_softmax(-1)[[11, 12]] for row, mask in zip(logits, (2, 16, 4), strict=True)]
        torch.testing.assert_close(kind.forward(model, batch), torch.stack(expected))


@pytest.mark.soak
@pytest.mark.parametrize("model_type", TYPES)
def test_the_batch_size_does_not_change_the_scores(model_type: str) -> None:
    """Catches a type whose outputs depend on padding and that is not noticed, in a task without answers."""
    model, kind = masked_lm(model_type), Kind(Config(train="f", validation="f", scoring="zero_shot"), ())
    blanks = tuple(blank(length) for length in (5, 32, 9, 17, 3, 8))
    records = tuple(Record("f.json", {}) for _ in blanks)
    split = Split(Table(Path("f.json"), records, labelled=False), tuple((each,) for each in blanks))
    task = PreparedTask(kind, {"test": split}, Padding(1, "right", 0))
    task, lines = adapt_to_model(model, task, blanks[4], max_length=40)
    assert (task.padding.length is not None) == (model_type in PADDED), lines
    alone, together = (
        Inference(model, kind, task.padding, task.device, MicrobatchSize(size)).compute(blanks)[0] for size in (1, 6)
    )
    torch.testing.assert_close(np.array(alone), np.array(together), rtol=0, atol=1e-4)
