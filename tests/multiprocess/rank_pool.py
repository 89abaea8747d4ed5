"""Rank processes that are reused for the whole test session, so that a test does not pay for imports.

    fork_server = ForkServer(log)
    pool = RankPool(fork_server, 2)
    pool.run(case, *args)       # case(world, *args) on every rank -> [result of rank 0, result of rank 1]

A case is a module-level function with picklable arguments and result, and builds all that it uses. If a case fails or
hangs, the ranks are killed and the next case gets new ones.

The fork server is a single-threaded process that has imported everything; it forks a rank within 0.1 s.
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

from waiting import LIMIT

COLLECTIVE_SECONDS = 300  # timeout of collectives
REPORT_SECONDS = 5  # for the other ranks to report after one has failed


class RankError(Exception):
    """A case raised on a rank, or timed out."""


class ForkServer:
    def __init__(self, log: Path) -> None:
        """`log`: file for the ranks' output."""
        self._requests, theirs = get_context("spawn").Pipe()
        self._process = get_context("spawn").Process(target=_fork_server, args=(theirs, log, sys.path))
        self._process.start()
        theirs.close()

    def fork(self, size: int, address: str, port: int) -> list[int]:
        """Start `size` ranks that connect to `address`. Returns their process ids."""
        self._requests.send((size, address, port))
        pids: list[int] = self._requests.recv()
        return pids

    def close(self) -> None:
        self._requests.close()  # ends the fork server
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


class RankPool:
    def __init__(self, fork_server: ForkServer, size: int) -> None:
        self.size = size
        self._fork_server = fork_server
        self._pids: list[int] = []
        self._connections: list[Connection] = []

    def run(self, case: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `case(world, *args)` on every rank. Returns the results by rank; raises RankError."""
        if not self._connections:
            self._start()
        for connection in self._connections:
            connection.send((case, args))
        results: list[Any] = [None] * self.size
        failures: dict[int, str] = {}
        waiting = dict(zip(self._connections, range(self.size), strict=True))
        deadline = time.monotonic() + LIMIT
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
                    # The others may be waiting for this one: give them a little time to report.
                    deadline = min(deadline, time.monotonic() + REPORT_SECONDS)
        failures |= dict.fromkeys(waiting.values(), "timed out")
        if failures:
            self.kill()
            raise RankError("\n".join(f"rank {rank}: {failure}" for rank, failure in sorted(failures.items())))
        return results

    def kill(self) -> None:
        """Kill the ranks; the next case gets new ones."""
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for connection in self._connections:
            connection.close()
        self._pids, self._connections = [], []

    def close(self) -> None:
        """Close the connections, which ends the ranks."""
        for connection in self._connections:
            connection.close()
        self._connections = []

    def _start(self) -> None:
        with tempfile.TemporaryDirectory() as folder, Listener(f"{folder}/socket") as listener:
            self._pids = self._fork_server.fork(self.size, str(listener.address), free_port())
            connections = [listener.accept() for _ in range(self.size)]
            self._connections = [connection for _, connection in sorted((c.recv(), c) for c in connections)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _fork_server(requests: Connection, log: Path, path: list[str]) -> NoReturn:
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.path[:] = path

    import gc

    import torch

    import pretrain.run  # noqa: F401

    set_start_method("fork", force=True)  # for processes that ranks start: the default in a rank that was not spawned
    torch.set_num_threads(1)  # torch may have been imported before the variable was set
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group: pytest handles it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # leaves no zombies
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

        world = connect(timedelta(seconds=COLLECTIVE_SECONDS), give_up)
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


def give_up(message: str) -> NoReturn:
    """End a rank that cannot connect."""
    print(message, flush=True)
    os._exit(1)
