from pathlib import Path

import pytest

from benchmarks.time_to_loss import Saved, _first_below


@pytest.mark.parametrize(("loss", "minutes"), [(9.0, 1.0), (4.0, 3.0), (3.5, 4.0), (1.0, None)])
def test_the_first_checkpoint_that_reaches_a_loss_counts(loss: float, minutes: float | None) -> None:
    """Catches a time to a loss that is too short, and one for a loss that was not reached."""
    losses = {"step-1": 8.0, "step-2": 5.0, "step-3": 4.0, "step-4": 3.0}
    saved = [Saved(Path(name), number + 1.0) for number, name in enumerate(losses)]
    found = _first_below(saved, loss, lambda folder: losses[folder.name])
    assert (found and found.minutes) == minutes
