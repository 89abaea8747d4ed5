"""Rank processes that are reused for the whole test session, so that a test does not pay for imports.

    fork_server = ForkServer(log)
    pool = RankPool(fork_server, 2)
    pool.run(case, *args)       # case(world, *args) on every rank -> [result of rank 0, result of rank 1]

A case is a module-level function with picklable arguments and result, and builds all that it uses. If a case fails or
hangs, or leaves large ranks, they are killed and the next case gets new ones.
"""

import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Client, Connection, Listener, Pipe, wait
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any, NoReturn, Protocol

from fork_server import PADDING, listen
from waiting import LIMIT

COLLECTIVE_SECONDS = 300  # timeout of collectives
REPORT_SECONDS = 5  # for the other ranks to report after one has failed
LARGEST_RANK = 1 << 30  # bytes; malloc keeps what a case has freed


class RankError(Exception):
    """A case raised on a rank, or timed out."""


class RankStarter(Protocol):
    def fork(self, size: int, address: str, port: int) -> list[int]:
        """Start `size` ranks that connect to `address`. Returns their process ids."""


class RankSpawner:
    """Starts ranks as new processes with these environment variables: CUDA does not work in forked ones."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = dict(variables)

    def fork(self, size: int, address: str, port: int) -> list[int]:
        context = get_context("spawn")
        arguments = [(self._variables, rank, size, address, port) for rank in range(size)]
        ranks = [context.Process(target=_spawned_rank, args=one) for one in arguments]
        for rank in ranks:
            rank.start()
        return [rank.pid for rank in ranks if rank.pid is not None]


def _spawned_rank(variables: dict[str, str], rank: int, size: int, address: str, port: int) -> NoReturn:
    os.environ |= {"WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"} | variables
    rank_main(rank, size, address, port)


class ForkServer:
    """A process of `fork_server.py`."""

    def __init__(self, folder: Path, parent: str | None = None) -> None:
        """`folder`: for the ranks' output, and what hands commands over: see `environment`. `parent`: the folder of a
        server to fork this one from."""
        self._folder = folder
        (folder / "sitecustomize.py").symlink_to(Path(__file__).with_name("hand_over.py"))
        self._requests, theirs = Pipe()
        environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"WANDB_MODE": "disabled", PADDING: 16384 * "x"}
        # As sklearn sets them: commands have them once this process has imported it, and a forked server does not
        # import it again.
        environment |= {"KMP_DUPLICATE_LIB_OK": "True", "KMP_INIT_AT_FORK": "FALSE"}
        with listen(folder) as listener, theirs, (folder / "output.log").open("a") as output:
            arguments = json.dumps([sys.path, parent])
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("fork_server.py")), arguments, 8192 * "x"],
                env=os.environ | environment,
                stdin=theirs.fileno(),
                stdout=output,
                stderr=output,
            )
            send_handle(self._requests, listener.fileno(), self._process.pid)

    def environment(self) -> dict[str, str]:
        """Variables with which commands are handed over to the server."""
        others = os.environ.get("PYTHONPATH")
        return {"PYTHONPATH": f"{self._folder}:{others}" if others else str(self._folder)}

    def fork(self, size: int, address: str, port: int) -> list[int]:
        """Start `size` ranks that connect to `address`. Returns their process ids."""
        self._requests.send(("ranks", size, address, port))
        pids: list[int] = self._requests.recv()
        return pids

    def wait_until_ready(self) -> None:
        """Wait until commands are forked at once."""
        self.fork(0, "", 0)

    def serve_namespaces(self, process: int) -> None:
        """Serve commands in the namespaces of a process, until these end."""
        self._requests.send(("namespaces", process, self._folder))
        assert self._requests.recv()

    def close(self) -> None:
        self._requests.close()  # ends the fork server
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class RankPool:
    def __init__(
        self,
        starter: RankStarter,
        size: int,
        *,
        limit: float = LIMIT,
        prepare: Callable[..., object] | None = None,
    ) -> None:
        """limit: seconds that a case may take. prepare: the first case of each rank."""
        self.size, self.limit = size, limit
        self._starter, self._prepare = starter, prepare
        self._pids: list[int] = []
        self._connections: list[Connection] = []

    def run(self, case: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `case(world, *args)` on every rank. Returns the results by rank; raises RankError."""
        if not self._connections:
            self._start()
            if self._prepare is not None:
                self.run(self._prepare)
        for connection in self._connections:
            connection.send((case, args))
        results: list[Any] = [None] * self.size
        failures: dict[int, str] = {}
        waiting = dict(zip(self._connections, range(self.size), strict=True))
        deadline = time.monotonic() + self.limit
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
        for rank in waiting.values():  # it writes the stacks of its threads, also of those that wait in C++
            with suppress(ProcessLookupError):
                os.kill(self._pids[rank], signal.SIGABRT)
        if waiting:
            wait(list(waiting), timeout=REPORT_SECONDS)
        failures |= dict.fromkeys(waiting.values(), "timed out; its output ends with the stacks of its threads")
        if failures:
            self.kill()
            raise RankError("\n".join(f"rank {rank}: {failure}" for rank, failure in sorted(failures.items())))
        if max(map(resident_memory, self._pids)) > LARGEST_RANK:
            self.kill()
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
            self._pids = self._starter.fork(self.size, str(listener.address), free_port())
            connections = [listener.accept() for _ in range(self.size)]
            self._connections = [connection for _, connection in sorted((c.recv(), c) for c in connections)]


def resident_memory(pid: int) -> int:
    """Bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def rank_main(rank: int, size: int, address: str, port: int) -> NoReturn:
    faulthandler.enable()
    try:
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
