import pytest

from experiment.tracking.console import describe_training
from pretrain.training.slow_ranks import SlowRanks

NODES = ["node-0", "node-0", "node-1", "node-1"]


def test_the_slowest_rank_is_found() -> None:
    """Catches a rank that is compared with itself: of two ranks, the median is the faster one."""
    ranks = SlowRanks(NODES)
    assert ranks.update([100, 110, 90, 105]) == (1, 1.1)
    assert ranks.update([100, 100, 100, 250]) == (3, 2.5)
    assert SlowRanks(["a", "b"]).update([100, 300]) == (1, 3.0)
    assert ranks.update([]) is None
    assert ranks.update([0, 0, 0, 0]) is None
    assert ranks.update([100, 100, 0, 250]) is None, "no rank is slow while the time of one is unknown"


def test_a_rank_that_stays_slow_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a warning for a single slow interval, and one for each of a thousand."""
    ranks = SlowRanks(NODES)
    for _ in range(4):
        ranks.update([100, 100, 180, 100])
    ranks.update([100, 100, 100, 180])
    for _ in range(4):
        ranks.update([100, 100, 180, 100])
    assert caplog.messages == []
    for _ in range(20):
        ranks.update([100, 100, 180, 100])
    assert [record.getMessage() for record in caplog.records] == [
        "node-1, rank 2 is slow: its forward passes and its waits for data took 1.8 times as long as those of the "
        "median rank, and so in the last 5 log intervals"
    ]


def test_a_slow_rank_is_shown() -> None:
    """Catches a progress line that names a rank although all are equally fast."""
    event = {"loss": 2.0, "slowest_rank": 2, "slowest_rank_ratio": 1.2}
    assert describe_training(event) == "loss 2.0000"
    slow = "loss 2.0000 · rank 2 takes 1.8 × the median time"
    assert describe_training(event | {"slowest_rank_ratio": 1.8}) == slow
