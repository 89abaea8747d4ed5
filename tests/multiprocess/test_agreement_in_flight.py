"""The ranks agree on a batch while they compute the one before it."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from experiment.checkpoints import checkpoint_path
from experiment.run_folder import RunFolder
from pretrain.world import World
from rank_pool import RankPool
from runs import logged, pretrain_case, run_config, step_events


def recorded_case(world: World, tree: Mapping[str, Any]) -> list[str]:
    """What a run does with agreements and microbatches, in order."""
    from pretrain.engine.engine import Engine
    from pretrain.training.step_agreement import PendingTotals, StepAgreement

    events: list[str] = []

    def record(owner: type, name: str, event: str) -> None:
        original = getattr(owner, name)

        def recorded(*arguments: Any, **named: Any) -> Any:
            events.append(event)
            return original(*arguments, **named)

        patch.setattr(owner, name, recorded)

    with pytest.MonkeyPatch.context() as patch:
        record(StepAgreement, "begin", "begin")
        record(Engine, "accumulate", "compute")
        record(PendingTotals, "wait", "wait")
        pretrain_case(world, tree)
    return events


def test_each_agreement_begins_before_the_step_and_ends_after_it(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches ranks that wait for each other before each step, which takes 0.3 s at 1,024 ranks."""
    tree = run_config(tmp_path, wordpiece_corpus, batch__microbatch_tokens=4000, schedule__steps=3)
    for events in pools[2].run(recorded_case, tree):
        step = ["wait", "begin", "compute", "wait"]
        assert events == ["begin", *step * 3]


def test_ranks_are_compared_once_a_forward_pass_has_ended(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a rank that is called slow because it waited longer for the first batch, before it computed anything."""
    pools[2].run(pretrain_case, run_config(tmp_path, wordpiece_corpus, schedule__steps=3))
    first, *others = logged(tmp_path, "slowest_rank")
    assert first is None
    assert len(others) == 2
    assert set(others) <= {0, 1}


def failing_case(world: World, tree: Mapping[str, Any], failing_step: int) -> str:
    """A run whose data worker fails on the last rank at a step (from 0). Returns the error's message."""
    from pretrain.batching.batch_maker import BatchMaker
    from pretrain.batching.loader import DataWorkerError

    original = BatchMaker.__getitem__

    def make(self: BatchMaker, step: int) -> Any:
        if step == failing_step and world.rank == world.size - 1:
            raise ValueError("made to fail")
        return original(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchMaker, "__getitem__", make)
        try:
            return pretrain_case(world, tree)
        except DataWorkerError as error:
            return str(error)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_step_before_a_batch_that_fails_is_completed(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ranks: int
) -> None:
    """Catches a batch fetched ahead whose failure costs the step before it, and the checkpoint that was due, and ranks
    that start the step although one of them has no batch: they would wait for it."""
    tree = run_config(tmp_path, wordpiece_corpus, checkpoint__every_steps=3, schedule__steps=6)
    messages = pools[ranks].run(failing_case, tree, 3)
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"{platform.node()}, rank {ranks - 1}: the data worker ")
    assert "failed at step 4: ValueError: made to fail" in messages[0]
    assert [event["step"] for event in step_events(tmp_path)] == [1, 2, 3]
    assert checkpoint_path(RunFolder(tmp_path).checkpoints, 3).is_dir()
