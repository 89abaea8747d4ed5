"""The best checkpoint, and early stopping."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiment.run_files.checkpoints import complete_checkpoints, last_usable, verify
from experiment.run_files.run_folder import RunFolder
from pretrain.world import World
from rank_pool import RankError, RankPool
from runs import Tree, assert_same_run, evaluation_events, pretrain_case, run_config, step_events


def scripted_case(world: World, tree: Mapping[str, Any], losses: Sequence[float], stop_after: int | None = None) -> str:
    """A run whose evaluations return these losses, in order."""
    from pretrain.evaluate import HeldOutEvaluator

    left = list(losses)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOutEvaluator, "metrics", lambda *_: {"eval/held/loss": left.pop(0)})
        return pretrain_case(world, tree, stop_after)


def patient_config(folder: Path, corpus: Path, heldout: Path, patience: int = 3) -> Tree:
    """A run of at most 12 steps with an evaluation after each, that keeps its newest and its best checkpoint."""
    return run_config(
        folder,
        corpus,
        schedule__steps=12,
        run__log_every=4,
        corpus__eval={"held": str(heldout)},
        evaluation__every_steps=1,
        evaluation__best_metric="eval/held/loss",
        evaluation__patience=patience,
        evaluation__overfitting_after=2,
        checkpoint__keep_last=1,
    )


def test_the_best_checkpoint_is_kept_and_patience_ends_the_run(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches a best checkpoint that is deleted or never saved, an evaluation too many or too few, an early stop that
    counts as a failure, and a patience counter that a resume resets."""

    def tree(name: str, patience: int = 3) -> Tree:
        return patient_config(tmp_path / name, wordpiece_corpus, heldout_corpus, patience)

    losses = [5.0, 4.0, 3.00001, 3.2, 3.4, 3.6]
    assert pools[2].run(scripted_case, tree("uninterrupted"), losses) == ["done", "done"]
    checkpoints = tmp_path / "uninterrupted" / "checkpoints"
    assert [path.name for path in complete_checkpoints(checkpoints)] == ["step-00000002", "step-00000005"]
    assert (checkpoints / "best").read_text(encoding="utf-8") == "step-00000002\n"
    log = RunFolder(tmp_path / "uninterrupted").rank_log(0).read_text(encoding="utf-8")
    assert "stopping early: eval/held/loss has not improved for 3 evaluations; the best was 3 at step 2" in log

    assert pools[2].run(scripted_case, tree("stopped"), losses[:4], 4) == ["stopped", "stopped"]
    assert pools[2].run(scripted_case, tree("stopped"), losses[4:]) == ["done", "done"]
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "stopped", 5)

    assert pools[2].run(scripted_case, tree("stopped", patience=4), [2.5, *[4.0] * 4]) == ["done", "done"]
    assert (tmp_path / "stopped" / "checkpoints" / "best").read_text(encoding="utf-8") == "step-00000006\n"


def test_a_last_evaluation_left_to_a_resume_is_not_repeated(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches a run that evaluates at every start because the evaluation that ended it was not saved, an early stop
    that a restart undoes, and last steps that are in no log event because patience ended the run between two."""
    losses = [5.0, 4.0, 3.0, 3.2, 3.4, 3.6]
    whole, stopped = (
        patient_config(tmp_path / name, wordpiece_corpus, heldout_corpus) for name in ("whole", "stopped")
    )
    assert pools[1].run(scripted_case, whole, losses) == ["done"]
    assert [event["step"] for event in step_events(tmp_path / "whole")] == [4, 5]
    assert pools[1].run(scripted_case, stopped, losses[:5], 5) == ["stopped"]
    assert pools[1].run(scripted_case, stopped, losses[5:]) == ["done"]
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", 5)
    assert last_usable(complete_checkpoints(tmp_path / "stopped" / "checkpoints"), verify).name == "step-00000005"
    assert pools[1].run(scripted_case, stopped, []) == ["done"]


def test_the_best_evaluation_may_be_left_to_a_resume(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches `checkpoints/best` that still names an older checkpoint, because that of the best step was there already
    when it was evaluated."""
    tree = patient_config(tmp_path, wordpiece_corpus, heldout_corpus)
    assert pools[1].run(scripted_case, tree, [5.0, 4.0], 2) == ["stopped"]
    best = tmp_path / "checkpoints" / "best"
    assert best.read_text(encoding="utf-8") == "step-00000001\n"
    with pytest.raises(RankError, match="pop from empty list"):  # fails in the evaluation after the next step
        pools[1].run(scripted_case, tree, [3.0])
    assert best.read_text(encoding="utf-8") == "step-00000002\n"
    assert pools[1].run(scripted_case, tree, [3.2, 3.4, 3.6]) == ["done"], "the evaluation of step 2 is not repeated"
    assert [event["step"] for event in evaluation_events(tmp_path)] == [0, 1, 2, 3, 4, 5]
