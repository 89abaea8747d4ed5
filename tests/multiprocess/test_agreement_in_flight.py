"""The ranks agree on a batch while they compute the one before it."""

import platform
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from experiment.run_files.checkpoints import checkpoint_path
from experiment.run_files.run_folder import RunFolder
from pretrain.world import World
from rank_pool import RankPool
from runs import events_without_timing, logged, pretrain_case, run_config, step_events


def recorded_case(world: World, tree: Mapping[str, Any]) -> list[str]:
    """What a run does with agreements and microbatches, in order."""
    from experiment.run_files.goodput import ActivityTimer
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
        record(ActivityTimer, "make_progress", "progress")
        pretrain_case(world, tree)
    return events


def test_each_agreement_begins_before_the_step_and_ends_after_it(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches ranks that wait for each other before each step, which takes 0.3 s at 1,024 ranks, and a long step
    of many microbatches that counts as hung."""
    tree = run_config(tmp_path, wordpiece_corpus, batch__microbatch_tokens=300, schedule__steps=3)
    for events in pools[2].run(recorded_case, tree):
        assert ("compute", "compute") not in pairwise(events)
        step = ["wait", "begin", "compute", "compute", "wait"]
        assert [event for event in events if event != "progress"] == ["begin", *step * 3]


def slow_rank_case(world: World, tree: Mapping[str, Any], slow: Sequence[int]) -> str:
    """A run in which the forward passes of one rank seem to take 1,000 seconds longer. `slow`: the rank, in each log
    interval."""
    from pretrain.engine.phases import ForwardTimer

    take, slow_ranks = ForwardTimer.take, iter(slow)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ForwardTimer, "take", lambda timer: take(timer) + 1000.0 * (world.rank == next(slow_ranks)))
        return pretrain_case(world, tree)


def test_ranks_are_compared_in_every_log_event(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches an event without the slowest rank, such as the last one, and times of ranks that change places or are
    added up."""
    tree = run_config(tmp_path, wordpiece_corpus, run__log_every=2, schedule__steps=3)
    pools[2].run(slow_rank_case, tree, [0, 1])
    assert logged(tmp_path, "step") == [2, 3]
    assert logged(tmp_path, "slowest_rank") == [0, 1]
    assert min(logged(tmp_path, "slowest_rank_ratio")) > 1.5


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
            return pretrain_case(world, tree, data_worker=True)
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


class _Event:
    """An event of a GPU that has not been reached when the host asks for the first time."""

    reached = False

    def record(self) -> None: ...

    def query(self) -> bool:
        before, self.reached = self.reached, True
        return before


def device_sums_case(world: World, tree: Mapping[str, Any], stop_after: int) -> tuple[str, list[str]]:
    """A run whose ranks agree as those with GPUs do. Returns its outcome, and steps and collectives of the hosts, in
    order."""
    import torch

    from pretrain.engine.engine import Engine
    from pretrain.engine.host_copy import HostCopy
    from pretrain.training import trainer
    from pretrain.training.cpu_group import CpuGroup
    from pretrain.training.step_agreement import DeviceSums, StepAgreement

    events: list[str] = []
    read = HostCopy.wait

    def recorded(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            events.append(name)
            return original(*arguments, **named)

        patch.setattr(owner, name, call)

    def wait(self: HostCopy) -> list[int]:
        numbers = read(self)
        assert self._copied.query(), "read before the event"
        return numbers

    def agreement(_group: CpuGroup, *arguments: Any) -> StepAgreement:
        return StepAgreement(DeviceSums(torch.device("cpu"), lambda: None), *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", lambda _device: None)
        patch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr(trainer, "StepAgreement", agreement)
        patch.setattr(HostCopy, "wait", wait)
        recorded(Engine, "step")
        for name in ("start_all_reduce_sum", "all_gather_objects", "from_rank0", "barrier"):
            recorded(CpuGroup, name)
        return pretrain_case(world, tree, stop_after), events


@pytest.mark.parametrize(("stop_after", "outcome"), [(4, "done"), (2, "stopped")])
def test_gpus_agree_without_a_collective_of_the_hosts(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, stop_after: int, outcome: str
) -> None:
    """Catches a collective of the hosts in each step, which takes longer than a short one at 1,024 ranks, totals that
    differ from those of the hosts, a stop that only one rank learns of, and one in the last step that leaves a finished
    run to be resumed."""
    trees = [run_config(tmp_path / name, wordpiece_corpus, schedule__steps=4) for name in ("hosts", "gpus")]
    assert set(pools[2].run(pretrain_case, trees[0], stop_after)) == {outcome}
    for found, events in pools[2].run(device_sums_case, trees[1], stop_after):
        assert found == outcome
        first, last = events.index("step"), len(events) - 1 - events[::-1].index("step")
        assert events[first : last + 1] == ["step"] * stop_after
    hosts, gpus = (events_without_timing(tmp_path / name) for name in ("hosts", "gpus"))
    assert hosts == gpus
    assert len(step_events(tmp_path / "gpus")) == stop_after
