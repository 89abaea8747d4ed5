"""The ranks that tests use: one that hangs ends its test, not the session."""

import os
import threading
from multiprocessing import get_context

import pytest

import rank_pool
from pretrain.world import World
from rank_pool import ForkServer, RankError, RankPool, RankSpawner, RankStarter
from runs import soak


def pid_case(_: World) -> int:
    """Of a rank that starts a process, as those of the data loader are."""
    worker = get_context("fork").Process(target=os.getpid)
    worker.start()
    worker.join()
    return os.getpid()


def hanging_case(_: World) -> None:
    threading.Event().wait()


def test_large_ranks_are_replaced(fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that keep the memory of a large model for the rest of the session."""
    pool = RankPool(fork_server, 1)
    try:
        first = pool.run(pid_case)
        assert pool.run(pid_case) == first
        monkeypatch.setattr(rank_pool, "LARGEST_RANK", 0)
        assert pool.run(pid_case) == first
        assert pool.run(pid_case) != first
    finally:
        pool.close()


@pytest.mark.parametrize("spawned", [False, *soak(True)])
def test_a_case_that_hangs_is_ended(
    spawned: bool, fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches ranks that hang in all later tests too, a limit that does not say where, and ranks without workers."""
    starter: RankStarter = RankSpawner({"DS_ACCELERATOR": "cpu"}) if spawned else fork_server
    pool = RankPool(starter, 1)
    try:
        first = pool.run(pid_case)
        with monkeypatch.context() as changed:
            changed.setattr(pool, "limit", 0.5)
            with pytest.raises(RankError, match="rank 0: timed out"):
                pool.run(hanging_case)
        assert pool.run(pid_case) != first
    finally:
        pool.close()
    if spawned:  # the output of forked ranks is in a file of the server
        assert "hanging_case" in capfd.readouterr().err
