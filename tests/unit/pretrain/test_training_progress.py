import dataclasses
import json

from pretrain.training_progress import (
    EvaluationHistory,
    SummedLoss,
    TrainingProgress,
    progress_from_json,
    progress_to_json,
    rename_corpora,
)

PROGRESS = TrainingProgress(
    step=7,
    tokens=900,
    tokens_by_corpus={"text": 600, "code": 300},
    seconds=12.5,
    interval_losses=(3.5, 0.1),
    interval_masked=11,
    skipped_steps=2,
    overflows=1,
    loss_sum=77.7,
    masked_tokens=140,
    grad_norms=(1.5, 0.25),
    bad_steps=(3, 9),
    evaluations=EvaluationHistory("eval/a/loss", 2.0, 5, 1, SummedLoss(70.0, 130), 2.5, {"a": 2.1}, {"a": 1}),
    evaluated=True,
)


def test_progress_survives_json() -> None:
    """Catches a field that a resume loses or resets, and lists where comparisons expect tuples."""
    defaults, saved = dataclasses.asdict(TrainingProgress()), dataclasses.asdict(PROGRESS)
    assert [name for name in defaults if defaults[name] == saved[name]] == [], "a field that this test would not miss"
    assert progress_from_json(json.loads(json.dumps(progress_to_json(PROGRESS)))) == PROGRESS
    assert progress_from_json(json.loads(json.dumps(progress_to_json(TrainingProgress())))) == TrainingProgress()


def test_names_in_state_json_do_not_change() -> None:
    """Catches a renamed field that makes existing checkpoints unreadable."""
    assert json.loads(json.dumps(progress_to_json(PROGRESS))) == {
        "step": 7,
        "tokens": 900,
        "tokens_by_corpus": {"text": 600, "code": 300},
        "seconds": 12.5,
        "interval_losses": [3.5, 0.1],
        "interval_masked": 11,
        "skipped_steps": 2,
        "overflows": 1,
        "loss_sum": 77.7,
        "masked": 140,
        "norms": [1.5, 0.25],
        "skipped": [3, 9],
        "standing": {
            "metric": "eval/a/loss",
            "best": 2.0,
            "best_step": 5,
            "waited": 1,
            "trained": [70.0, 130],
            "train_loss": 2.5,
            "held_out": {"a": 2.1},
            "rising": {"a": 1},
            "step": None,
            "metrics": {},
            "corpora": {},
        },
        "evaluated": True,
    }


def test_tokens_belong_to_a_corpus_not_to_its_name() -> None:
    """Catches epochs of a corpus that its run has read under another name, or that a fork's parent has read of another
    one of this name."""

    def corpora(**fingerprints: str) -> list[dict[str, str]]:
        return [{"name": name, "fingerprint": fingerprint} for name, fingerprint in fingerprints.items()]

    tokens = {"a": 5, "b": 7, "older": 1}
    before = corpora(a="f1" * 8, b="f2" * 8)
    assert rename_corpora(tokens, before, before) == tokens
    assert rename_corpora(tokens, before, corpora(new="f1" * 8, b="f2" * 8)) == {"new": 5, "b": 7, "older": 1}
    assert rename_corpora(tokens, before, corpora(a="f3" * 8, c="f2" * 8)) == {"a@f1f1f1f1": 5, "c": 7, "older": 1}
    away = rename_corpora(tokens, before, corpora(a="f3" * 8))
    assert away == {"a@f1f1f1f1": 5, "b@f2f2f2f2": 7, "older": 1}
    assert rename_corpora(away | {"a": 2}, corpora(a="f3" * 8), before) == tokens | {"a@f3f3f3f3": 2}
    twice = corpora(a="f1" * 8, b="f1" * 8)
    assert rename_corpora(tokens, twice, twice) == tokens
    assert rename_corpora(tokens, twice, corpora(c="f1" * 8)) == {"c": 12, "older": 1}
