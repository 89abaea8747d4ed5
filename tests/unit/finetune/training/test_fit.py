from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from experiment.errors import UserError
from finetune.config import TrainingConfig
from finetune.data.records import Record, Table
from finetune.device import Device, choose_device
from finetune.encoding.encoder import Tokens
from finetune.encoding.examples import Example, Padding, Split
from finetune.kinds.classification import Config, Kind
from finetune.splits import Task
from finetune.training.evaluation import Evaluation, evaluate
from finetune.training.fit import fit
from finetune.training.updater import lr_factor, parameter_groups

CPU = Device(torch.device("cpu"), None)
LABELS = ("a", "b")


class Bag(nn.Module):
    """A classifier of two labels: the mean of word vectors, dropout, a linear layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(10, 8)
        self.dropout = nn.Dropout(0.3)
        self.classifier = nn.Linear(8, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        words = self.embedding(input_ids) * attention_mask[..., None]
        mean = words.sum(1) / attention_mask.sum(1, keepdim=True)
        return SimpleNamespace(logits=self.classifier(self.dropout(mean)))


def split(count: int, seed: int, labelled: bool = True) -> Split:
    """Texts of words 1–4 (label a) or 5–9 (label b), of 1 to 6 tokens."""
    draw = np.random.default_rng(seed)
    targets = draw.integers(0, 2, count).tolist()
    ids = [torch.tensor(draw.integers(1, 5, draw.integers(1, 7)) + 4 * target) for target in targets]
    records = tuple(Record("f.csv", {"label": LABELS[target]} if labelled else {}) for target in targets)
    examples = (
        Example((Tokens(row, None),), target if labelled else None) for row, target in zip(ids, targets, strict=True)
    )
    return Split(Table(Path("f.csv"), records, labelled), tuple(examples), tuple(range(count)))


def task(weights: tuple[float, ...] | None = None, **splits: Split) -> Task:
    given = {"train": split(64, 0), "validation": split(37, 1), **splits}
    kind = Kind(Config(train="f.csv", validation="f.csv"), LABELS)
    return Task(kind, "accuracy", given, Padding(0, "right", 0), weights)


def probabilities(evaluation: Evaluation) -> Any:
    """N, of label b."""
    return np.array([prediction["probabilities"]["b"] for prediction in evaluation.predictions])


def predict(model: nn.Module, ready: Task, name: str, batch_size: int) -> Evaluation:
    return evaluate(model, ready, ready.splits[name], batch_size, CPU)


def ignore(step: int, figures: Any) -> None:
    """A log that drops its metrics."""


def test_one_seed_is_one_result() -> None:
    """Catches randomness outside the seed: order, dropout. Another seed must differ, or seeds measure no spread."""
    config = TrainingConfig(lr=0.01, epochs=2, batch_size=8)
    results = [fit(Bag(), task(), config, seed, CPU, ignore) for seed in (7, 7, 8)]
    losses = [[epoch.train_loss for epoch in fitted.epochs] for fitted in results]
    assert losses[0] == losses[1] != losses[2]
    assert results[0].evaluations["validation"].predictions == results[1].evaluations["validation"].predictions


def test_it_learns_and_predicts_in_the_order_of_the_rows() -> None:
    """Catches predictions left in the order of the length-sorted batches: the labels then fit by chance only."""
    model = Bag()
    examples = split(50, 2)
    ready = task(validation=examples, test=examples)
    fitted = fit(model, ready, TrainingConfig(lr=0.05, epochs=8, batch_size=8), 1, CPU, ignore)
    assert fitted.best.scores["accuracy"] == 1.0
    predictions = fitted.evaluations["test"].predictions
    labels = [record.values["label"] for record in examples.table.records]
    assert [prediction["label"] for prediction in predictions] == labels
    assert [sum(prediction["probabilities"].values()) for prediction in predictions] == pytest.approx([1.0] * 50)


def test_the_best_epoch_is_kept_and_the_first_of_a_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the last epoch being kept, or test being predicted with weights other than the kept ones."""
    accuracies = iter([0.5, 0.9, 0.9, 0.2])
    weights: list[torch.Tensor] = []
    model = Bag()

    def scores(*_: Any) -> dict[str, float]:
        weights.append(model.classifier.weight.detach().clone())
        return {"accuracy": next(accuracies)}

    monkeypatch.setattr(Kind, "scores", scores)
    ready = task(test=split(9, 3, labelled=False))
    fitted = fit(model, ready, TrainingConfig(lr=0.05, epochs=4, batch_size=8), 1, CPU, ignore)
    assert fitted.best.epoch == 2
    assert torch.equal(model.classifier.weight, weights[1])
    assert not torch.equal(weights[1], weights[3])
    monkeypatch.undo()
    for name in ("validation", "test"):
        assert fitted.evaluations[name].predictions == predict(model, ready, name, 8).predictions


def test_evaluation_ignores_batch_size_and_dropout() -> None:
    """Catches dropout during evaluation, and padding that leaks into predictions."""
    model = Bag()
    one, many = (predict(model, task(), "validation", batch_size) for batch_size in (1, 32))
    assert probabilities(one) == pytest.approx(probabilities(many), abs=1e-6)
    assert one.loss == pytest.approx(many.loss, abs=1e-6)


def test_a_split_without_labels_is_predicted_without_a_loss() -> None:
    """Catches a loss against labels that do not exist."""
    evaluation = predict(Bag(), task(test=split(5, 3, labelled=False)), "test", 4)
    assert len(evaluation.predictions) == 5
    assert evaluation.loss is None
    assert evaluation.scores == {}


def test_divergence_is_reported() -> None:
    """Catches NaN weights that are scored: every example then gets the first label."""
    with pytest.raises(UserError, match=r"diverged.*training\.lr below 1e\+30"):
        fit(Bag(), task(), TrainingConfig(lr=1e30, epochs=3, batch_size=8), 1, CPU, ignore)


def test_events_count_steps_and_carry_figures() -> None:
    """Catches events without the keys that console and report look for, or steps that restart in each epoch."""
    events: list[tuple[int, dict[str, Any]]] = []
    config = TrainingConfig(lr=0.01, epochs=2, batch_size=8)
    fitted = fit(Bag(), task(), config, 7, CPU, lambda step, figures: events.append((step, dict(figures))))
    steps = [step for step, figures in events if "loss" in figures]
    assert steps == list(range(1, 17))
    training_event = next(figures for _, figures in events if "loss" in figures)
    assert {"seed", "epoch", "loss", "lr", "tokens_per_second"} <= set(training_event)
    evaluations = {step: figures["eval/validation/accuracy"] for step, figures in events if "loss" not in figures}
    assert evaluations == {epoch.steps: epoch.scores["accuracy"] for epoch in fitted.epochs}
    mean = np.mean([figures["loss"] for step, figures in events if "loss" in figures and step <= 8])
    assert fitted.epochs[0].train_loss == pytest.approx(mean)


def test_learning_rate_warms_up_and_decays() -> None:
    """Catches a first step at rate 0, a peak that is not 1, and a last step at rate 0 or below."""
    factors = [lr_factor(step, 100, 0.1) for step in range(100)]
    assert 0 < factors[0] < factors[9] < 1
    assert max(factors) == factors[10] == 1.0
    assert factors[99] == pytest.approx(1 / 90)
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert lr_factor(0, 1, 0.0) == 1.0
    assert all(0 < lr_factor(step, 3, 1.0) < 1 for step in range(3))


def test_biases_and_norms_do_not_decay() -> None:
    """Catches weight decay on vectors, or a parameter that the optimizer never sees."""
    model = nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    decayed, free = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(4, 3), (2, 3)]
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the precisions of a CPU")
def test_precision_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches bf16 on a CPU that only emulates it (several times slower than fp32), and fp16 failing late."""
    for native, expected in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native})
        assert choose_device("auto").dtype is expected
    assert choose_device("fp32").dtype is None
    with pytest.raises(UserError, match="fp16 needs a CUDA device"):
        choose_device("fp16")


def test_label_weights_move_the_predictions() -> None:
    """Catches class weights that are computed and then not used in training."""
    config = TrainingConfig(lr=0.05, epochs=1, batch_size=8)
    means = [
        probabilities(fit(Bag(), made, config, 1, CPU, ignore).evaluations["validation"]).mean()
        for made in (task(), task(weights=(1.0, 50.0)))
    ]
    assert means[1] > means[0] + 0.05
