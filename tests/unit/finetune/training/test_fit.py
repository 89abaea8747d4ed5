import signal
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from experiment.errors import StoppedError, UserError
from finetune.config import TrainingConfig
from finetune.data.records import Record, Table
from finetune.device import MicrobatchSize, choose_device
from finetune.encoding.encoder import Tokens
from finetune.encoding.examples import Example, Padding, Split
from finetune.inference import Evaluation, evaluate
from finetune.kinds.classification import Config, Kind
from finetune.prepared_task import PreparedTask
from finetune.task_kind import LossOptions
from finetune.training import fit as fit_module
from finetune.training.fit import DivergedError, Fitted, StateFile, evaluate_untrained, fit
from finetune.training.updater import Updater, lr_factor, parameter_groups

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
    return Split(Table(Path("f.csv"), records, labelled), tuple((each,) for each in examples))


def task(weights: tuple[float, ...] | None = None, **splits: Split) -> PreparedTask:
    given = {"train": split(64, 0), "validation": split(37, 1), **splits}
    kind = Kind(Config(train="f.csv", validation="f.csv"), LABELS)
    options = LossOptions(None if weights is None else torch.tensor(weights))
    return PreparedTask(kind, given, Padding(0, "right", 0), options)


def probabilities(evaluation: Evaluation) -> Any:
    """N, of label b."""
    return np.array([prediction["probabilities"]["b"] for prediction in evaluation.predictions])


def predict(model: nn.Module, ready: PreparedTask, name: str, batch_size: int) -> Evaluation:
    return evaluate(model, ready, ready.splits[name], MicrobatchSize(batch_size))


def ignore(step: int, figures: Any) -> None:
    """A log that drops its metrics."""


def test_one_seed_is_one_result() -> None:
    """Catches randomness outside the seed: order, dropout. Another seed must differ, or seeds measure no spread."""
    config = TrainingConfig(lr=0.01, epochs=2, batch_size=8)
    results = [fit(Bag(), task(), config, seed, ignore) for seed in (7, 7, 8)]
    losses = [[epoch.train_loss for epoch in fitted.epochs] for fitted in results]
    assert losses[0] == losses[1] != losses[2]
    assert results[0].evaluations["validation"].predictions == results[1].evaluations["validation"].predictions


def test_it_learns_and_predicts_in_the_order_of_the_rows() -> None:
    """Catches predictions left in the order of the length-sorted batches: the labels then fit by chance only."""
    model = Bag()
    examples = split(50, 2)
    ready = task(validation=examples, test=examples)
    fitted = fit(model, ready, TrainingConfig(lr=0.05, epochs=8, batch_size=8), 1, ignore)
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
    fitted = fit(model, ready, TrainingConfig(lr=0.05, epochs=4, batch_size=8), 1, ignore)
    assert fitted.best.epoch == 2
    assert torch.equal(model.classifier.weight, weights[1])
    assert not torch.equal(weights[1], weights[3])
    monkeypatch.undo()
    for name in ("validation", "test"):
        assert fitted.evaluations[name].predictions == predict(model, ready, name, 32).predictions


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
    """Catches NaN weights that are scored: every example then gets the first label. Also NaN weights that are trained
    until the next evaluation, which may take hours."""
    events: list[Any] = []
    with pytest.raises(
        DivergedError, match=r"step 2: training diverged \(loss \S+ on train\).*training\.lr below 1e\+30"
    ):
        fit(Bag(), task(), TrainingConfig(lr=1e30, epochs=3, batch_size=8), 1, lambda *event: events.append(event))
    assert [step for step, _ in events] == [1, 2]


@pytest.mark.parametrize("labelled", [True, False])
def test_outputs_that_are_not_finite_are_reported(labelled: bool) -> None:
    """Catches the first label and NaN as predictions for a test split, although training and validation were fine."""
    test = split(5, 3, labelled)
    unlike = replace(test.examples[0], sequences=(Tokens(torch.tensor([9]), None),))  # of a word in no other text
    ready = task(test=replace(test, examples_of=((unlike,), *test.examples_of[1:])))
    model, config = Bag(), TrainingConfig(epochs=1, batch_size=8)
    with torch.no_grad():
        model.embedding.weight[9] = torch.nan
    with pytest.raises(DivergedError, match=r"^seed 1, test: the model's outputs are not finite in fp32; its weights"):
        fit(model, ready, config, 1, ignore)
    with pytest.raises(DivergedError, match=r"^test: the model's outputs are not finite in fp32; its weights"):
        evaluate_untrained(model, ready, config)


def test_events_count_steps_and_carry_figures() -> None:
    """Catches events without the keys that console and report look for, or steps that restart in each epoch."""
    events: list[tuple[int, dict[str, Any]]] = []
    config = TrainingConfig(lr=0.01, epochs=2, batch_size=8)
    fitted = fit(Bag(), task(), config, 7, lambda step, figures: events.append((step, dict(figures))))
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
    factors = [lr_factor(step, 100, 10) for step in range(100)]
    assert 0 < factors[0] < factors[9] < 1
    assert max(factors) == factors[10] == 1.0
    assert factors[99] == pytest.approx(1 / 90)
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert lr_factor(0, 1, 0.0) == 1.0
    assert all(0 < lr_factor(step, 3, 3) < 1 for step in range(3))


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


def fit_without_dropout(
    config: TrainingConfig, ready: PreparedTask | None = None, model: nn.Module | None = None
) -> Fitted:
    model = model or Bag()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return fit(model, ready or task(), config, 7, ignore)


def losses(fitted: Fitted) -> list[float]:
    return [loss for epoch in fitted.epochs for loss in (epoch.train_loss, epoch.validation_loss)]


WEIGHTS = (0.7, 2.3)


@pytest.mark.parametrize("size", [1, 3, 8, 20])
def test_microbatches_do_not_change_the_result(size: int) -> None:
    """Catches gradients that are averaged over microbatches of different sizes, or weights of labels that are."""
    config = TrainingConfig(lr=0.01, epochs=2, batch_size=20)
    models = Bag(), Bag()
    whole = fit_without_dropout(config, task(WEIGHTS), models[0])
    parts = fit_without_dropout(config.model_copy(update={"microbatch_size": size}), task(WEIGHTS), models[1])
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-6)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


class SmallMemory(Bag):
    """Runs out of memory with more than `limit` sequences: in the forward pass or, with gradients, after a part of the
    backward pass."""

    def __init__(self, limit: int, error: RuntimeError) -> None:
        super().__init__()
        self.limit, self.error = limit, error
        self.failures = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        outputs = super().forward(input_ids, attention_mask)
        if len(input_ids) > self.limit:
            self.failures += 1
            if not outputs.logits.requires_grad:
                raise self.error
            outputs.logits.sum().backward(retain_graph=True)  # gradients that must not stay
            outputs.logits.register_hook(self._fail)
        return outputs

    def _fail(self, gradient: torch.Tensor) -> None:
        raise self.error


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("could not create a primitive"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["GPU", "CPU", "oneDNN"])
def test_running_out_of_memory_changes_no_loss(error: RuntimeError, caplog: pytest.LogCaptureFixture) -> None:
    """Catches an update that loses examples or keeps half a gradient, predictions of too few examples, a warning at
    each update, and a batch that is tried again at a size that failed."""
    config = TrainingConfig(lr=0.01, epochs=2, batch_size=20)
    expected = fit_without_dropout(config)
    model = SmallMemory(6, error)
    found = fit_without_dropout(config, model=model)
    assert losses(found) == pytest.approx(losses(expected), abs=1e-6)
    assert [row["label"] for row in found.evaluations["validation"].predictions] == [
        row["label"] for row in expected.evaluations["validation"].predictions
    ]
    training, evaluation = caplog.messages
    assert training == "out of memory: computing 5 examples at once, not 20; results are equal up to dropout masks"
    assert "computing 5 examples at once" in evaluation
    assert model.failures == 2 + 3  # 20, 10; 37, 19, 10


def test_running_out_of_memory_is_like_a_smaller_microbatch() -> None:
    """Catches dropout that depends on what was computed before memory ran out."""
    config = TrainingConfig(lr=0.01, epochs=2, batch_size=20)
    found = fit(SmallMemory(6, OUT_OF_MEMORY[0]), task(), config, 7, ignore)
    expected = fit(Bag(), task(), config.model_copy(update={"microbatch_size": 5}), 7, ignore)
    assert losses(found) == pytest.approx(losses(expected), abs=1e-6)


@pytest.mark.parametrize("saved", [True, False])
def test_a_resumed_training_keeps_the_smaller_microbatch(saved: bool) -> None:
    """Catches a resumed run with the dropout masks of another size, and a state of version 0.2.0 that does not load."""
    config, ready = TrainingConfig(lr=0.01, batch_size=20), task()
    models = [SmallMemory(6, OUT_OF_MEMORY[0]) for _ in range(2)]
    updater, resumed = (Updater(model, ready, config) for model in models)
    examples = ready.splits["train"].examples[:20]
    updater.step(examples)
    state = updater.state()
    if not saved:
        del state["microbatch_size"]
    resumed.load_state(state)
    resumed.step(examples)
    assert [model.failures for model in models] == [2, 0 if saved else 2]


def test_too_little_memory_for_one_example_is_a_user_error() -> None:
    """Catches an endless loop, a traceback of the allocator, and advice that `deepcloze predict` has no key for."""
    with pytest.raises(UserError, match=r"one example; lower model\.max_seq_length in the fine-tuning config"):
        fit_without_dropout(TrainingConfig(batch_size=4), model=SmallMemory(0, OUT_OF_MEMORY[0]))


def test_other_errors_are_not_taken_for_memory() -> None:
    """Catches a bug that is retried with smaller batches until it is reported as too little memory."""
    with pytest.raises(RuntimeError, match="sizes of tensors"):
        fit_without_dropout(TrainingConfig(batch_size=4), model=SmallMemory(0, RuntimeError("sizes of tensors differ")))


class Bias(nn.Module):
    """Outputs that do not depend on the input, so that the gradient shows what each label contributes."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(count))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.bias.expand(len(input_ids), -1))


def of_targets(
    targets: list[int], labels: tuple[str, ...], balanced: bool = False, smoothing: float = 0.0
) -> PreparedTask:
    """Texts of one to four tokens with these labels."""
    kind = Kind(Config(train="f.csv", validation="f.csv"), labels)
    records = tuple(Record("f.csv", {"label": labels[target]}) for target in targets)
    ids = torch.ones(4, dtype=torch.int64)
    examples = tuple(Example((Tokens(ids[: n % 4 + 1], None),), target) for n, target in enumerate(targets))
    made = Split(Table(Path("f.csv"), records, True), tuple((each,) for each in examples))
    options = LossOptions(torch.tensor(kind.label_weights(examples)) if balanced else None, smoothing)
    return PreparedTask(kind, {"train": made, "validation": made}, Padding(0, "right", 0), options)


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The gradient of each update of a model with one parameter."""
    found: list[torch.Tensor] = []

    def record(optimizer: torch.optim.AdamW) -> None:
        (gradient,) = (parameter.grad for group in optimizer.param_groups for parameter in group["params"])
        found.append(gradient.clone())

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    return found


@pytest.mark.parametrize("batch_size", [8, 1000])
def test_balanced_weights_give_each_label_the_same_share(batch_size: int, gradients: list[torch.Tensor]) -> None:
    """Catches a weighted mean per batch: batches of 8 have few or no examples of a rare label, and those that have
    some would count less. With equal shares and equal probabilities the gradient of an epoch is 0."""
    labels = ("neutral", "joy", "surprise", "anger", "sadness", "disgust", "fear")  # and their shares in MELD
    shares = (0.472, 0.174, 0.121, 0.111, 0.068, 0.027, 0.027)
    targets = [label for label, share in enumerate(shares) for _ in range(round(1000 * share))]
    ready = of_targets(targets, labels, balanced=True)
    fit(Bias(len(labels)), ready, TrainingConfig(lr=1e-12, epochs=1, batch_size=batch_size, grad_clip=0), 1, ignore)
    assert len(gradients) == -(-len(targets) // batch_size)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-3 or batch_size == 1000
    assert torch.stack(gradients).mean(0).abs().max() < 1e-6


def test_a_short_batch_counts_by_its_examples(gradients: list[torch.Tensor]) -> None:
    """Catches a full step for the few examples that are left at the end of an epoch."""
    ready = of_targets([0] * 11, ("a", "b"))
    fit(Bias(2), ready, TrainingConfig(lr=1e-12, epochs=1, batch_size=8, grad_clip=0), 1, ignore)
    sizes = sorted(gradient.norm().item() for gradient in gradients)
    assert sizes[0] == pytest.approx(sizes[1] * 3 / 8)


def test_losses_of_training_and_validation_are_comparable() -> None:
    """Catches label weights or smoothing in only one of them. The splits are the same, and nothing is learned."""
    ready = of_targets([0, 0, 0, 1, 1, 0, 0, 0, 1], ("a", "b"), balanced=True, smoothing=0.2)
    epoch = fit(Bias(2), ready, TrainingConfig(lr=1e-12, epochs=1, batch_size=4), 1, ignore).epochs[0]
    assert epoch.train_loss == pytest.approx(epoch.validation_loss)


def test_label_smoothing_spreads_the_target(gradients: list[torch.Tensor]) -> None:
    """Catches smoothing that never reaches the loss. The gradient is the probabilities minus the target."""
    ready = of_targets([0] * 4, ("a", "b"), smoothing=0.2)
    fit(Bias(2), ready, TrainingConfig(lr=1e-12, epochs=1, batch_size=4, grad_clip=0), 1, ignore)
    torch.testing.assert_close(gradients[0], torch.tensor([0.5 - 0.9, 0.5 - 0.1]))


def test_smoothing_with_weights_keeps_the_labels_balanced(gradients: list[torch.Tensor]) -> None:
    """Catches rare labels that are the target of frequent ones. At equal probabilities, balanced labels cancel."""
    ready = of_targets([0] * 9 + [1], ("a", "b"), balanced=True, smoothing=0.2)
    fit(Bias(2), ready, TrainingConfig(lr=1e-12, epochs=1, batch_size=10, grad_clip=0), 1, ignore)
    assert gradients[0].abs().max() < 1e-6


def test_evaluation_every_few_steps() -> None:
    """Catches evaluations at wrong steps, none after the last step, and training losses that overlap."""
    config = TrainingConfig(lr=0.01, steps=13, batch_size=16, evaluate_every=3)
    fitted = fit_without_dropout(config)
    assert [epoch.steps for epoch in fitted.epochs] == [3, 6, 9, 12, 13]
    assert [epoch.epoch for epoch in fitted.epochs] == [0.75, 1.5, 2.25, 3, 3.25]
    whole = fit_without_dropout(config.model_copy(update={"evaluate_every": 12}))
    first = np.mean([epoch.train_loss for epoch in fitted.epochs[:4]])
    assert first == pytest.approx(whole.epochs[0].train_loss)


def test_patience_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches patience that counts from the start, that counts equal scores as better, or that is off by one."""
    accuracies = iter([0.5, 0.6, 0.9, 0.9, 0.8, 1.0])
    monkeypatch.setattr(Kind, "scores", lambda *_: {"accuracy": next(accuracies)})
    fitted = fit(Bag(), task(), TrainingConfig(epochs=9, batch_size=8, patience=2), 1, ignore)
    assert len(fitted.epochs) == 5
    assert fitted.best.epoch == 3


class KilledError(Exception):
    pass


@dataclass(frozen=True)
class KilledAfter(StateFile):
    """Ends the training after a number of saves."""

    saves: list[int]

    def save(self, state: Any) -> None:
        super().save(state)
        self.saves[0] -= 1
        if not self.saves[0]:
            raise KilledError


@pytest.mark.parametrize("saves", [1, 3])
def test_a_training_resumes_exactly(tmp_path: Path, saves: int) -> None:
    """Catches a resume with another order, other dropout, no optimizer state, or without the best weights so far."""
    config = TrainingConfig(lr=0.03, epochs=3, batch_size=8, evaluate_every=5)
    path = tmp_path / "work" / "state.pt"
    ready, models = task(test=split(9, 3)), (Bag(), Bag())
    events: dict[str, list[tuple[int, Any]]] = {"whole": [], "resumed": []}

    def log_to(name: str) -> Any:
        return lambda step, metrics: events[name].append((step, metrics.get("loss"), metrics.get("lr")))

    whole = fit(models[0], ready, config, 7, log_to("whole"))
    with pytest.raises(KilledError):
        fit(Bag(), ready, config, 7, log_to("resumed"), KilledAfter(path, {"lr": 1}, [saves]))
    assert StateFile(path, {"lr": 1}).steps == 5 * saves
    resumed = fit(models[1], ready, config, 7, log_to("resumed"), StateFile(path, {"lr": 1}))
    assert without_seconds(resumed) == without_seconds(whole)
    assert events["resumed"] == events["whole"]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("call", [3, 7, 12, 14, 18])
def test_an_interrupted_training_resumes_exactly(tmp_path: Path, call: int) -> None:
    """Catches an interruption that loses updates since the last evaluation, or cuts through an update."""
    config = TrainingConfig(lr=0.03, epochs=3, batch_size=8, evaluate_every=5)
    path, settings = tmp_path / "work" / "state.pt", {"lr": 1}
    ready, whole, resumed = task(test=split(9, 3)), Bag(), Bag()
    calls = []

    def interrupt(*_: object) -> None:
        calls.append(interrupted.training)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)

    interrupted = Bag()
    interrupted.register_forward_hook(interrupt)
    with pytest.raises(StoppedError, match=r"stopped: seed 7 at step (\d+), saved") as stopped:
        fit(interrupted, ready, config, 7, ignore, StateFile(path, settings))
    updates = sum(calls)
    assert f"at step {updates}, saved" in str(stopped.value)
    assert StateFile(path, settings).steps == updates

    fitted = fit(resumed, ready, config, 7, ignore, StateFile(path, settings))
    assert without_seconds(fitted) == without_seconds(fit(whole, ready, config, 7, ignore))
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("write", [1, 4])
def test_an_interrupt_while_the_state_is_saved_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    """Catches Ctrl-C during the save after an evaluation that ends in a traceback of torch's writer, with no state."""
    config = TrainingConfig(lr=0.03, epochs=2, batch_size=8)
    save, state, writes = torch.save, StateFile(tmp_path / "work" / "state.pt", {"lr": 1}), []

    def save_interrupted(content: object, file: Any) -> None:
        def write_interrupted(data: Any) -> int:
            writes.append(data)
            if len(writes) == write:
                signal.raise_signal(signal.SIGINT)
            return int(file.write(data))

        save(content, SimpleNamespace(write=write_interrupted, flush=file.flush))

    monkeypatch.setattr(torch, "save", save_interrupted)
    with pytest.raises(StoppedError, match="saved"):
        fit(Bag(), task(), config, 7, ignore, state)
    assert state.steps == 8  # the first epoch


def test_an_interrupted_prediction_needs_no_training_again(tmp_path: Path) -> None:
    """Catches Ctrl-C while a large test split is predicted that costs the updates since the evaluation before the last
    one: all of them, if there was only one."""
    config = TrainingConfig(lr=0.03, epochs=2, batch_size=8, evaluate_every=5)
    ready, state = task(test=split(9, 3)), StateFile(tmp_path / "work" / "state.pt", {"lr": 1})
    whole = fit(Bag(), ready, config, 7, ignore)
    interrupted, resumed = Bag(), Bag()

    def interrupt(model: nn.Module, _: object, output: Any) -> None:
        if len(output.logits) == 9:  # of test
            signal.raise_signal(signal.SIGINT)

    interrupted.register_forward_hook(interrupt)
    with pytest.raises(StoppedError, match="saved"):
        fit(interrupted, ready, config, 7, ignore, state)
    assert state.steps == whole.epochs[-1].steps
    updates: list[bool] = []
    resumed.register_forward_hook(lambda model, *_: updates.append(model.training))
    assert without_seconds(fit(resumed, ready, config, 7, ignore, state)) == without_seconds(whole)
    assert updates == [False]


def test_a_finished_training_has_saved_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a full disk or Ctrl-C while the model is written that costs the updates since the evaluation before the
    last one, and a state whose steps are asked for that is read as a whole: gigabytes."""
    config = TrainingConfig(lr=0.03, epochs=1, batch_size=8)
    state = StateFile(tmp_path / "work" / "state.pt", {"lr": 1})
    fitted = fit(Bag(), task(), config, 7, ignore, state)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("read"))
    assert state.steps == fitted.epochs[-1].steps > 0
    assert state.other_settings() == {}


@pytest.mark.parametrize("call", [8, 11])
def test_time_that_is_not_for_training_counts_in_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Catches tokens per second that are too low after a resume or an evaluation, and an epoch that lacks the seconds
    before the resume. The calls of the model: five updates, an evaluation, and so on."""
    config = TrainingConfig(lr=0.03, steps=80, batch_size=8, evaluate_every=5)  # more than one update between events
    examples = tuple(replace(each, sequences=(Tokens(torch.ones(4).long(), None),)) for each in split(64, 0).examples)
    ready = task(train=replace(split(64, 0), examples_of=tuple((each,) for each in examples)))
    state = StateFile(tmp_path / "state.pt", {"lr": 1})
    seconds = [0.0]
    monkeypatch.setattr(fit_module, "time", SimpleNamespace(monotonic=lambda: seconds[0]))

    class SlowStateFile(StateFile):
        def load(self, verified: bool = True) -> Any:
            seconds[0] += 1000
            return super().load(verified)

    def fit_until(last_call: int | None, state: StateFile) -> Fitted:
        model, calls = Bag(), []

        def count(*_: object) -> None:
            seconds[0] += 1 if model.training else 100
            calls.append(model.training)
            if len(calls) == last_call:
                signal.raise_signal(signal.SIGINT)

        model.register_forward_hook(count)
        return fit(model, ready, config, 7, lambda _, event: events.append(event), state)

    events: list[Mapping[str, Any]] = []
    with pytest.raises(StoppedError):
        fit_until(call, state)
    resumed = fit_until(None, SlowStateFile(state.path, state.settings))
    assert {event["tokens_per_second"] for event in events if "lr" in event} == {8 * 4}
    assert {epoch.seconds for epoch in resumed.epochs} == {5}


def without_seconds(fitted: Fitted) -> Fitted:
    return replace(fitted, epochs=tuple(replace(epoch, seconds=0) for epoch in fitted.epochs), best=fitted.best.steps)  # type: ignore[arg-type]


def test_a_state_of_other_settings_or_a_damaged_one_is_not_used(tmp_path: Path) -> None:
    """Catches a training that continues with the weights of another learning rate, and a traceback."""
    path = tmp_path / "state.pt"
    StateFile(path, {"lr": 1}).save({"updater": {"steps": 3}})
    assert StateFile(path, {"lr": 1}).steps == 3
    assert StateFile(path, {"lr": 2}).load() is None
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"state\.pt is damaged .*remove it"):
        StateFile(path, {"lr": 1}).load()


def test_a_state_of_an_earlier_version_is_used(tmp_path: Path) -> None:
    """Catches unfinished seeds that start over because a newer version has more keys; a changed one still counts."""
    now = {
        "task": {"kind": "cloze", "context": "article", "dialogue": {"group": "id", "turns": 3}},
        "training": {"lr": 1, "adam_eps": 1e-8},
    }
    before = {
        "task": {"kind": "cloze", "dialogue": {"group": "id"}},
        "training": {"lr": 1},
    }
    path = tmp_path / "state.pt"
    StateFile(path, before).save({"updater": {"steps": 3}})
    assert StateFile(path, now).steps == 3
    assert StateFile(path, {**now, "training": {"lr": 1, "adam_eps": 1e-6}}).load() is None
    assert StateFile(path, {**now, "task": {**now["task"], "labels": ["a", "b"]}}).load() is None
    del before["task"]["dialogue"]
    StateFile(path, before).save({"updater": {"steps": 3}})
    assert StateFile(path, now).load() is None


def test_a_state_with_a_flipped_bit_is_not_used(tmp_path: Path) -> None:
    """Catches a traceback, and a training that continues with a wrong weight."""
    path = tmp_path / "state.pt"
    state = StateFile(path, {"lr": 1})
    state.save({"updater": {"steps": 3, "moments": torch.arange(8.0)}})
    content = path.read_bytes()
    for found in (b"updater", b"moments", torch.arange(8.0).numpy().tobytes()):
        damaged = bytearray(content)
        damaged[content.index(found) + 5] ^= 0x80
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"state\.pt is damaged .*remove it"):
            state.load()


@pytest.mark.parametrize(
    ("grad_clip", "gradient", "factor", "expected"),
    [
        (1.0, [3.0, 4.0], 1.0, [0.6, 0.8]),
        (1.0, [3.0, 4.0], 0.1, [0.3, 0.4]),
        (2.5, [3.0, 4.0], 1.0, [1.5, 2.0]),
        (0.0, [3.0, 4.0], 0.5, [1.5, 2.0]),
    ],
)
def test_gradients_are_clipped_after_they_are_scaled(
    grad_clip: float, gradient: list[float], factor: float, expected: list[float]
) -> None:
    """Catches a norm that is taken of the summed loss: its gradient grows with the batch size. Also another limit than
    the one asked for."""
    model = Bias(2)
    updater = Updater(model, of_targets([0] * 8, ("a", "b")), TrainingConfig(batch_size=8, grad_clip=grad_clip))
    model.bias.grad = torch.tensor(gradient)
    updater._scale_and_clip_gradients(torch.tensor(factor))
    torch.testing.assert_close(model.bias.grad, torch.tensor(expected))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eval_batch_size": 10, "warmup_steps": 4}, {10, 7}),
        ({"microbatch_size": 2, "warmup_steps": 4}, {8, 5}),
        ({"warmup_ratio": 0.5}, {32, 5}),
    ],
    ids=["eval_batch_size", "microbatch_size", "batch_size"],
)
def test_settings_of_the_optimizer_and_of_evaluations_are_used(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], expected: set[int]
) -> None:
    """Catches keys that do nothing, and evaluations whose memory the microbatch does not bound."""
    sizes: list[int] = []
    forward = Bag.forward

    def record(self: Bag, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        if not self.training:
            sizes.append(len(input_ids))
        return forward(self, input_ids, attention_mask)

    monkeypatch.setattr(Bag, "forward", record)
    config = TrainingConfig(lr=1.0, weight_decay=0, adam_eps=1e9, epochs=1, batch_size=8, **settings)
    model, lrs = Bag(), []
    before = [parameter.clone() for parameter in model.parameters()]
    fit(model, task(), config, 1, lambda _, metrics: lrs.append(metrics.get("lr")))
    assert lrs[:8] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.75, 0.5, 0.25])
    assert set(sizes) == expected  # of 37
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert (parameter - old).abs().max() < 1e-3, "a large epsilon makes updates small"


def test_the_training_split_is_scored_if_asked_for() -> None:
    """Catches scores of another split, or of the weights at the end in place of the best ones."""
    events: list[Any] = []
    config = TrainingConfig(lr=0.05, epochs=3, batch_size=8, score_train=True)
    ready = task()
    model = Bag()
    fitted = fit(model, ready, config, 1, lambda _, metrics: events.append(metrics))
    logged = [event["eval/train/accuracy"] for event in events if "eval/train/loss" in event]
    assert logged == [epoch.train_scores["accuracy"] for epoch in fitted.epochs]
    again = evaluate(model, ready, ready.splits["train"], MicrobatchSize(64))
    assert fitted.evaluations["train"].scores == again.scores == fitted.best.train_scores
    assert list(fitted.evaluations) == ["train", "validation"]
    plain = fit(Bag(), ready, TrainingConfig(lr=0.05, epochs=3, batch_size=8), 1, ignore)
    assert [epoch.scores for epoch in plain.epochs] == [epoch.scores for epoch in fitted.epochs]
    assert list(plain.evaluations) == ["validation"]
