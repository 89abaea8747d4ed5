import json
from pathlib import Path
from typing import Any

import pytest

from experiment.results.history import NO_AXIS, History
from experiment.run_files.run_folder import RunFolder, open_run_folder


def logged(path: Path, *events: dict[str, Any]) -> RunFolder:
    """A run whose metrics.jsonl has these events at its end."""
    folder = open_run_folder(path)
    append(folder.metrics, *events)
    return folder


def append(path: Path, *events: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(event)}\n" for event in events)


def points(history: History, key: str = "loss") -> dict[int | None, list[tuple[float, float]]]:
    return {seed: list(zip(*map(list, of.curve(key).points()), strict=True)) for seed, of in history.seeds.items()}


def test_time_is_that_of_training(tmp_path: Path) -> None:
    """Catches hours that count evaluations or nulls, an axis that does not begin at 0, and one that depends on when the
    events were read."""
    events = [
        {"step": 0, "eval/wiki/loss": 9.0},
        {"step": 10, "tokens": 1000, "tokens_per_second": 100.0},
        {"step": 20, "tokens": 3000, "tokens_per_second": 200.0},
        {"step": 20, "tokens": 3000, "eval/wiki/loss": 8.0},
        {"step": 30, "tokens": 4000, "tokens_per_second": None},
        {"step": 40, "tokens": 5000, "tokens_per_second": 400.0},
    ]
    grown = History(RunFolder(tmp_path / "run"))
    for event in events:
        folder = logged(tmp_path / "run", event)
        grown.read()
    for history in (History.of(folder), grown):
        axis = history.seeds[None].axis
        assert axis == {"step": [0, 10, 20, 40], "tokens": [0, 1000, 3000, 5000], "seconds": [0, 10, 20, 25]}
    assert History.of(logged(tmp_path / "new", events[0])).seeds[None].axis == NO_AXIS
    many = [{"step": step, "tokens": step, "tokens_per_second": 1.0} for step in range(1, 5000)]
    axis = History.of(logged(tmp_path / "long", *many)).seeds[None].axis
    assert len(axis["step"]) < 1000
    assert axis["seconds"] == axis["tokens"] == axis["step"]
    assert axis["step"][-1] == 4999


@pytest.mark.parametrize("scores", [{}, {"eval/held/loss": 3.0}])
def test_the_time_of_a_fork_begins_with_it(tmp_path: Path, scores: dict[str, float]) -> None:
    """Catches the tokens of the parent, divided by the speed of the fork's first steps, or its first evaluation near
    the end of them, also if its first event is read alone."""
    events = [
        {"step": 100, "tokens": 1_000_000, **scores},
        {"step": 110, "tokens": 1_001_000, "tokens_per_second": 100.0},
        {"step": 120, "tokens": 1_002_000, "tokens_per_second": 200.0},
    ]
    grown = History(RunFolder(tmp_path))
    for event in events:
        folder = logged(tmp_path, event)
        grown.read()
    for history in (History.of(folder), grown):
        axis = history.seeds[None].axis
        tokens = [1_000_000, 1_001_000, 1_002_000]
        assert axis == {"step": [100, 110, 120], "tokens": tokens, "seconds": [0, 10, 15]}


def test_figures(tmp_path: Path) -> None:
    """Catches nulls, text and numbers that no double holds among the figures, the last event in place of the best, and
    an earlier score of a run that has diverged since. A loss is null if no step since the last event had one."""
    odd = {"loss": 10**400, "grad_norm": "high", "lr": {}, "mfu": float("nan"), "eval/b/loss": [1]}
    events = [{"step": 1, "eval/b/loss": 2.0, "memory": 3}, {"step": 2, "loss": 4.0, "memory": 2}, {"step": 3, **odd}]
    folder = logged(tmp_path / "run", *events, {"step": 4, "loss": None, "eval/a/loss": 1.0})
    history = History.of(folder)
    assert (history.step, history.corpora) == (4, ["b", "a"])
    assert (history.last("loss"), history.highest("memory"), history.median("memory")) == (4.0, 3, 2.5)
    assert (history.last("memory"), history.last("eval/a/loss"), history.last("eval/b/loss")) == (2, 1.0, None)
    append(folder.metrics, {"step": 5, "loss": 3.0, "eval/a/loss": None})
    history.read()
    assert (history.last("loss"), history.last("eval/a/loss"), history.best_loss("a")) == (3.0, None, (1.0, 4))
    assert (history.best_loss("b"), history.best_loss("c")) == ((2.0, 1), None)
    assert [history.last(key) for key in ("grad_norm", "lr", "mfu")] == [None] * 3
    empty = History.of(RunFolder(tmp_path / "missing"))
    assert (empty.seeds, empty.step, empty.corpora, empty.last("loss"), empty.median("loss")) == ({}, 0, [], None, None)


def test_each_seed_has_its_own_steps(tmp_path: Path) -> None:
    """Catches seeds joined end to end, steps that depend on when a seed stopped early, and a first event at step 0;
    also if a seed is read in parts."""
    joined = [(7, 10, 3.0), (7, 20, 2.0), (7, 30, 1.0), (8, 60, 3.5), (8, 70, 2.5), (9, 110, 4.0)]
    events = [{"seed": seed, "step": step, "loss": loss} for seed, step, loss in joined]
    grown = History(RunFolder(tmp_path / "run"))
    for event in events:
        folder = logged(tmp_path / "run", event)
        grown.read()
    for history in (History.of(folder), grown):
        assert points(history) == {7: [(10, 3.0), (20, 2.0), (30, 1.0)], 8: [(10, 3.5), (20, 2.5)], 9: [(10, 4.0)]}
        assert history.step == 30


def test_a_resumed_run_is_read_again(tmp_path: Path) -> None:
    """Catches steps after the checkpoint that stay or appear twice, also if the new file is longer than the old one."""
    folder = logged(tmp_path / "run", *[{"step": step, "loss": 1.0} for step in range(1, 5)])
    history = History.of(folder)
    for steps in (2, 9):
        kept = [{"step": step, "loss": 1.0 if step < 3 else 2.0} for step in range(1, steps + 1)]
        folder.metrics.unlink()
        append(folder.metrics, *kept)
        history.read()
        assert points(history) == {None: [(event["step"], event["loss"]) for event in kept]}
    folder.metrics.unlink()
    history.read()
    assert history.seeds == {}


def test_seeds_that_are_trained_in_parallel(tmp_path: Path) -> None:
    """Catches seeds that are not shown before they are finished, or twice when they are."""
    folder = logged(tmp_path / "run", {"seed": 1, "step": 10, "loss": 1.0})
    for seed in (2, 3):
        append(folder.logs / f"seed-{seed}.jsonl", {"seed": seed, "step": 10, "loss": float(seed)})
    history = History.of(folder)
    before = {1: [(10, 1.0)], 2: [(10, 2.0)], 3: [(10, 3.0)]}
    assert points(history) == before
    append(folder.metrics, {"seed": 2, "step": 30, "loss": 2.0})
    history.read()
    assert points(history) == before, "before the file is removed"
    (folder.logs / "seed-2.jsonl").unlink()
    history.read()
    assert points(history) == before
    assert history.unread == 0


def test_a_seed_that_ends_while_it_is_read(tmp_path: Path) -> None:
    """Catches a seed that is neither among those in training nor in metrics.jsonl, because it was moved in between."""
    folder = logged(tmp_path / "run", {"step": 1, "seed": 1, "loss": 0.5})
    folder.logs.mkdir(exist_ok=True)
    training = folder.logs / "seed-2.jsonl"
    append(training, {"step": 1, "seed": 2, "loss": 0.6})

    def move() -> None:
        if training.exists():
            append(folder.metrics, {"step": 2, "seed": 2, "loss": 0.6})
            training.unlink()

    history = History(folder)
    history.read(move)
    assert points(history) == {1: [(1, 0.5)], 2: [(1, 0.6)]}


@pytest.mark.parametrize("torn", [b'{"step": 3, "loss"', b'{"step": 3, "loss": 3.0}'])
def test_an_incomplete_line_is_read_when_it_is_complete(tmp_path: Path, torn: bytes) -> None:
    """Catches a line that is lost because its first half was read before it was complete, and one that is never
    completed."""
    folder = logged(tmp_path / "run", {"step": 1, "loss": 1.0})
    with folder.metrics.open("ab") as file:
        file.write(torn)
    history = History.of(folder)
    assert points(history) == {None: [(1, 1.0)]}
    assert history.unread > 0
    with folder.metrics.open("ab") as file:
        file.write(b': 3.0}\n{"step": 4, "loss": 4.0}\n' if torn.endswith(b'"') else b"\n")
    history.read()
    assert points(history) == {None: [(1, 1.0), (3, 3.0), (4, 4.0)] if torn.endswith(b'"') else [(1, 1.0), (3, 3.0)]}
