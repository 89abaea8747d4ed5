"""Runs whose batches change along the way (stages, batch warmup, mixture, masking rate), and runs by the clock."""

from pathlib import Path
from typing import Any

import pytest
import torch

from experiment.checkpoints import checkpoint_path, complete_checkpoints, read_state
from experiment.run_folder import RunFolder
from rank_pool import RankPool
from runs import (
    NO_DROPOUT,
    TINY,
    Tree,
    events_without_timing,
    logged,
    pretrain_case,
    run_config,
    saved_tensors,
    step_events,
)

STAGES = [{"steps": 4, "max_seq_length": 20, "sequences": 37, "microbatch_tokens": 70}, {}]


def changing(folder: Path, corpus: Path, heldout: Path, ds_config: str = "fp32_zero1", **changes: Any) -> Tree:
    """A run of 8 steps: batches grow for 6 of them, after 4 the sequences get longer; ever fewer spans are masked."""
    tree = run_config(
        folder,
        corpus,
        ds_config,
        corpus__train=[{"path": str(corpus), "weight": 2.0}, {"path": str(heldout)}],
        corpus__eval={"held": str(heldout)},
        masking__unit="span",
        masking__rate=[0.4, 0.1],
        masking__schedule="linear",
        **changes,
    )
    return tree | {"schedule": {"steps": 8, "warmup_steps": 2, "batch_warmup_steps": 6, "stages": STAGES}}


@pytest.fixture(scope="module")
def unbroken(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert set(pools[2].run(pretrain_case, changing(folder, wordpiece_corpus, heldout_corpus))) == {"done"}
    return folder


@pytest.mark.parametrize("stop_after", [2, 4, 5])
def test_a_run_resumes_exactly_wherever_its_stream_is(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    unbroken: Path,
    tmp_path: Path,
    stop_after: int,
) -> None:
    """Catches a position, a stage, a size, a rate or a count of tokens that a checkpoint forgets: within the first
    stage, at its end, and within the second, with dropout, in a batch warmup and a mixture."""
    tree = changing(tmp_path, wordpiece_corpus, heldout_corpus)
    assert set(pools[2].run(pretrain_case, tree, stop_after)) == {"stopped"}
    assert set(pools[2].run(pretrain_case, tree)) == {"done"}
    assert events_without_timing(tmp_path) == events_without_timing(unbroken)
    last, expected = (saved_tensors(checkpoint_path(folder / "checkpoints", 8)) for folder in (tmp_path, unbroken))
    assert all(torch.equal(last[key], expected[key]) for key in expected)


def test_tokens_are_counted_by_corpus(unbroken: Path) -> None:
    """Catches corpora whose tokens are counted per rank, per interval, or under each other's name."""
    last = step_events(unbroken)[-1]
    first, second = last["tokens/text"], last["tokens/text-heldout"]
    assert first + second == last["tokens"]
    assert first / last["tokens"] == pytest.approx(2 / 3, abs=0.1)
    assert logged(unbroken, "tokens/text") == sorted(logged(unbroken, "tokens/text"))
    saved = read_state(checkpoint_path(unbroken / "checkpoints", 8))["progress"]["tokens_by_corpus"]
    assert saved == {"text": first, "text-heldout": second}


@pytest.mark.parametrize(("world_size", "ds_config"), [(2, "fp32_zero3"), (3, "fp32_zero2")])
def test_a_changing_stream_does_not_depend_on_the_layout(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    tmp_path: Path,
    world_size: int,
    ds_config: str,
) -> None:
    """Catches stages, warmup, mixtures and rates that are reckoned by rank or microbatch."""
    model = TINY | NO_DROPOUT
    alone = changing(tmp_path / "alone", wordpiece_corpus, heldout_corpus, "fp32_zero0", model__config=model)
    pools[1].run(pretrain_case, alone)
    shared = changing(tmp_path / "shared", wordpiece_corpus, heldout_corpus, ds_config, model__config=model)
    pools[world_size].run(pretrain_case, shared)
    for key, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3), ("tokens", 0.0), ("tokens/text", 0.0)):
        assert logged(tmp_path / "shared", key) == pytest.approx(logged(tmp_path / "alone", key), rel=tolerance)


def test_a_budget_ends_a_run_and_survives_a_stop(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches ranks that look at their own clocks, spent time that a restart forgets, a rate that does not arrive at
    its floor, and an end without an evaluation or a checkpoint."""
    tree = run_config(tmp_path, wordpiece_corpus, corpus__eval={"held": str(heldout_corpus)})
    tree["schedule"] = {"budget": "3s", "warmup_steps": 2, "min_lr_ratio": 0.1}
    assert set(pools[2].run(pretrain_case, tree, 5)) == {"stopped"}
    stopped = read_state(complete_checkpoints(tmp_path / "checkpoints")[-1])["progress"]
    assert (stopped["step"], 0.0 < stopped["seconds"] < 3.0) == (5, True)
    assert set(pools[2].run(pretrain_case, tree)) == {"done"}

    ended = read_state(complete_checkpoints(tmp_path / "checkpoints")[-1])["progress"]
    rates = logged(tmp_path, "lr")
    assert 3.0 <= ended["seconds"] < 4.5
    assert len(rates) == ended["step"] > 5
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == pytest.approx(0.1 * 3e-3)
    share = stopped["seconds"] / 3.0
    assert 0.7 < rates[5] / (3e-3 * (1.0 - 0.9 * share)) <= 1.0, "the second attempt did not take up the first's clock"
    assert events_without_timing(tmp_path)[-1].keys() > {"step", "eval/held/loss"}
    assert events_without_timing(tmp_path)[-1]["step"] == ended["step"]

    before = RunFolder(tmp_path).metrics.read_text(encoding="utf-8")
    assert set(pools[2].run(pretrain_case, tree)) == {"done"}
    assert RunFolder(tmp_path).metrics.read_text(encoding="utf-8") == before
