import signal
from collections.abc import Sequence

import pytest

from experiment.process.signals import SignalHistory

INT, TERM, USR1, USR2, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP


@pytest.mark.parametrize(
    ("received", "second"),
    [
        ([(0.0, INT)], None),
        ([(0.0, INT), (0.9, INT)], None),  # `timeout` delivers it twice
        ([(0.0, INT), (0.9, TERM), (1.0, HUP)], None),
        ([(0.0, INT), (0.9, INT), (1.5, INT)], 2),
        ([(0.0, TERM), (2.0, TERM)], 1),
        ([(0.0, USR1), (2.0, USR1)], 1),
        ([(0.0, USR1), (2.0, USR2)], 1),
        ([(0.0, TERM), (2.0, INT)], 1),
        ([(0.0, USR1), (300.0, TERM)], None),  # SLURM at the time limit
        ([(0.0, INT), (10.0, TERM)], None),  # LSF
        ([(0.0, INT), (10.0, HUP)], None),  # the terminal is closed during the save
        ([(0.0, TERM), (10.0, HUP), (11.0, HUP)], None),
        ([(0.0, HUP), (2.0, INT)], 1),
        ([(0.0, USR1), (300.0, TERM), (302.0, TERM)], 2),
    ],
)
def test_a_second_signal_is_told_from_a_repetition(received: Sequence[tuple[float, int]], second: int | None) -> None:
    """Catches ranks that are killed before they have saved, because a launcher, terminal or batch system sends more
    than one signal; and a user who cannot end a run that hangs."""
    now = 0.0
    history = SignalHistory(clock=lambda: now)
    found = []
    for now, number in received:  # noqa: B007
        found.append(history.is_second(number))
    assert found == [position == second for position in range(len(received))]
