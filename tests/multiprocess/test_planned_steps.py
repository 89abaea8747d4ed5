"""Steps and tokens of a plan are those that a real run logs."""

from pathlib import Path
from typing import Any

import pytest

from experiment.config import build_config
from pretrain.config import PretrainConfig
from pretrain.plan.cost import Device, Rates
from pretrain.plan.plan import plan_run
from pretrain.resolve import resolve
from rank_pool import RankPool
from runs import pretrain_case, run_config, step_events

STAGES = [{"steps": 2, "max_seq_length": 24, "sequences": 12}, {}]


@pytest.mark.parametrize(
    "schedule",
    [{"epochs": 0.15}, {"tokens": 2500}, {"steps": 4, "stages": STAGES}],
    ids=["epochs", "tokens", "stages"],
)
def test_a_run_takes_the_planned_steps_and_tokens(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, schedule: dict[str, Any]
) -> None:
    """Catches a plan that counts other batches than the run trains on."""
    tree = run_config(tmp_path, wordpiece_corpus) | {"schedule": schedule | {"warmup_steps": 2}}
    run = resolve(build_config(PretrainConfig, tree), 2)
    plan = plan_run(run, [2], Device("cpu", None, None), Rates(None, 0.4, 25e9, None, None))
    assert pools[2].run(pretrain_case, tree) == ["done"] * 2
    last = step_events(tmp_path)[-1]
    assert (last["step"], last["tokens"]) == (plan.steps, plan.tokens)
