"""Alerts of runs in several processes."""

import os
from pathlib import Path

from poison import Poison, poisoned_case
from pretrain.world import World
from rank_pool import RankPool
from runs import Tree, run_config
from webhook_server import webhook


def alerted_case(world: World, tree: Tree, url: str) -> str:
    """A run whose third batch is bad."""
    os.environ["DEEPCLOZE_WEBHOOK_URL"] = url
    try:
        return poisoned_case(world, tree, {3: Poison(float("nan"))})
    finally:
        del os.environ["DEEPCLOZE_WEBHOOK_URL"]


def test_rank_0_tells_what_it_sees(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a bad batch, missing checkpoints or an end without an alert, and one alert from each rank."""
    tree = run_config(tmp_path / "run", wordpiece_corpus, schedule__steps=4, health__policy="skip")
    tree["tracking"] = {"alerts": {"webhook": True, "no_checkpoint_hours": 1e-9}}
    with webhook() as (url, received):
        assert pools[2].run(alerted_case, tree, url) == ["done", "done"]
    assert sorted(alert["event"] for alert in received) == ["bad_batch", "finish", "no_checkpoint"]
    messages = {alert["event"]: alert["message"] for alert in received}
    assert "step 3" in messages["bad_batch"]
    assert "policy: skip" in messages["bad_batch"]
    assert messages["no_checkpoint"].endswith("there is none")
    assert messages["finish"].startswith("done at step 4, loss ")
