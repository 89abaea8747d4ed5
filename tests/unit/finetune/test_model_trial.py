from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DebertaConfig, DebertaForSequenceClassification

from finetune.data.records import Record, Table
from finetune.device import Device
from finetune.encoding.encoder import Tokens
from finetune.encoding.examples import Example, Padding, Split
from finetune.inference import collate
from finetune.kinds.classification import Config, Kind
from finetune.kinds.regression import Config as RegressionConfig
from finetune.kinds.regression import Kind as Regression
from finetune.model_trial import adapt_to_model
from finetune.prepared_task import PreparedTask

PROBE = Example((Tokens(torch.arange(3, 6), None),) * 2)
FP32 = Device(torch.device("cpu"), None)
BF16 = Device(torch.device("cpu"), torch.bfloat16)


def make_task(side: str = "right") -> PreparedTask:
    """Texts of 2 to 9 tokens."""
    torch.manual_seed(0)
    examples = tuple(Example((Tokens(torch.randint(3, 20, (length,)), None),), length % 2) for length in range(2, 10))
    records = tuple(Record("f.csv", {"label": "ab"[example.target]}) for example in examples)
    train = Split(Table(Path("f.csv"), records, True), tuple((each,) for each in examples))
    kind = Kind(Config(train="f.csv", validation="f.csv"), ("a", "b"))
    return PreparedTask(kind, {"train": train, "validation": train}, Padding(0, side, 0))


class Model(nn.Module):
    """Classifies by the mean of word vectors, padding included or not."""

    config = SimpleNamespace(model_type="mean")

    def __init__(self, uses_mask: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head, self.uses_mask = nn.Embedding(20, 8), nn.Linear(8, 2), uses_mask

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        mask = attention_mask if self.uses_mask else torch.ones_like(attention_mask)
        mean = (self.words(input_ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return SimpleNamespace(logits=self.head(mean))


@pytest.mark.parametrize("side", ["left", "right"])
def test_models_that_see_padding_get_fixed_padding(side: str) -> None:
    """Catches predictions that change with the batch size, and padding to a length that varies."""
    made = make_task(side)
    task, lines = adapt_to_model(Model(uses_mask=False), made, PROBE, max_length=16)
    assert lines == ["mean: its outputs depend on padding, so all sequences are padded to 16 tokens"]
    assert task.device == FP32
    for examples in (made.splits["train"].examples[:1], made.splits["train"].examples):
        inputs = collate(task.kind, examples, task.padding, FP32.torch_device).inputs
        assert inputs["input_ids"].shape[1] == inputs["attention_mask"].shape[1] == 16
        kept = inputs["input_ids"][0, -2:] if side == "left" else inputs["input_ids"][0, :2]
        assert torch.equal(kept, examples[0].sequences[0].input_ids)
        assert inputs["attention_mask"][0].sum() == 2


def test_padding_shows_in_outputs_whatever_the_loss_is() -> None:
    """Catches a difference that is small next to the loss of large numbers, and texts without targets."""
    made = make_task()
    train = made.splits["train"]
    for targets in (1e6, None):
        examples = tuple(replace(example, target=targets) for example in train.examples)
        of_records = tuple((each,) for each in examples)
        splits = {
            "train": replace(train, examples_of=of_records, table=replace(train.table, labelled=targets is not None))
        }
        task = replace(made, kind=Regression(RegressionConfig(train="f.csv"), ()), splits=splits)
        _, lines = adapt_to_model(Model(uses_mask=False), task, PROBE, max_length=16)
        assert lines == ["mean: its outputs depend on padding, so all sequences are padded to 16 tokens"]
        assert adapt_to_model(Model(uses_mask=True), task, PROBE, max_length=16)[1] == []


@pytest.mark.parametrize("length", [5, 16])
def test_padding_shows_in_texts_of_the_same_length(length: int) -> None:
    """Catches a check that compares examples that are not padded, such as texts of one length, or all cut."""
    made = make_task()
    train = made.splits["train"]
    examples = tuple(Example((Tokens(torch.randint(3, 20, (length,)), None),), number % 2) for number in range(8))
    task = replace(made, splits={"train": replace(train, examples_of=tuple((each,) for each in examples))})
    assert adapt_to_model(Model(uses_mask=False), task, PROBE, max_length=16)[0].padding.length == 16
    assert adapt_to_model(Model(uses_mask=True), task, PROBE, max_length=16)[0].padding.length is None


def test_models_that_ignore_padding_keep_dynamic_padding() -> None:
    """Catches fixed padding, which is slow, for models that do not need it."""
    made = replace(make_task(), device=BF16)
    assert adapt_to_model(Model(uses_mask=True), made, PROBE, max_length=16) == (made, [])


def test_a_device_that_fails_is_not_taken_for_a_missing_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run in fp32 after an error of the GPU, whose next computation fails with another message."""

    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device")

    made = replace(make_task(), device=BF16)
    monkeypatch.setattr(Kind, "loss", fail)
    with pytest.raises(torch.AcceleratorError, match="no kernel image"):
        adapt_to_model(Model(uses_mask=True), made, PROBE, max_length=16)


def test_a_model_without_autocast_is_trained_in_fp32() -> None:
    """Catches the traceback of DeBERTa (v1) in bf16: it fills a mask with the minimum of another type."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = DebertaConfig(vocab_size=20, relative_attention=True, pos_att_type=["p2c", "c2p"], **sizes)
    model = DebertaForSequenceClassification(config)
    task, lines = adapt_to_model(model, replace(make_task(), device=BF16), PROBE, max_length=16)
    assert task.device == FP32
    assert lines == ["deberta cannot compute in bf16 on cpu; fp32 is used"]
    assert adapt_to_model(model, make_task(), PROBE, max_length=16)[1] == []
