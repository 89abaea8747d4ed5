"""The batch size does not change predictions, for every type of transformers that has masked LMs and classifiers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from finetune.data.records import Record, Table
from finetune.device import Device, MicrobatchSize
from finetune.encoding.encoder import Tokens
from finetune.encoding.examples import Example, Padding, Split
from finetune.inference import Inference, evaluate
from finetune.kinds.classification import Config, Kind
from finetune.model_trial import adapt_to_model
from finetune.prepared_task import PreparedTask
from finetune.task_kind import find_kind
from tiny_models import tiny_fields

TYPES = [name for name in MODEL_FOR_MASKED_LM_MAPPING_NAMES if name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES]
PADDED = {"convbert", "fnet", "nystromformer", "yoso"}  # their outputs depend on padding
MASKS = {"deberta", "xmod"}  # cannot compute in bf16 on a CPU
BEGIN, END, PAD = 0, 2, 1
PROBE = Example((Tokens(torch.tensor([BEGIN, 10, END]), None),) * 2)
IDS = {"vocab_size": 100, "bos_token_id": BEGIN, "pad_token_id": PAD, "eos_token_id": END}


def make_task() -> PreparedTask:
    """Sequences of 5 to 32 tokens."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 31, (40,), generator=draw).tolist()
    texts = [torch.randint(10, 100, (length,), generator=draw) for length in lengths]
    ids = [torch.cat([torch.tensor([BEGIN]), text, torch.tensor([END])]) for text in texts]
    examples = tuple(Example((Tokens(row, None),), number % 2) for number, row in enumerate(ids))
    records = tuple(Record("f.csv", {"label": "ab"[example.target]}) for example in examples)
    made = Split(Table(Path("f.csv"), records, True), tuple((each,) for each in examples))
    kind = Kind(Config(train="f.csv", validation="f.csv"), ("a", "b"))
    return PreparedTask(kind, {"train": made, "validation": made}, Padding(PAD, "right", 0))


def head(model_type: str, name: str) -> nn.Module:
    """A tiny model with large random weights, so that what leaks from padding shows. name: of its class."""
    torch.manual_seed(3)
    fields = tiny_fields(model_type) | IDS | {"initializer_range": 0.1, "num_labels": 2}
    return getattr(transformers, name).from_config(AutoConfig.for_model(model_type, **fields))  # type: ignore[no-any-return]


def logit_differences(model: nn.Module, task: PreparedTask, batch_size: int) -> Tensor:
    """N, of the two labels."""
    found = evaluate(model, task, task.splits["validation"], MicrobatchSize(batch_size)).predictions
    return torch.tensor([row["probabilities"]["a"] for row in found]).logit()


@pytest.mark.soak
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", TYPES)
def test_the_batch_size_does_not_change_predictions(model_type: str, precision: torch.dtype | None) -> None:
    """Catches a type whose outputs depend on padding, or that cannot compute in bf16, and that is not noticed; also one
    that needlessly gets fixed padding or fp32."""
    model = head(model_type, "AutoModelForSequenceClassification")
    made = replace(make_task(), device=Device(torch.device("cpu"), precision))
    task, lines = adapt_to_model(model, made, PROBE, max_length=40)
    assert (task.padding.length is not None) == (model_type in PADDED), lines
    assert (task.device.dtype != precision) == (model_type in MASKS and precision is not None), lines
    alone, together = (logit_differences(model, task, size) for size in (1, 40))
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4 if task.device.dtype is None else 2e-2)
    assert torch.equal(alone > 0, together > 0)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["multiple_choice", "token_classification", "question_answering"])
@pytest.mark.parametrize(
    "model_type", ["albert", "bert", "deberta-v2", "electra", "fnet", "funnel", "roberta", "roformer", "xlm"]
)
def test_the_batch_size_does_not_change_outputs_of_other_heads(model_type: str, name: str) -> None:
    """Catches a type whose outputs depend on padding with one of these heads only, and that is not noticed."""
    found = find_kind(name)
    kind = found(found.config_type(train="f.csv"), ())
    made = replace(make_task(), kind=kind)
    model = head(model_type, kind.auto_model)
    train = replace(made.splits["train"], table=replace(made.splits["train"].table, labelled=False))
    sequences = 2 if name == "multiple_choice" else 1
    examples = [Example(example.sequences * sequences) for example in train.examples]
    task = replace(made, splits={"test": replace(train, examples_of=tuple((each,) for each in examples))})
    task, _ = adapt_to_model(model, task, PROBE, max_length=40)
    alone, together = (
        Inference(model, kind, task.padding, task.device, MicrobatchSize(size)).compute(examples)[0] for size in (1, 40)
    )
    for one, other, example in zip(alone, together, examples, strict=True):
        for row, padded in zip(one, other, strict=True):
            length = len(row) if name == "multiple_choice" else example.longest
            torch.testing.assert_close(row[:length], padded[:length], rtol=0, atol=1e-4)
