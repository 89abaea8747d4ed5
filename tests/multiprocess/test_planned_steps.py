"""Steps and tokens of a plan are those that a real run logs."""

from pathlib import Path

import pytest

from rank_pool import RankPool
from runs import planned, pretrain_case, run_config, step_events


@pytest.mark.usefixtures("memory_measured_once")
def test_a_run_takes_the_planned_steps_and_tokens(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a plan that counts other batches than the run trains on. Whole epochs are planned in
    `test_one_epoch_trains_on_every_token_once`, stages and mixtures in `test_tokens_are_counted_by_corpus`."""
    tree = run_config(tmp_path, wordpiece_corpus) | {"schedule": {"tokens": 2500, "warmup_steps": 2}}
    plan = planned(tree, ranks=2)
    assert pools[2].run(pretrain_case, tree) == ["done"] * 2
    last = step_events(tmp_path)[-1]
    assert (last["step"], last["tokens"]) == (plan.stream.steps, plan.tokens)
