"""Rank processes that live as long as the test session: a case costs what it computes, not the imports.

    with ForkServer() as nursery:
        pool = RankPool(nursery, 2)
        pool.run(case, *args)       # case(world, *args) on every rank -> [result of rank 0, result of rank 1]

A case is a function of a module, its arguments and result are picklable, and it builds what it uses afresh. After a
case that fails or hangs, the ranks are killed and the next case gets new ones.

The nursery is a process without threads that has imported everything and only forks ranks, a few hundredths of a second
each.
"""

import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any, NoReturn

COLLECTIVE_SECONDS = 25  # a rank that waits this long for another one gives up
CASE_SECONDS = 100


class RankError(Exception):
    """A case raised on some rank, or did not end."""


class ForkServer:
    def __init__(self, log: Path) -> None:
        """`log`: where ranks print to."""
        self._requests, theirs = get_context("spawn").Pipe()
        self._process = get_context("spawn").Process(target=_fork_server, args=(theirs, log, sys.path))
        self._process.start()
        theirs.close()

    def fork(self, size: int, address: str, port: int) -> list[int]:
        """Start the ranks of a pool, which then connect to `address`; returns their process ids."""
        self._requests.send((size, address, port))
        pids: list[int] = self._requests.recv()
        return pids

    def close(self) -> None:
        self._requests.close()  # which it takes as the sign to end
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


class RankPool:
    def __init__(self, nursery: ForkServer, size: int) -> None:
        self.size = size
        self._nursery = nursery
        self._pids: list[int] = []
        self._connections: list[Connection] = []

    def run(self, case: Callable[..., Any], *args: Any) -> list[Any]:
        """The results of `case(world, *args)`, by rank. Raises RankError."""
        if not self._connections:
            self._start()
        for connection in self._connections:
            connection.send((case, args))
        results: list[Any] = [None] * self.size
        failures: dict[int, str] = {}
        waiting = dict(zip(self._connections, range(self.size), strict=True))
        deadline = time.monotonic() + CASE_SECONDS
        while waiting and time.monotonic() < deadline:
            for connection in wait(list(waiting), timeout=1.0):
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    failure, results[rank] = connection.recv()
                except EOFError:
                    failure = "the process died"
                if failure:
                    failures[rank] = failure
                    # The others may wait for this one: what they have to say is wanted, but not for long.
                    deadline = min(deadline, time.monotonic() + COLLECTIVE_SECONDS / 5)
        failures |= dict.fromkeys(waiting.values(), "did not end")
        if failures:
            self.kill()
            raise RankError("\n".join(f"rank {rank}: {failure}" for rank, failure in sorted(failures.items())))
        return results

    def kill(self) -> None:
        """End the ranks at once; the next case gets new ones."""
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for connection in self._connections:
            connection.close()
        self._pids, self._connections = [], []

    def close(self) -> None:
        """Let the ranks end by themselves."""
        for connection in self._connections:
            connection.close()
        self._connections = []

    def _start(self) -> None:
        with tempfile.TemporaryDirectory() as folder, Listener(f"{folder}/socket") as listener:
            self._pids = self._nursery.fork(self.size, str(listener.address), free_port())
            connections = [listener.accept() for _ in range(self.size)]
            self._connections = [connection for _, connection in sorted((c.recv(), c) for c in connections)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _fork_server(requests: Connection, log: Path, path: list[str]) -> NoReturn:
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.path[:] = path

    import gc

    import torch

    import pretrain.run  # noqa: F401

    set_start_method("fork", force=True)  # of processes that ranks start, as in a rank that was not spawned
    torch.set_num_threads(1)  # torch may have been imported before the variable was set
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the tests decide
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # dead ranks leave no zombies
    while True:
        try:
            size, address, port = requests.recv()
        except EOFError:
            os._exit(0)
        pids = []
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                requests.close()
                _rank_main(rank, size, address, port)
            pids.append(pid)
        requests.send(pids)


def _rank_main(rank: int, size: int, address: str, port: int) -> NoReturn:
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        connection = Client(address)
        connection.send(rank)
        from pretrain.engine.process_group import connect

        world = connect(timedelta(seconds=COLLECTIVE_SECONDS), rank, size)
        while True:
            case, args = connection.recv()
            try:
                answer = ("", case(world, *args))
            except BaseException:
                answer = (traceback.format_exc(), None)
            connection.send(answer)
    except EOFError:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
