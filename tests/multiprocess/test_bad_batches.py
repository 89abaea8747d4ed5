"""Bad batches: a loss or gradient that is not finite or spikes, under each `health.policy`."""

import itertools
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from experiment.run_files.checkpoints import complete_checkpoints
from experiment.run_files.run_folder import RunFolder
from poison import Poison, poisoned_case, runs_by_policy
from pretrain.batching.sequences import open_index
from pretrain.corpus.reader import open_corpus
from pretrain.world import World
from rank_pool import RankPool
from runs import assert_same_run, logged, run_config, sampled, saved_progress, soak

NAN, INF = float("nan"), float("inf")

POISONS = {
    "loss": Poison(NAN),
    "gradient": Poison(NAN, in_loss=False),
    "spike": Poison(1e4),
    "alone": Poison(added=INF),
}
CASES = [
    (f"{precision}_zero{stage}", poison)
    for precision, stage, poison in itertools.product(("fp32", "bf16", "fp16"), range(4), POISONS)
    if precision == "fp32" or stage > 0  # 16-bit stage 0 runs as stage 1
    if precision != "fp16" or poison in ("loss", "alone")  # the others are ordinary overflows in fp16
]
CASES += [("bf16_zero2_cpu_offload", "gradient")]
# A spike: `test_recent_gradient_norms_survive_a_resume`. ZeRO 0: `test_a_vetoed_update_changes_nothing`.
SAMPLE = [("bf16_zero1", "gradient"), ("fp32_zero3", "alone"), ("fp16_zero2", "loss")]


@pytest.mark.parametrize(
    ("ds_config", "poison"),
    sampled(CASES, SAMPLE),
)
def test_a_bad_batch_under_each_policy(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str, poison: str
) -> None:
    """Catches an update from a bad batch, ranks that respond differently and hang, steps that a rewind logs twice or
    not at all, and a resume at another step than the one the policy stopped at.

    The three policies end in the same run, bit by bit, with dropout.
    """
    trees = runs_by_policy(tmp_path, wordpiece_corpus, ds_config, 5)
    bad = {4: POISONS[poison]}
    assert pools[2].run(poisoned_case, trees["skip"], bad) == ["done", "done"]
    assert saved_progress(tmp_path / "skip", 2)["skipped"] == []
    assert saved_progress(tmp_path / "skip", 5)["skipped"] == [4]
    assert logged(tmp_path / "skip", "step") == [3, 5]
    assert None not in logged(tmp_path / "skip")

    assert pools[2].run(poisoned_case, trees["rewind"], bad) == ["done", "done"]
    log = RunFolder(tmp_path / "rewind").rank_log(0).read_text(encoding="utf-8")
    assert "rewound to step 2" in log
    assert "OVERFLOW" not in log  # DeepSpeed's message
    assert_same_run(tmp_path / "skip", tmp_path / "rewind", 5)

    if (ds_config, poison) in SAMPLE[1:]:  # once is enough in `make test`
        return
    messages = pools[2].run(poisoned_case, trees["stop"], bad)
    assert messages[0] == messages[1]
    assert messages[0].startswith("step 4: the ")
    assert "--health.policy=skip" in messages[0]
    log = RunFolder(tmp_path / "stop").rank_log(0).read_text(encoding="utf-8")
    assert log.count(messages[0].partition("\n")[0]) == log.count("its batch: ") == 1
    assert complete_checkpoints(tmp_path / "stop" / "checkpoints")[-1].name == "step-00000003"
    again = trees["stop"] | {"health": {"policy": "skip"}}
    assert pools[2].run(poisoned_case, again, bad) == ["done", "done"]
    assert_same_run(tmp_path / "skip", tmp_path / "stop", 5)


@pytest.mark.parametrize(
    ("ranks", "ds_config"),
    [(1, "fp32_zero1"), *soak((2, "fp32_zero1"), (2, "bf16_zero1"), (2, "bf16_zero2"), (2, "bf16_zero3"))],
)
def test_a_rewind_to_step_0(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path, ranks: int, ds_config: str
) -> None:
    """Catches a run without a checkpoint to rewind to, optimizer state that survives a rewind to where there was none,
    and evaluations or log events that a rewind repeats."""
    for policy in ("skip", "rewind"):
        tree = run_config(
            tmp_path / policy,
            wordpiece_corpus,
            ds_config,
            schedule__steps=4,
            health__policy=policy,
            corpus__eval={"held": str(heldout_corpus)},
            evaluation__every_steps=2,
        )
        # With data workers, which start again after a rewind.
        assert set(pools[ranks].run(poisoned_case, tree, {3: Poison(NAN)}, None, True)) == {"done"}
    assert complete_checkpoints(tmp_path / "rewind" / "checkpoints")[0].name == "step-00000000"
    assert_same_run(tmp_path / "skip", tmp_path / "rewind", 4)


def test_bad_steps_survive_a_resume_before_them(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a list of bad steps that is lost if a run rewinds and is stopped before it reaches the bad step again."""
    trees = [
        run_config(
            tmp_path / policy, wordpiece_corpus, schedule__steps=5, checkpoint__every_steps=2, health__policy=policy
        )
        for policy in ("skip", "rewind")
    ]
    bad = {4: Poison(NAN)}
    assert pools[1].run(poisoned_case, trees[0], bad) == ["done"]
    # Steps 1 to 4, then 3 again, which is the fifth check for a stop request.
    assert pools[1].run(poisoned_case, trees[1], bad, 5) == ["stopped"]
    assert complete_checkpoints(tmp_path / "rewind" / "checkpoints")[-1].name == "step-00000003"
    assert saved_progress(tmp_path / "rewind", 3)["skipped"] == [4]
    assert pools[1].run(poisoned_case, trees[1], {}) == ["done"]
    assert_same_run(tmp_path / "skip", tmp_path / "rewind", 5)


def full_disk_case(world: World, tree: Mapping[str, Any]) -> str:
    """A run that is poisoned in step 3 and cannot save."""
    import pretrain.training.checkpointer

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.training.checkpointer, "write_hugging_face_folder", full)
        return poisoned_case(world, tree, {3: Poison(NAN)})


def test_a_bad_batch_is_logged_and_dumped_although_the_disk_is_full(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a run that reports only the full disk and not the bad batch that made it save, and a bad batch that
    cannot be inspected, of which a rank's share is missing, or whose rank is not named."""
    assert pools[2].run(full_disk_case, run_config(tmp_path, wordpiece_corpus)) == ["stopped", "stopped"]
    log = RunFolder(tmp_path).rank_log(0).read_text(encoding="utf-8")
    assert log.count("step 3: the loss is nan") == 1
    assert "no checkpoint can be written" in log
    folder = tmp_path / "health" / "step-00000003"
    fault = json.loads((folder / "fault.json").read_text(encoding="utf-8"))
    assert fault["step"] == 3
    assert fault["loss"] is None
    assert fault["what"] == f"step 3: the loss is nan on {platform.node()}, rank 1"
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


@pytest.mark.parametrize("policy", ["skip", *soak("rewind")])
def test_consecutive_bad_batches_end_the_run(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, policy: str
) -> None:
    """Catches a run with broken weights that skips or rewinds endlessly."""
    tree = run_config(tmp_path, wordpiece_corpus, schedule__steps=20, health__policy=policy)
    (message,) = pools[1].run(poisoned_case, tree, {step: Poison(NAN) for step in range(3, 21)})
    assert message.startswith("step 6: the loss is nan")
    assert "the last 4 steps were all bad" in message


def test_rewinds_are_limited(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a run that endlessly rewinds to the same checkpoint."""
    tree = run_config(tmp_path, wordpiece_corpus, schedule__steps=20, health__policy="rewind")
    (message,) = pools[1].run(poisoned_case, tree, {step: Poison(NAN) for step in range(2, 21, 2)})
    assert message.startswith("step 8: the loss is nan")
    assert "rewound to step 0 3 times" in message


def test_recent_gradient_norms_survive_a_resume(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches a window of norms that a resume empties, so that the next spike passes as normal, and a spike factor that
    has no effect."""
    runs = {}
    for name, stop_after in (("uninterrupted", None), ("stopped", 5)):
        tree = run_config(
            tmp_path / name,
            wordpiece_corpus,
            schedule__steps=7,
            corpus__eval={"held": str(heldout_corpus)},
            evaluation__every_steps=4,
            evaluation__best_metric="eval/held/accuracy",
            health__policy="skip",
            health__spike_factor=3.0,
        )
        bad = {3: Poison(NAN), 6: Poison(10.0)}
        assert len(set(pools[2].run(poisoned_case, tree, bad, stop_after))) == 1
        if stop_after is not None:
            assert set(pools[2].run(poisoned_case, tree, bad)) == {"done"}
        runs[name] = saved_progress(tmp_path / name, 7)
    assert runs["uninterrupted"]["skipped"] == [3, 6]
    assert len(runs["uninterrupted"]["norms"]) == 5
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "stopped", 7)


def test_a_small_rest_of_an_epoch_is_no_spike(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a run that fails in its last step because its last batch is one sequence, or that updates with NaN."""
    for name, poison, skipped in (("spike", Poison(1e4), []), ("nan", Poison(NAN), [6])):
        sequences = len(open_index(open_corpus(wordpiece_corpus), 38, tmp_path))
        tree = run_config(tmp_path / name, wordpiece_corpus, health__policy="skip")
        tree["schedule"] = {"epochs": (5 * 29 + 1) / sequences, "warmup_steps": 2}
        assert pools[1].run(poisoned_case, tree, {6: poison}) == ["done"]
        assert saved_progress(tmp_path / name, 6)["skipped"] == skipped
