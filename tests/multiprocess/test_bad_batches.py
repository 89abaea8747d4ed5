"""Batches whose loss or gradient cannot be trained on, ranks that no longer agree, and runs that end early."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from experiment.checkpoints import checkpoint_path, complete_checkpoints, read_state
from experiment.run_folder import RunFolder
from fp16 import fp16_supported
from pretrain.world import World
from rank_pool import RankPool
from runs import Tree, events_without_timing, logged, pretrain_case, run_config, saved_tensors

NAN, INF = float("nan"), float("inf")
SOAK = pytest.mark.soak


class Poison(NamedTuple):
    """What happens to the loss of a step."""

    factor: float = 1.0  # of the loss, or of its gradient only
    in_loss: bool = True
    added: float = 0.0  # to the loss, of which its gradient knows nothing


def poisoned_case(
    world: World, tree: Mapping[str, Any], poisons: Mapping[int, Poison], stop_after: int | None = None
) -> str:
    """A run whose last rank meets poison in certain steps; its outcome, or why it could not go on.

    A gradient counts as a spike after 3 steps already, and a run is given up after 4 bad ones or 3 rewinds.
    """
    import pretrain.run
    from pretrain.engine.engine import Engine
    from pretrain.modeling.masked_lm import MaskedLanguageModel
    from pretrain.training.health import HealthLimits, UnhealthyError

    here: list[Poison] = []

    class Poisoned(MaskedLanguageModel):
        def forward(self, *microbatch: torch.Tensor) -> Any:
            found = super().forward(*microbatch)
            for factor, in_loss, added in here if self.training else []:
                if in_loss:
                    found = found._replace(loss_sum=found.loss_sum * factor + added)
                else:
                    found.loss_sum.register_hook(lambda gradient, factor=factor: gradient * factor)
            return found

    def accumulate(self: Engine, microbatch: Any, global_masked: int, step: int, number: int) -> Any:
        here[:] = [poisons[step + 1]] if step + 1 in poisons and world.rank == world.size - 1 else []
        return original(self, microbatch, global_masked, step, number)

    with pytest.MonkeyPatch.context() as patch, fp16_supported():
        original = Engine.accumulate
        patch.setattr(Engine, "accumulate", accumulate)
        patch.setattr(pretrain.run, "MaskedLanguageModel", Poisoned)
        try:
            return pretrain_case(world, tree, stop_after, HealthLimits(min_norms=3, max_consecutive=4, max_rewinds=3))
        except UnhealthyError as error:
            return str(error)


def saved_progress(folder: Path, step: int) -> Tree:
    """All that a checkpoint says of its run, but for the time."""
    state = read_state(checkpoint_path(folder / "checkpoints", step))
    progress = {key: value for key, value in state["progress"].items() if key != "seconds"}
    return progress | {"loss_scaler": state["loss_scaler"]}


def same(one: Path, other: Path, step: int) -> bool:
    """Whether two runs are the same up to their last bit."""
    kept = [saved_tensors(checkpoint_path(folder / "checkpoints", step)) for folder in (one, other)]
    return (
        events_without_timing(one) == events_without_timing(other)
        and saved_progress(one, step) == saved_progress(other, step)
        and kept[0].keys() == kept[1].keys()
        and all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])
    )


POISONS = {
    "loss": Poison(NAN),
    "gradient": Poison(NAN, in_loss=False),
    "spike": Poison(1e4),
    "alone": Poison(added=INF),
}
BAD_SAMPLE = [("fp32_zero0", "spike"), ("bf16_zero1", "gradient"), ("fp32_zero3", "alone"), ("fp16_zero2", "loss")]


@pytest.mark.parametrize(
    ("ds_config", "poison"),
    [
        pytest.param(*case, marks=() if case in BAD_SAMPLE else SOAK)
        for case in itertools.product(
            [f"{precision}_zero{stage}" for precision in ("fp32", "bf16", "fp16") for stage in range(4)], POISONS
        )
        if case[0] not in ("bf16_zero0", "fp16_zero0")  # which run as stage 1
        if case[0][:4] != "fp16" or case[1] in ("loss", "alone")  # the others overflow, which is no fault
    ],
)
def test_a_bad_batch_under_each_policy(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str, poison: str
) -> None:
    """Catches an update from a bad batch, ranks that decide differently and hang, steps that a rewind logs twice or
    forgets, and a resume that does not go on where the policy stopped.

    The three policies end in the same run, bit by bit, dropout included.
    """
    trees = {
        policy: run_config(
            tmp_path / policy,
            wordpiece_corpus,
            ds_config,
            run__log_every=2,
            schedule__steps=8,
            checkpoint__every_steps=3,
            health__policy=policy,
        )
        for policy in ("skip", "rewind", "stop")
    }
    bad = {5: POISONS[poison]}
    assert pools[2].run(poisoned_case, trees["skip"], bad) == ["done", "done"]
    assert saved_progress(tmp_path / "skip", 3)["skipped"] == []
    assert saved_progress(tmp_path / "skip", 8)["skipped"] == [5]
    assert logged(tmp_path / "skip", "step") == [2, 4, 6, 8]
    assert None not in logged(tmp_path / "skip")

    assert pools[2].run(poisoned_case, trees["rewind"], bad) == ["done", "done"]
    said = RunFolder(tmp_path / "rewind").rank_log(0).read_text(encoding="utf-8")
    assert "rewound to step 3" in said
    assert "OVERFLOW" not in said  # DeepSpeed's word for it
    assert same(tmp_path / "skip", tmp_path / "rewind", 8)

    messages = pools[2].run(poisoned_case, trees["stop"], bad)
    assert messages[0] == messages[1]
    assert messages[0].startswith("step 5: the ")
    assert "--health.policy=skip" in messages[0]
    assert complete_checkpoints(tmp_path / "stop" / "checkpoints")[-1].name == "step-00000004"
    again = trees["stop"] | {"health": {"policy": "skip"}}
    assert pools[2].run(poisoned_case, again, bad) == ["done", "done"]
    assert same(tmp_path / "skip", tmp_path / "stop", 8)


@pytest.mark.parametrize("ds_config", ["fp32_zero1", *(pytest.param(f"bf16_zero{n}", marks=SOAK) for n in (1, 2, 3))])
def test_a_run_goes_back_to_its_very_beginning(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path, ds_config: str
) -> None:
    """Catches a run that has nothing to go back to, moments that stay where the beginning has none, and what was
    evaluated and logged before that is evaluated or logged anew."""
    for policy in ("skip", "rewind"):
        tree = run_config(
            tmp_path / policy,
            wordpiece_corpus,
            ds_config,
            health__policy=policy,
            corpus__eval={"held": str(heldout_corpus)},
            evaluation__every_steps=2,
        )
        assert pools[2].run(poisoned_case, tree, {4: Poison(NAN)}) == ["done", "done"]
    assert complete_checkpoints(tmp_path / "rewind" / "checkpoints")[0].name == "step-00000000"
    assert same(tmp_path / "skip", tmp_path / "rewind", 6)


def test_a_resume_leaves_out_what_was_found_bad_further_on(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a skip list that is forgotten: the run went back before the bad step, and was stopped before it again."""
    trees = [
        run_config(
            tmp_path / policy, wordpiece_corpus, schedule__steps=8, checkpoint__every_steps=3, health__policy=policy
        )
        for policy in ("skip", "rewind")
    ]
    bad = {6: Poison(NAN)}
    assert set(pools[2].run(poisoned_case, trees[0], bad)) == {"done"}
    # Steps 1 to 6, then 4 again: the seventh question whether to stop is the one before step 4.
    assert set(pools[2].run(poisoned_case, trees[1], bad, 7)) == {"stopped"}
    assert complete_checkpoints(tmp_path / "rewind" / "checkpoints")[-1].name == "step-00000004"
    assert saved_progress(tmp_path / "rewind", 4)["skipped"] == [6]
    assert set(pools[2].run(poisoned_case, trees[1], {})) == {"done"}
    assert same(tmp_path / "skip", tmp_path / "rewind", 8)


def test_the_bad_batch_can_be_looked_at(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a batch that is gone when somebody asks what was wrong with it, or of which a share is missing."""
    tree = run_config(tmp_path, wordpiece_corpus, schedule__steps=3, health__policy="skip")
    pools[2].run(poisoned_case, tree, {3: Poison(NAN)})
    folder = tmp_path / "health" / "step-00000003"
    fault = json.loads((folder / "fault.json").read_text(encoding="utf-8"))
    assert fault["step"] == 3
    assert fault["loss"] is None
    assert "the loss is nan" in fault["what"]
    shares = [
        [json.loads(line) for line in (folder / f"rank-0000{rank}.jsonl").read_text(encoding="utf-8").splitlines()]
        for rank in range(2)
    ]
    assert len(shares[0]) + len(shares[1]) == 29
    assert None not in [sequence["microbatch_loss"] for sequence in shares[0]]
    assert {sequence["microbatch_loss"] for sequence in shares[1]} == {None}
    assert len({sequence["sequence"] for share in shares for sequence in share}) == 29
    assert any("[MASK]" in sequence["shown"] for share in shares for sequence in share)
    assert not any("[MASK]" in sequence["text"] for share in shares for sequence in share)


def full_disk_case(world: World, tree: Mapping[str, Any]) -> str:
    """A run that meets poison in step 3 and cannot save."""
    import pretrain.training.checkpointer

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.training.checkpointer, "write_hugging_face_folder", full)
        return poisoned_case(world, tree, {3: Poison(NAN)})


def test_a_bad_batch_is_told_where_the_state_before_it_cannot_be_saved(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a run that ends over a full disk and says nothing of the batch it had stopped at."""
    assert pools[2].run(full_disk_case, run_config(tmp_path, wordpiece_corpus)) == ["stopped", "stopped"]
    log = RunFolder(tmp_path).rank_log(0).read_text(encoding="utf-8")
    assert "step 3: the loss is nan" in log
    assert "no checkpoint can be written" in log


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_weights_that_are_bad_end_the_run(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, policy: str
) -> None:
    """Catches a run that skips, or goes back, for ever since nothing it does helps."""
    tree = run_config(tmp_path, wordpiece_corpus, schedule__steps=20, health__policy=policy)
    (message,) = pools[1].run(poisoned_case, tree, {step: Poison(NAN) for step in range(3, 21)})
    assert message.startswith("step 6: the loss is nan")
    assert "the last 4 steps were all bad" in message


def test_a_run_does_not_go_back_for_ever(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a run that spends its life between one checkpoint and the next."""
    tree = run_config(tmp_path, wordpiece_corpus, schedule__steps=20, health__policy="rewind")
    (message,) = pools[1].run(poisoned_case, tree, {step: Poison(NAN) for step in range(2, 21, 2)})
    assert message.startswith("step 8: the loss is nan")
    assert "rewound to step 0 3 times" in message


def flipped_case(world: World, tree: Mapping[str, Any], flipped_rank: int) -> str:
    """A run in which one rank's copy of a weight changes by one bit after step 4; why it could not go on."""
    from pretrain.engine.engine import Engine
    from pretrain.training.health import UnhealthyError

    def begin_step(self: Engine, step: int, learning_rate: float) -> None:
        steps.append(step + 1)
        began(self, step, learning_rate)

    def step(self: Engine, limit: float) -> Any:
        result = stepped(self, limit)
        if steps[-1] == 4 and world.rank == flipped_rank:
            weight = dict(self._deepspeed.module.named_parameters())[
                "model.bert.encoder.layer.1.attention.output.dense.weight"
            ]
            bits = weight.data.view(-1)[7:8].view(torch.uint8)
            bits[0] ^= 1
        return result

    steps: list[int] = []
    began, stepped = Engine.begin_step, Engine.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "begin_step", begin_step)
        patch.setattr(Engine, "step", step)
        try:
            return pretrain_case(world, tree)
        except UnhealthyError as error:
            return str(error)


@pytest.mark.parametrize(
    ("world_size", "ds_config"),
    [
        (3, "fp32_zero0"),
        (3, "bf16_zero1"),
        pytest.param(3, "fp32_zero2", marks=SOAK),
        (2, "fp32_zero3"),
        pytest.param(2, "fp32_zero0", marks=SOAK),
    ],
)
def test_a_rank_whose_weights_changed_is_named(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, world_size: int, ds_config: str
) -> None:
    """Catches silent corruption, and a comparison that some ranks leave alone, in which the others then wait."""
    tree = run_config(tmp_path, wordpiece_corpus, ds_config, health__compare_every=2)
    messages = pools[world_size].run(flipped_case, tree, 1)
    who = "rank 1 differs from the others" if world_size == 3 else "ranks 0 and 1 differ from each other"
    what = f"step 4: {who} in the weights of bert.encoder.layer.1.attention.output.dense.weight"
    assert all(message.startswith(what) for message in messages)
    assert len(messages) == world_size


def scripted_case(world: World, tree: Mapping[str, Any], losses: Sequence[float], stop_after: int | None = None) -> str:
    """A run whose evaluations find these losses, one after the other."""
    from pretrain.evaluate import HeldOutEvaluator

    left = list(losses)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOutEvaluator, "metrics", lambda *_: {"eval/held/loss": left.pop(0)})
        return pretrain_case(world, tree, stop_after)


def test_the_best_checkpoint_stays_and_patience_ends_the_run(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches a best checkpoint that is deleted or never saved, an evaluation too many or too few, a run that ends as
    failed or trains on when it is started again, a count that a restart forgets, and an overfitted model passed by in
    silence."""

    def tree(name: str, patience: int = 3) -> Tree:
        return run_config(
            tmp_path / name,
            wordpiece_corpus,
            schedule__steps=12,
            run__log_every=4,
            corpus__eval={"held": str(heldout_corpus)},
            evaluation__every_steps=1,
            evaluation__best_metric="eval/held/loss",
            evaluation__patience=patience,
            evaluation__overfitting_after=2,
            checkpoint__keep_last=1,
        )

    losses = [5.0, 4.0, 3.00001, 3.2, 3.4, 3.6]
    assert pools[2].run(scripted_case, tree("unbroken"), losses) == ["done", "done"]
    checkpoints = tmp_path / "unbroken" / "checkpoints"
    assert [path.name for path in complete_checkpoints(checkpoints)] == ["step-00000002", "step-00000005"]
    assert (checkpoints / "best").read_text(encoding="utf-8") == "step-00000002\n"
    said = RunFolder(tmp_path / "unbroken").rank_log(0).read_text(encoding="utf-8")
    assert "stopping early: eval/held/loss has not improved for 3 evaluations; the best was 3 at step 2" in said
    assert pools[2].run(scripted_case, tree("unbroken"), []) == ["done", "done"]

    assert pools[2].run(scripted_case, tree("stopped"), losses[:4], 4) == ["stopped", "stopped"]
    assert pools[2].run(scripted_case, tree("stopped"), losses[4:]) == ["done", "done"]
    assert same(tmp_path / "unbroken", tmp_path / "stopped", 5)

    assert pools[2].run(scripted_case, tree("stopped", patience=4), [2.5, *[4.0] * 4]) == ["done", "done"]
    assert (tmp_path / "stopped" / "checkpoints" / "best").read_text(encoding="utf-8") == "step-00000006\n"


def test_what_health_remembers_survives_a_restart(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches a window of norms that begins anew, in which the next spike is none."""
    runs = {}
    for name, stop_after in (("unbroken", None), ("stopped", 5)):
        tree = run_config(
            tmp_path / name,
            wordpiece_corpus,
            schedule__steps=9,
            corpus__eval={"held": str(heldout_corpus)},
            evaluation__every_steps=2,
            evaluation__best_metric="eval/held/accuracy",
            health__policy="skip",
        )
        bad = {3: Poison(NAN), 6: Poison(1e4)}
        assert len(set(pools[2].run(poisoned_case, tree, bad, stop_after))) == 1
        if stop_after is not None:
            assert set(pools[2].run(poisoned_case, tree, bad)) == {"done"}
        runs[name] = saved_progress(tmp_path / name, 9)
    assert runs["unbroken"]["skipped"] == [3, 6]
    assert len(runs["unbroken"]["norms"]) == 7
    assert same(tmp_path / "unbroken", tmp_path / "stopped", 9)
