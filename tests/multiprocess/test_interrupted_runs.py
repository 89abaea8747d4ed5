"""Runs that are stopped, killed and rewound at random points end like an uninterrupted one."""

import os
import random
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from experiment.run_files.checkpoints import checkpoint_step, complete_checkpoints
from experiment.run_files.metrics_file import JsonlTracker
from experiment.run_files.run_folder import RunFolder
from poison import Poison, poisoned_case
from pretrain.training.stop_request import StopRequest, receive_stop_requests
from pretrain.world import World
from rank_pool import RankError, RankPool
from runs import Tree, assert_same_run, evaluation_events, pretrain_case, run_config, soak
from waiting import wait_until

STEPS = 8


class Interruption(NamedTuple):
    """How an attempt at a run ends early, unless it is done before."""

    how: Literal["stop", "kill"]
    after: int  # stop: steps; kill: starts and ends of the calls that `killed_case` counts


def killed_case(world: World, tree: Mapping[str, Any], poisons: Mapping[int, Poison], after: int) -> str:
    """A run that is killed where an event is logged, or a checkpoint is saved or loaded."""
    import pretrain.training.checkpoint_tensors as checkpoint_tensors
    from pretrain.training.checkpointer import Checkpointer
    from pretrain.training.trainer import Trainer

    left = after

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            count()
            result = function(*args, **options)
            count()
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JsonlTracker, "log", counted(JsonlTracker.log))
        patch.setattr(JsonlTracker, "__init__", counted(JsonlTracker.__init__))
        patch.setattr(Checkpointer, "save", counted(Checkpointer.save))
        patch.setattr(Trainer, "_rewind", counted(Trainer._rewind))
        patch.setattr(checkpoint_tensors, "mark_complete", counted(checkpoint_tensors.mark_complete))
        return poisoned_case(world, tree, poisons)


def run_interrupted(
    pool: RankPool, tree: Tree, poisons: Mapping[int, Poison], interruptions: list[Interruption]
) -> None:
    """Start a run once for each interruption, and then until it is done."""
    for how, after in interruptions:
        if how == "stop":
            assert set(pool.run(poisoned_case, tree, poisons, after)) <= {"stopped", "done"}
        else:
            try:
                assert set(pool.run(killed_case, tree, poisons, after)) == {"done"}
            except RankError as error:
                assert "the process died" in str(error)  # noqa: PT017
    assert set(pool.run(poisoned_case, tree, poisons)) == {"done"}


@pytest.fixture(scope="module")
def uninterrupted(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Returns a function: keys of the config, poisons -> the folder of a run without interruptions."""
    made: dict[str, Path] = {}

    def folder(changes: Tree, poisons: Mapping[int, Poison]) -> Path:
        key = repr((changes, poisons))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("uninterrupted")
            tree = interruptible(made[key], wordpiece_corpus, heldout_corpus, changes)
            assert set(pools[1].run(poisoned_case, tree, poisons)) == {"done"}
        return made[key]

    return folder


def interruptible(folder: Path, corpus: Path, heldout: Path, changes: Tree) -> Tree:
    return run_config(
        folder,
        corpus,
        schedule__steps=STEPS,
        health__policy="rewind",
        corpus__eval={"held": str(heldout)},
        **changes,
    )


def test_an_evaluation_left_to_the_next_attempt_is_logged_once(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    tmp_path: Path,
    uninterrupted: Callable[..., Path],
) -> None:
    """Catches an evaluation that is logged by two attempts, because the first was killed before its next checkpoint."""
    changes = {"evaluation__every_steps": 2}
    tree = interruptible(tmp_path, wordpiece_corpus, heldout_corpus, changes)
    interruptions = [Interruption("stop", 4), Interruption("kill", 6), Interruption("kill", 6)]
    run_interrupted(pools[1], tree, {}, interruptions)
    assert_same_run(uninterrupted(changes, {}), tmp_path, STEPS)


def stopped_in_evaluation_case(world: World, tree: Mapping[str, Any], number: int) -> str:
    """A run whose last rank is asked to stop when its evaluation of this number, from 1, begins."""
    from pretrain.evaluate import HeldOutEvaluator

    metrics, left, stop = HeldOutEvaluator.metrics, number, StopRequest()

    def signalled(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: stop.reason)
        return metrics(*arguments)

    with pytest.MonkeyPatch.context() as patch, receive_stop_requests(stop, None):
        patch.setattr(HeldOutEvaluator, "metrics", signalled)
        return pretrain_case(world, tree, stop=stop)


def test_an_evaluation_is_abandoned_for_a_stop(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches a run that is killed, and loses its steps since the last checkpoint, because a stop waits for the end of
    an evaluation, the first and the last one too, an evaluation that the next attempt does not make, and a checkpoint
    that stays for good because no save follows the last evaluation, after which it is not the best any more."""
    whole, stopped = (
        run_config(
            tmp_path / name,
            wordpiece_corpus,
            schedule__steps=4,
            corpus__eval={"held": str(heldout_corpus)},
            evaluation__every_steps=2,
            evaluation__best_metric="eval/held/loss",
            checkpoint__keep_last=1,
        )
        for name in ("whole", "stopped")
    )
    assert pools[2].run(pretrain_case, whole) == ["done"] * 2
    folder = RunFolder(tmp_path / "stopped")
    for number, evaluated, saved in ((1, [], []), (2, [0], [0, 2]), (1, [0], [0, 2]), (2, [0, 2], [2, 4])):
        assert pools[2].run(stopped_in_evaluation_case, stopped, number) == ["stopped"] * 2
        assert [event["step"] for event in evaluation_events(folder.path)] == evaluated
        assert list(map(checkpoint_step, complete_checkpoints(folder.checkpoints))) == saved
    assert pools[2].run(pretrain_case, stopped) == ["done"] * 2
    assert_same_run(tmp_path / "whole", folder.path, 4)
    assert list(map(checkpoint_step, complete_checkpoints(folder.checkpoints))) == [4]


@pytest.mark.parametrize("seed", [0, *soak(*range(1, 80))])
def test_interruptions_neither_repeat_nor_lose_an_event(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    tmp_path: Path,
    uninterrupted: Callable[..., Path],
    seed: int,
) -> None:
    """Catches events, updates or progress that a sequence of stops, kills and rewinds repeats, loses or changes."""
    draw = random.Random(seed)
    changes = {
        "run__log_every": draw.choice([1, 2, 3]),
        "evaluation__every_steps": draw.choice([1, 2, 3]),
        "checkpoint__every_steps": draw.choice([None, 2, 3]),
        "checkpoint__keep_last": draw.choice([1, 2]),
    }
    poisons = {draw.randrange(2, STEPS + 1): Poison(float("nan"))} if draw.random() < 0.5 else {}
    interruptions = [
        Interruption("stop", draw.randrange(1, 6))
        if draw.random() < 0.5
        else Interruption("kill", draw.randrange(1, 40))
        for _ in range(draw.randrange(2, 6))
    ]
    print(changes, poisons, interruptions)  # pytest shows it if the test fails
    tree = interruptible(tmp_path, wordpiece_corpus, heldout_corpus, changes)
    run_interrupted(pools[1], tree, poisons, interruptions)
    assert_same_run(uninterrupted(changes, poisons), tmp_path, STEPS)
