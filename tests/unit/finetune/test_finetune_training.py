import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from experiment.errors import UserError
from finetune import training
from finetune.config import TrainingConfig
from finetune.data import Task
from finetune.device import Device, choose_device
from finetune.tasks.examples import Examples
from finetune.tasks.kinds import KINDS
from finetune.tasks.rows import TaskTable
from finetune.training import fit, lr_factor, parameter_groups, predict

CPU = Device(torch.device("cpu"), None)


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


def split(count: int, seed: int, labelled: bool = True) -> Examples:
    """Texts of words 1–4 (label 0) or 5–9 (label 1), of 1 to 6 tokens."""
    draw = np.random.default_rng(seed)
    targets = draw.integers(0, 2, count)
    ids = [torch.tensor(draw.integers(1, 5, draw.integers(1, 7)) + 4 * target) for target in targets]
    table = TaskTable(Path("f.csv"), (), labelled)
    return Examples(table, tuple(ids), None, tuple(targets.tolist()) if labelled else None, truncated=0)


def task(**splits: Examples) -> Task:
    given = {"train": split(64, 0), "validation": split(37, 1), **splits}
    return Task(KINDS["classification"], "accuracy", given, None, pad_token_id=0)


def ignore(step: int, figures: Any) -> None:
    """A log that drops its metrics."""


def test_one_seed_is_one_result() -> None:
    """Catches randomness outside the seed: order, dropout. Another seed must differ, or seeds measure no spread."""
    config = TrainingConfig(lr=0.01, epochs=2, batch_size=8)
    results = [fit(Bag(), task(), config, seed, CPU, ignore) for seed in (7, 7, 8)]
    losses = [[epoch.train_loss for epoch in fitted.epochs] for fitted in results]
    assert losses[0] == losses[1] != losses[2]
    assert np.array_equal(results[0].probabilities["validation"], results[1].probabilities["validation"])


def test_it_learns_and_predicts_in_the_order_of_the_rows() -> None:
    """Catches predictions left in the order of the length-sorted batches: the labels then fit by chance only."""
    model = Bag()
    examples = split(50, 2)
    ready = task(validation=examples, test=examples)
    fitted = fit(model, ready, TrainingConfig(lr=0.05, epochs=8, batch_size=8), 1, CPU, ignore)
    assert fitted.best.scores["accuracy"] == 1.0
    targets = np.array(examples.targets)
    assert np.array_equal(fitted.probabilities["test"].argmax(axis=1), targets)
    assert fitted.probabilities["test"].sum(axis=1) == pytest.approx(np.ones(50))


def test_the_best_epoch_is_kept_and_the_first_of_a_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the last epoch being kept, or test being predicted with weights other than the kept ones."""
    accuracies = iter([0.5, 0.9, 0.9, 0.2])
    weights: list[torch.Tensor] = []
    model = Bag()

    def score(*_: Any) -> dict[str, float]:
        weights.append(model.classifier.weight.detach().clone())
        return {"accuracy": next(accuracies)}

    monkeypatch.setattr(training, "score", score)
    ready = task(test=split(9, 3))
    fitted = fit(model, ready, TrainingConfig(lr=0.05, epochs=4, batch_size=8), 1, CPU, ignore)
    assert fitted.best.epoch == 2
    assert torch.equal(model.classifier.weight, weights[1])
    assert not torch.equal(weights[1], weights[3])
    for name in ("validation", "test"):
        assert np.array_equal(fitted.probabilities[name], predict(model, ready, name, 8, CPU)[0])


def test_evaluation_ignores_batch_size_and_dropout() -> None:
    """Catches dropout during evaluation, and padding that leaks into predictions."""
    model = Bag()
    one, loss_one = predict(model, task(), "validation", 1, CPU)
    many, loss_many = predict(model, task(), "validation", 32, CPU)
    assert one == pytest.approx(many, abs=1e-6)
    assert loss_one == pytest.approx(loss_many, abs=1e-6)


def test_a_split_without_labels_is_predicted_without_a_loss() -> None:
    """Catches a loss against labels that do not exist."""
    probabilities, loss = predict(Bag(), task(test=split(5, 3, labelled=False)), "test", 4, CPU)
    assert probabilities.shape == (5, 2)
    assert math.isnan(loss)


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
    plain = task()
    weighted = Task(plain.kind, plain.metric, plain.splits, (1.0, 50.0), plain.pad_token_id)
    config = TrainingConfig(lr=0.05, epochs=1, batch_size=8)
    means = [
        fit(Bag(), made, config, 1, CPU, ignore).probabilities["validation"][:, 1].mean() for made in (plain, weighted)
    ]
    assert means[1] > means[0] + 0.05
