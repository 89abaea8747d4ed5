from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import BertConfig

from experiment.models.tokenizer import load_tokenizer
from pretrain.batching.vocabulary import build_vocabulary
from pretrain.config import EvaluationConfig, PretrainConfig
from pretrain.corpus.reader import open_corpus
from pretrain.resolve import ResolvedRun
from pretrain.training.evaluation import (
    describe_rise,
    forget_replaced,
    log_early_stop,
    newly_overfitting,
    open_evaluator,
    should_stop_early,
    stop_votes,
    update_history,
)
from pretrain.training_progress import EvaluationHistory, SummedLoss
from pretrain.training_stream import run_layout
from pretrain.world import World


def histories_after(
    config: EvaluationConfig, *evaluations: dict[str, Any], training: tuple[float, ...] = ()
) -> list[EvaluationHistory]:
    """The history after each evaluation, one every 10 steps. `training`: mean training loss before each."""
    history, found, trained = EvaluationHistory(), [], SummedLoss()
    for number, metrics in enumerate(evaluations):
        if training and number:
            trained = SummedLoss(trained.loss + 50 * training[number], trained.masked_tokens + 50)
        history = update_history(history, config, 10 * number, metrics, trained)
        found.append(history)
    return found


def losses(*values: float | None, kind: str = "loss") -> list[dict[str, Any]]:
    return [{f"eval/a/{kind}": value} for value in values]


@pytest.mark.parametrize(
    ("kind", "values", "best_step"),
    [
        ("loss", (3.0, 2.0, 2.5, 2.0), 10),
        ("perplexity", (30.0, 20.0, 10.0), 20),
        ("accuracy", (0.1, 0.3, 0.2), 10),
        ("loss", (None, 2.0, None), 10),
        ("loss", (None, None), None),
    ],
)
def test_the_best_step(kind: str, values: tuple[float | None, ...], best_step: int | None) -> None:
    """Catches a lower accuracy that counts as better, a tie that replaces the best, and a NaN that becomes the best."""
    config = EvaluationConfig(best_metric=f"eval/a/{kind}")
    assert histories_after(config, *losses(*values, kind=kind))[-1].best_step == best_step


def test_patience_counts_evaluations_since_the_best() -> None:
    """Catches a counter that a new best does not reset, or that is off by one."""
    config = EvaluationConfig(best_metric="eval/a/loss", patience=2)
    histories = histories_after(config, *losses(3.0, 3.1, 2.9, 2.9, 3.0))
    assert [should_stop_early(history, config) for history in histories] == [False, False, False, False, True]
    assert not should_stop_early(histories[-1], EvaluationConfig(best_metric="eval/a/loss", patience=3))
    assert not should_stop_early(histories[-1], EvaluationConfig(best_metric="eval/b/loss", patience=2))


def test_another_metric_resets_the_best() -> None:
    """Catches a loss that is compared with an accuracy after the config changed."""
    history = histories_after(EvaluationConfig(best_metric="eval/a/loss"), *losses(0.2))[-1]
    config = EvaluationConfig(best_metric="eval/a/accuracy")
    history = update_history(history, config, 50, {"eval/a/accuracy": 0.1}, SummedLoss())
    assert (history.best, history.best_step) == (0.1, 50)


def test_a_replaced_corpus_resets_the_best(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a run that stops early, or keeps a best step, because of scores on another text of the same name."""
    config = EvaluationConfig(best_metric="eval/a/loss", patience=1)
    history = forget_replaced(histories_after(config, *losses(3.0))[-1], {"a": "1", "b": "1"})
    history = update_history(history, config, 10, {"eval/a/loss": 2.9, "eval/b/loss": 1.0}, SummedLoss())
    assert forget_replaced(history, {"a": "1", "b": "2", "c": "1"}).metric == "eval/a/loss"
    assert forget_replaced(history, {"b": "1"}).best_step == 10
    now = forget_replaced(history, {"a": "2", "b": "1"})
    assert now.held_out == {"b": 1.0}
    assert caplog.messages[-1].startswith("corpus.eval.a has other text")
    now = update_history(now, config, 20, {"eval/a/loss": 6.0}, SummedLoss())
    assert (now.best, now.best_step, should_stop_early(now, config)) == (6.0, 20, False)


def test_overfitting_is_training_loss_down_and_held_out_loss_up() -> None:
    """Catches repeated warnings within a streak, a warning while the training loss rises too, and corpora that are
    mixed up."""
    config = EvaluationConfig(overfitting_after=2)
    evaluations = [
        {"eval/a/loss": a, "eval/b/loss": 1.0}
        for a in (5.0, 4.0, 4.1, 4.2, 4.3, 4.0, 4.1, 4.2)  # up at 2, 3, 4, 6 and 7
    ]
    falling = histories_after(config, *evaluations, training=(0, 6, 5, 4, 3, 2, 1, 0.5))
    assert [newly_overfitting(history, config) for history in falling] == [[], [], [], ["a"], [], [], [], ["a"]]
    rising = histories_after(config, *evaluations, training=(0, 1, 2, 3, 4, 5, 6, 7))
    assert not any(newly_overfitting(history, config) for history in rising)
    assert falling[3].train_loss == 4.0


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        ((5.0, 4.0, 3.0), "the model forgets b: the loss on b has risen for 2 evaluations while that on a fell; mix "),
        ((3.0, 4.0, 5.0), "overfitting: the loss on b has risen for 2 evaluations while the training loss fell"),
    ],
)
def test_a_model_that_learns_other_text_forgets(domain: tuple[float, ...], expected: str) -> None:
    """Catches advice against overfitting for a model that continues on a domain and loses its general text."""
    config = EvaluationConfig(overfitting_after=2)
    evaluations = [{"eval/a/loss": a, "eval/b/loss": b} for a, b in zip(domain, (1.0, 1.1, 1.2), strict=True)]
    before, now = histories_after(config, evaluations[0], *evaluations, training=(0, 6, 5, 4))[-2:]
    assert describe_rise("b", before, now).startswith(expected)


@pytest.mark.parametrize(
    ("best", "step", "found"), [(None, None, "it was never finite"), (2.34567, 40, "the best was 2.346 at step 40")]
)
def test_the_reason_of_an_early_stop_is_logged(
    caplog: pytest.LogCaptureFixture, best: float | None, step: int | None, found: str
) -> None:
    """Catches a traceback on stderr in place of the reason if the metric was never finite."""
    metric = "eval/test/loss"
    with caplog.at_level("INFO"):
        log_early_stop(EvaluationHistory(metric, best, step, waited=2))
    assert caplog.messages == [f"stopping early: {metric} has not improved for 2 evaluations; {found}"]


class _Asked:
    """A stop request, from this moment of the clock on, and a group with a second rank that is as fast."""

    def __init__(self, at: float) -> None:
        self.now, self.votes, self._at = 0.0, 0, at

    @property
    def reason(self) -> str | None:
        return "found STOP" if self.now >= self._at else None

    def all_reduce_sum(self, numbers: Sequence[int]) -> list[int]:
        self.votes += 1
        requests, late = numbers
        return [requests, 2 * late]


@pytest.mark.parametrize(("seconds", "most_votes"), [(0.01, 60), (0.3, 60), (1.5, 68), (7.0, 15)])
def test_a_stop_during_an_evaluation_takes_seconds(
    monkeypatch: pytest.MonkeyPatch, seconds: float, most_votes: int
) -> None:
    """Catches an evaluation that takes longer than a batch system waits, and votes in each microbatch."""
    asked = _Asked(at=100.0)
    monkeypatch.setattr("pretrain.training.evaluation.time.monotonic", lambda: asked.now)
    stops = stop_votes(asked, asked)  # type: ignore[arg-type]
    while not next(stops):
        asked.now += seconds  # of a microbatch
    assert asked.now <= 100.0 + max(4.0, seconds)
    assert asked.votes <= most_votes


def test_batches_are_as_large_as_in_training(heldout_corpus: Path) -> None:
    """Catches batches of a fixed size, of which each of many ranks gets a few sequences, and microbatches that need
    more memory than those of training."""
    batch = {"sequences": 7, "max_seq_length": 40}
    sections = {"model": {"init_from": "trained"}, "corpus": {"train": "corpus"}, "batch": batch}
    run = SimpleNamespace(
        config=PretrainConfig.model_validate({"run": {"dir": "run"}, "schedule": {"steps": 1}, **sections}),
        held_out={"held": open_corpus(heldout_corpus)},
        vocabulary=build_vocabulary(load_tokenizer(heldout_corpus / "tokenizer")),
        folder=SimpleNamespace(path=heldout_corpus),
        model_config=BertConfig(),
    )
    resolved = cast(ResolvedRun, run)
    held = open_evaluator(resolved, run_layout(resolved, "padded"), World(0, 2)).corpora["held"]
    assignments = [held.maker.assign(step) for step in range(held.batches - 1)]
    assert [len(lengths) for _, lengths, _ in assignments] == [7] * (held.batches - 1)
    assert {assignment.rows.sum() for *_, assignment in assignments} == {4}  # of each rank
