"""On a GPU the host queues the next microbatch before it knows whether the last update was applied."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiment.run_files.checkpoints import complete_checkpoints
from experiment.run_files.run_folder import RunFolder
from poison import Poison, poisoned_case, runs_by_policy
from pretrain.world import World
from rank_pool import ForkServer, RankPool
from runs import Tree, assert_same_run, logged, run_config, saved_progress, soak
from simulated_gpu.gpu import simulated_gpu

pytest.importorskip("triton")

NAN = float("nan")
POISONS = {"loss": Poison(NAN), "spike": Poison(1e4), "gradient": Poison(NAN, in_loss=False)}


@pytest.fixture(scope="module")
def ranks(fork_server: ForkServer) -> Iterator[dict[int, RankPool]]:
    pools = {size: RankPool(fork_server, size) for size in (1, 2)}
    yield pools
    for pool in pools.values():
        pool.close()


def ahead_case(
    world: World, tree: Tree, poisons: dict[int, Poison], stop_after: int | None = None
) -> tuple[str, list[str], list[str]]:
    """A run on the simulated GPU, poisoned in some steps. Returns its outcome, in which order its host starts
    microbatches ("m") and steps ("s"), waits for the GPU in a step but the first ("w") and reads results of steps
    ("r"), and races."""
    from pretrain.engine.engine import Engine, PendingStep

    calls: list[str] = []

    def recorded(call: Any, name: str) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            is_first = name not in calls
            calls.append(name)
            before = len(gpu.waits)
            result = call(*args, **options)
            if name == "s" and not is_first:
                calls.extend("w" for _ in gpu.waits[before:])
            return result

        return run

    with pytest.MonkeyPatch.context() as patch, simulated_gpu() as gpu:
        patch.setattr(Engine, "accumulate", recorded(Engine.accumulate, "m"))
        patch.setattr(Engine, "step", recorded(Engine.step, "s"))
        patch.setattr(PendingStep, "wait", recorded(PendingStep.wait, "r"))
        return poisoned_case(world, tree, poisons, stop_after), calls, gpu.races


@pytest.mark.parametrize(
    ("ds_config", "changes", "order"),
    [
        ("bf16_zero1", {}, "mms mr ms mr ms r"),
        ("bf16_zero1", {"optimizer__name": "muon"}, "mms r mmsw r mmsw r"),
        *soak(
            ("fp32_zero1", {}, "mms mr ms mr ms r"),
            ("bf16_zero1", {"optimizer__name": "lamb"}, "mms r mmsw r mmsw r"),
            ("bf16_zero1", {"optimizer__name": "stableadamw"}, "mms r mmsw r mmsw r"),
            ("bf16_zero1", {"model__ema_decay": 0.9}, "mms r mmsw r mmsw r"),
            ("fp16_zero1", {}, "mms r mmsw r mmsw r"),
            ("bf16_zero2", {}, "mms r mmsw r mmsw r"),
        ),
    ],
)
def test_the_next_microbatch_is_queued_before_the_norm_is_read(
    ranks: dict[int, RankPool],
    wordpiece_corpus: Path,
    tmp_path: Path,
    ds_config: str,
    changes: dict[str, Any],
    order: str,
) -> None:
    """Catches a GPU without work until the host has read the norm, and a microbatch that is queued although the
    optimizer needs the host's decision, or the next microbatch the new loss scale."""
    tree = run_config(tmp_path, wordpiece_corpus, ds_config, schedule__steps=3, **changes)
    for outcome, calls, races in ranks[2].run(ahead_case, tree, {}):
        assert (outcome, races) == ("done", [])
        assert "".join(calls) == order.replace(" ", "")


TWO_BAD = {3: POISONS["loss"], 4: POISONS["loss"]}


def one_rank(folder: Path, corpus: Path, policy: str) -> Tree:
    """A run of five steps with two microbatches each."""
    tree = runs_by_policy(folder, corpus, "bf16_zero1", 5)[policy]
    tree["batch"]["sequences"] = 14
    return tree


@pytest.fixture(scope="module")
def skipping(ranks: dict[int, RankPool], wordpiece_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that skips two bad batches in a row: the second is queued before the norm of the first is read."""
    folder = tmp_path_factory.mktemp("runs")
    tree = one_rank(folder, wordpiece_corpus, "skip")
    assert [outcome for outcome, _, _ in ranks[1].run(ahead_case, tree, TWO_BAD)] == ["done"]
    return folder / "skip"


def test_a_run_that_rewinds_ends_as_one_that_skips(
    ranks: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, skipping: Path
) -> None:
    """Catches an update from a bad batch, moments or step counters that it changes, and a microbatch that counts twice,
    not at all, or after a rewind: the two runs are the same, bit by bit."""
    tree = one_rank(tmp_path, wordpiece_corpus, "rewind")
    assert [outcome for outcome, _, _ in ranks[1].run(ahead_case, tree, TWO_BAD)] == ["done"]
    assert "rewound to step 2" in RunFolder(tmp_path / "rewind").rank_log(0).read_text(encoding="utf-8")
    assert saved_progress(skipping, 5)["skipped"] == [3, 4]
    assert None not in logged(skipping)
    assert_same_run(skipping, tmp_path / "rewind", 5)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("size", "poison"),
    [(1, "loss"), (2, "loss"), (2, "spike"), (2, "gradient")],  # ranks that disagree: `test_bad_batches.py`
)
def test_a_bad_batch_after_which_a_microbatch_is_queued(
    ranks: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, size: int, poison: str
) -> None:
    """Catches the same on two ranks, with other bad batches, and under the policy `stop`, whose run is resumed."""
    trees = runs_by_policy(tmp_path, wordpiece_corpus, "bf16_zero1", 5)
    bad = {4: POISONS[poison]}
    for policy in ("skip", "rewind"):
        assert [found[0] for found in ranks[size].run(ahead_case, trees[policy], bad)] == ["done"] * size
    assert saved_progress(tmp_path / "skip", 5)["skipped"] == [4]
    assert "rewound to step 2" in RunFolder(tmp_path / "rewind").rank_log(0).read_text(encoding="utf-8")
    assert None not in logged(tmp_path / "skip")
    assert_same_run(tmp_path / "skip", tmp_path / "rewind", 5)
    messages = [found[0] for found in ranks[size].run(ahead_case, trees["stop"], bad)]
    assert messages[0].startswith("step 4: the ")
    assert complete_checkpoints(tmp_path / "stop" / "checkpoints")[-1].name == "step-00000003"
    again = trees["stop"] | {"health": {"policy": "skip"}}
    assert [found[0] for found in ranks[size].run(ahead_case, again, bad)] == ["done"] * size
    assert_same_run(tmp_path / "skip", tmp_path / "stop", 5)


def test_a_stopped_run_resumes_to_the_same_weights(
    ranks: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, skipping: Path
) -> None:
    """Catches a microbatch that is queued although the run stops, and one that the resumed run leaves out."""
    tree = one_rank(tmp_path, wordpiece_corpus, "skip")
    for _ in range(2):
        found = ranks[1].run(ahead_case, tree, TWO_BAD, 2)
        assert [(outcome, calls[-2:]) for outcome, calls, _ in found] == [("stopped", ["s", "r"])]
    assert [outcome for outcome, _, _ in ranks[1].run(ahead_case, tree, TWO_BAD)] == ["done"]
    assert_same_run(skipping, tmp_path / "skip", 5)
