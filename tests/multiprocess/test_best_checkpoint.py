"""The best checkpoint, and early stopping."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiment.checkpoints import complete_checkpoints
from experiment.run_folder import RunFolder
from pretrain.world import World
from rank_pool import RankPool
from runs import Tree, assert_same_run, pretrain_case, run_config


def scripted_case(world: World, tree: Mapping[str, Any], losses: Sequence[float], stop_after: int | None = None) -> str:
    """A run whose evaluations return these losses, in order."""
    from pretrain.evaluate import HeldOutEvaluator

    left = list(losses)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOutEvaluator, "metrics", lambda *_: {"eval/held/loss": left.pop(0)})
        return pretrain_case(world, tree, stop_after)


def test_the_best_checkpoint_is_kept_and_patience_ends_the_run(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches a best checkpoint that is deleted or never saved, an evaluation too many or too few, an early stop that
    counts as a failure or is undone by a restart, and a patience counter that a resume resets."""

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
    assert pools[2].run(scripted_case, tree("uninterrupted"), losses) == ["done", "done"]
    checkpoints = tmp_path / "uninterrupted" / "checkpoints"
    assert [path.name for path in complete_checkpoints(checkpoints)] == ["step-00000002", "step-00000005"]
    assert (checkpoints / "best").read_text(encoding="utf-8") == "step-00000002\n"
    log = RunFolder(tmp_path / "uninterrupted").rank_log(0).read_text(encoding="utf-8")
    assert "stopping early: eval/held/loss has not improved for 3 evaluations; the best was 3 at step 2" in log
    assert pools[2].run(scripted_case, tree("uninterrupted"), []) == ["done", "done"]

    assert pools[2].run(scripted_case, tree("stopped"), losses[:4], 4) == ["stopped", "stopped"]
    assert pools[2].run(scripted_case, tree("stopped"), losses[4:]) == ["done", "done"]
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "stopped", 5)

    assert pools[2].run(scripted_case, tree("stopped", patience=4), [2.5, *[4.0] * 4]) == ["done", "done"]
    assert (tmp_path / "stopped" / "checkpoints" / "best").read_text(encoding="utf-8") == "step-00000006\n"
