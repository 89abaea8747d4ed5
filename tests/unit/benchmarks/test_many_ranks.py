import re
from contextlib import nullcontext

import pytest
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessRaisedException

from benchmarks import many_ranks


def test_heartbeats_of_all_ranks_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a benchmark that no longer runs."""
    many_ranks.heartbeats(ranks=[2, 3])
    line = r"{} ranks: [\d.]+ ms to write all heartbeats, [\d.]+ ms to look at them\n"
    assert re.match(line.format(2) + line.format(3), capsys.readouterr().out)


def test_a_checkpoint_of_many_shares_is_completed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches shares that do not add up, and a benchmark that no longer runs."""
    monkeypatch.setattr(many_ranks, "_PARAMETERS", 1000)
    many_ranks.checkpoint(ranks=3)
    assert re.match(r"3 ranks: [\d.]+ s for rank 0 to complete", capsys.readouterr().out)


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_that_fails_ends_the_measurement(
    fails: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches figures of processes of which one has failed, a failure that nobody sees, and a benchmark that no longer
    runs."""
    sockets = many_ranks._sockets

    def count_sockets() -> int:
        if fails and dist.get_rank() == 1:
            raise RuntimeError("too many open files")
        return sockets()

    monkeypatch.setattr(many_ranks, "_sockets", count_sockets)
    failure = pytest.raises(ProcessRaisedException, match="too many open files") if fails else nullcontext()
    with failure:
        many_ranks.agreement(ranks=2)
    assert ("2 ranks, connected to all: " in capfd.readouterr().out) is not fails
