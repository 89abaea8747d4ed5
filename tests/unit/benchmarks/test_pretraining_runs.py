import json
from pathlib import Path

import pytest

from benchmarks.pretraining_runs import read_steps, tokens_per_second


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of three steps of 100, 300 and 600 tokens, which take 1, 2 and 3 seconds, and an evaluation."""
    events = [
        {"step": 1, "tokens": 100, "loss": 9.0, "tokens_per_second": 100.0},
        {"step": 2, "tokens": 400, "loss": 8.0, "tokens_per_second": 150.0},
        {"step": 2, "tokens": 400, "eval/held_out/loss": 8.5},
        {"step": 3, "tokens": 1000, "loss": 7.0, "tokens_per_second": 200.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return tmp_path


def test_steps_have_their_tokens_and_seconds(folder: Path) -> None:
    """Catches an evaluation that counts as a step, and a first step that is left out."""
    steps = read_steps(folder)
    assert [(step.event["loss"], step.tokens, step.seconds) for step in steps] == [
        (9.0, 100, 1.0),
        (8.0, 300, 2.0),
        (7.0, 600, 3.0),
    ]


def test_the_rate_is_that_of_all_steps_that_are_not_skipped(folder: Path) -> None:
    """Catches a mean of rates, in which short steps weigh as much as long ones."""
    assert tokens_per_second(folder, skipped=1) == pytest.approx(900 / 5)
