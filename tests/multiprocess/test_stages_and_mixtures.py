"""Runs whose batches change: stages, batch warmup, a mixture of corpora, a scheduled masking rate."""

from pathlib import Path
from typing import Any

import pytest

from experiment.run_files.checkpoints import checkpoint_path, read_state
from rank_pool import RankPool
from runs import (
    NO_DROPOUT,
    SHALLOW,
    Tree,
    assert_same_tensors,
    events_without_timing,
    logged,
    planned,
    pretrain_case,
    run_config,
    saved_tensors,
    soak,
    step_events,
)

STAGES = [{"steps": 4, "max_seq_length": 20, "sequences": 37, "microbatch_tokens": 70}, {}]


def changing_config(folder: Path, corpus: Path, heldout: Path, ds_config: str = "fp32_zero1", **changes: Any) -> Tree:
    """Config of 8 steps: batches grow for 6 steps, sequences are longer after 4, and the masking rate falls."""
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
def uninterrupted(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert set(pools[2].run(pretrain_case, changing_config(folder, wordpiece_corpus, heldout_corpus))) == {"done"}
    return folder


def test_a_run_resumes_exactly_in_any_stage(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    uninterrupted: Path,
    tmp_path: Path,
) -> None:
    """Catches a position, stage, batch size, masking rate or token count that a resume loses: within the first stage,
    at its end, and within the second."""
    tree = changing_config(tmp_path, wordpiece_corpus, heldout_corpus)
    for steps in (2, 2, 1):
        assert set(pools[2].run(pretrain_case, tree, steps)) == {"stopped"}
    assert set(pools[2].run(pretrain_case, tree)) == {"done"}
    assert events_without_timing(tmp_path) == events_without_timing(uninterrupted)
    last, expected = (saved_tensors(checkpoint_path(folder / "checkpoints", 8)) for folder in (tmp_path, uninterrupted))
    assert_same_tensors(last, expected)


@pytest.mark.usefixtures("memory_measured_once")
def test_tokens_are_counted_by_corpus(
    wordpiece_corpus: Path, heldout_corpus: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """Catches tokens that are counted per rank, per interval, or under the other corpus's name, and a plan that counts
    other batches than the run trains on."""
    last = step_events(uninterrupted)[-1]
    plan = planned(changing_config(tmp_path, wordpiece_corpus, heldout_corpus), ranks=2)
    assert (last["step"], last["tokens"]) == (plan.stream.steps, plan.tokens)
    first, second = last["tokens/text"], last["tokens/text-heldout"]
    assert first + second == last["tokens"]
    assert first / last["tokens"] == pytest.approx(2 / 3, abs=0.1)
    assert logged(uninterrupted, "tokens/text") == sorted(logged(uninterrupted, "tokens/text"))
    saved = read_state(checkpoint_path(uninterrupted / "checkpoints", 8))["progress"]["tokens_by_corpus"]
    assert saved == {"text": first, "text-heldout": second}


@pytest.mark.parametrize(("world_size", "ds_config"), [(3, "fp32_zero2"), *soak((2, "fp32_zero3"))])
def test_a_changing_stream_does_not_depend_on_the_layout(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    tmp_path: Path,
    world_size: int,
    ds_config: str,
) -> None:
    """Catches stages, warmup, mixtures and masking rates that depend on the rank or microbatch."""
    model = SHALLOW | NO_DROPOUT
    alone = changing_config(tmp_path / "alone", wordpiece_corpus, heldout_corpus, "fp32_zero0", model__config=model)
    pools[1].run(pretrain_case, alone)
    shared = changing_config(tmp_path / "shared", wordpiece_corpus, heldout_corpus, ds_config, model__config=model)
    pools[world_size].run(pretrain_case, shared)
    for key, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3), ("tokens", 0.0), ("tokens/text", 0.0)):
        assert logged(tmp_path / "shared", key) == pytest.approx(logged(tmp_path / "alone", key), rel=tolerance)
