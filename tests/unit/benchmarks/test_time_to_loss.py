from pathlib import Path

import pytest


@pytest.mark.parametrize(("loss", "minutes"), [(9.0, 1.0), (4.0, 3.0), (3.5, 4.0), (1.0, None)])
def test_the_first_checkpoint_that_reaches_a_loss_counts(loss: float, minutes: float | None) -> None:
    """Catches a time to a loss that is too short, and one for a loss that was not reached."""
    from benchmarks.time_to_loss import Saved, _minutes_to

    losses = {"step-1": 8.0, "step-2": 5.0, "step-3": 4.0, "step-4": 3.0}
    saved = [Saved(Path(name), number + 1.0) for number, name in enumerate(losses)]
    assert _minutes_to(loss, saved, lambda folder: losses[folder.name]) == minutes


def test_a_run_that_does_not_reach_the_loss_is_named() -> None:
    """Catches a median of the runs that went well only."""
    from benchmarks.time_to_loss import _compare

    assert _compare([2.0, 4.0, 2.5], 10.0) == ("2.50 (2.00 – 4.00)", "4.0 (2.5 – 5.0)")
    assert _compare([2.0, None, 2.5], 10.0) == ("not reached in 1 of 3 runs", "")


def test_a_run_that_fails_leaves_the_figures_of_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches hours of runs without a result because the last one failed."""
    from benchmarks import time_to_loss
    from benchmarks.time_to_loss import Peer, Run

    runs = iter([Run({"default settings": 2.0}, 10**9), Run({"default settings": 1.0}, 10**9)])
    for name in ("build_corpus", "_peer_settings", "_recipe_config", "_plain_config"):
        monkeypatch.setattr(time_to_loss, name, lambda *_: None)
    monkeypatch.setattr(time_to_loss, "_peer", lambda *_: Peer(4.0, 10**9))
    monkeypatch.setattr(time_to_loss, "_run", lambda *_: next(runs))  # StopIteration: the third one
    with pytest.raises(StopIteration):
        time_to_loss.time_to_loss("text.txt", "held_out.txt", "tokenizer", peer="default", seeds=3)
    printed = capsys.readouterr().out
    assert "deepcloze, speedrun.yaml (1 of 3 seeds)" in printed
    assert "10.0 (10.0 – 10.0)" in printed
