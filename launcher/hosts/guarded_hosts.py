"""The launcher's side of the guards: one ssh connection to each host, which tells when a host is lost.

See `host_guard` for the other side.
"""

import json
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from experiment.process.own_process import module_command, python_path
from experiment.process.signals import HANDLED_SIGNALS, kill_group, signals_blocked
from experiment.run_files.heartbeat import Heartbeat
from launcher.hosts.host_guard import BEAT_SECONDS, END, ENDED, PREFIX, SILENCE_SECONDS, STACK
from launcher.hosts.ssh import CONNECT_SECONDS, last_reason, start_ssh

_START_SECONDS = CONNECT_SECONDS + SILENCE_SECONDS
_SECONDS_PER_HOST = 0.1  # to start ssh
_END_SECONDS = 15.0
_CLOSE_SECONDS = 5.0
_NO_REASON = "the connection was closed"


def start_seconds(hosts: int) -> float:
    """Return how long hosts may take to answer over ssh, if all are asked at once."""
    return _START_SECONDS + _SECONDS_PER_HOST * hosts


def name_reasons(reasons: Mapping[str, str]) -> str:
    """Return hosts, each with the reason why it cannot be used, as a text."""
    return "; ".join(f"{host}: {reason}" for host, reason in reasons.items())


@dataclass(frozen=True)
class Rendezvous:
    """Meeting point of a launch's ranks on the first host. Without an address, DeepSpeed's launcher asks that host."""

    launch: str
    address: str | None
    port: int


@dataclass(frozen=True)
class Reply:
    """The answer of a host: its own name, the address by which it reaches the head, and a free port of its own."""

    node: str  # as `platform.node()`; the hostfile may have another name
    address: str | None
    port: int


class GuardedHosts:
    """Guards on all hosts of a launch, from `start` to `close`.

    `replies`: of the hosts whose guard has started. `lost`: host -> why, if it could not be reached or does not
    answer any more. `processes`: host -> ids of its processes of the launch, from when it has any.
    """

    def __init__(
        self, hosts: Sequence[str], launch: str, environment: Mapping[str, str], on_lost: Callable[[], object]
    ) -> None:
        """hosts: the first one is the one of rank 0. environment: variables for the ranks; they travel over ssh, not in
        a command line. on_lost: called in a thread when a host is lost."""
        self.replies: dict[str, Reply] = {}
        self.lost: dict[str, str] = {}
        self.processes: dict[str, frozenset[int]] = {}
        self._seen: dict[str, frozenset[int]] = {}  # host -> ids of all processes that it has had
        self._launch = launch
        request = {"launch": launch, "environment": dict(environment), "head": hosts[0]}
        self._request = json.dumps(request).encode() + b"\n"
        self._on_lost = on_lost
        self._closing = threading.Event()
        self._connections = {host: _Connection(host) for host in hosts}
        self._threads = [threading.Thread(target=self._follow, args=(host,), daemon=True) for host in hosts]
        self._monitor = threading.Thread(target=self._send_beats, daemon=True)

    def start(self) -> None:
        """Start the guards, and wait until each has replied or is lost."""
        for thread in self._threads:
            thread.start()
        self._monitor.start()
        for connection in self._connections.values():
            connection.started.wait()

    def cancel(self) -> None:
        """Let `start` return, although some have neither replied nor are lost."""
        for connection in self._connections.values():
            connection.started.set()

    def request_stack(self, beat: Heartbeat) -> None:
        """Make a rank write its stacks. Its host may have another name here: all guards are asked."""
        for connection in self._connections.values():
            connection.try_send(f"{STACK} {beat.pid} {beat.host}\n".encode())

    def close(self) -> None:
        """End all processes of the launch on all hosts that can be reached, and the guards."""
        self._closing.set()
        for host, connection in self._connections.items():
            if host in self.replies:
                connection.try_send(f"{END}\n".encode())
            else:  # no rank has started there
                connection.close()
        _join(self._threads, _END_SECONDS)
        for connection in self._connections.values():
            connection.close()
        _join([*self._threads, self._monitor], _CLOSE_SECONDS)  # a process outside the group may keep the output open

    def ended_host(self) -> str | None:
        """Return a host whose processes have all ended."""
        return next((host for host, processes in self.processes.copy().items() if not processes), None)

    def has_ended(self, node: str, process: int) -> bool:
        """Return whether a process was found on the host that has this name itself, and is not there any more."""
        hosts = [host for host in self.named(node) if process in self._seen.get(host, ())]
        return bool(hosts) and not any(process in self.processes[host] for host in hosts)

    def named(self, node: str | None) -> list[str]:
        """Return the hosts that have this name themselves."""
        return [host for host, reply in self.replies.copy().items() if reply.node == node]

    def rendezvous(self) -> Rendezvous:
        """Return the first host by the address that others know: on itself, its name often means a loopback address."""
        first, *others = self._connections
        addresses = (self.replies[host].address for host in [*others, first])
        return Rendezvous(self._launch, next(filter(None, addresses), None), self.replies[first].port)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _follow(self, host: str) -> None:
        """Read the lines of a guard, until it ends or is lost."""
        connection = self._connections[host]
        try:
            connection.request(self._request)
            for line in connection.lines():
                if line == ENDED:
                    break
                if host in self.replies:
                    self._list(host, frozenset(json.loads(line)))
                else:
                    self.replies[host] = Reply(**json.loads(line))
                    connection.started.set()
            else:
                self._lose(host, connection.last_output)
                if host in self.replies and not connection.closed:
                    self._end_launch(host)
        finally:
            connection.started.set()

    def _end_launch(self, host: str) -> None:
        """End the launch on a host whose guard was killed or connection failed: a new guard does only that."""
        connection = _Connection(host)
        self._connections[host] = connection  # `close` kills it if it takes too long
        connection.request(self._request + f"{END}\n".encode())
        for line in connection.lines():
            if line == ENDED:
                return

    def _send_beats(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            for host, connection in self._connections.items():
                connection.try_send(b"\n")
                limit = SILENCE_SECONDS if connection.started.is_set() else start_seconds(len(self._connections))
                if host not in self.lost and connection.silent_seconds > limit:
                    self._lose(host, f"no answer within {limit:.0f} s")
                    connection.close()

    def _lose(self, host: str, reason: str) -> None:
        if host not in self.lost and not self._closing.is_set():
            self.lost[host] = reason
            self._on_lost()

    def _list(self, host: str, processes: frozenset[int]) -> None:
        if processes or host in self.processes:
            self.processes[host] = processes
            self._seen[host] = self._seen.get(host, frozenset()) | processes  # after `processes`, see `has_ended`


def _join(threads: Sequence[threading.Thread], seconds: float) -> None:
    """Join the threads, for at most `seconds`."""
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


class _Connection:
    """The ssh process that runs the guard of a host."""

    def __init__(self, host: str) -> None:
        command = ["env", f"PYTHONPATH={python_path(os.environ)}", *module_command("launcher.hosts.host_guard")]
        with signals_blocked(HANDLED_SIGNALS):
            self._process = start_ssh(host, command, subprocess.PIPE, subprocess.PIPE, subprocess.STDOUT)
        self._heard = time.monotonic()
        self._requested = False
        self.last_output = _NO_REASON  # the last lines that ssh printed: usually why
        self.closed = False  # by `close`
        self.started = threading.Event()

    @property
    def silent_seconds(self) -> float:
        """Time since the last line of the guard."""
        return time.monotonic() - self._heard

    def request(self, data: bytes) -> None:
        """Send the first line of the guard's input. Blocks while ssh does not read more than fits into a pipe."""
        self._send(data)
        self._requested = True

    def try_send(self, line: bytes) -> None:
        """Send a line, unless that would block: a host that hangs must not keep others from getting theirs."""
        assert self._process.stdin is not None
        room = select.poll()  # for PIPE_BUF bytes, see pipe(7); select(2) has a limit of descriptors
        room.register(self._process.stdin, select.POLLOUT)
        if self._requested and room.poll(0):
            self._send(line)

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # closed
            while data:  # unbuffered: Python 3.13 prints a traceback if a buffer cannot be flushed when it is freed
                data = data[os.write(self._process.stdin.fileno(), data) :]

    def lines(self) -> Iterator[str]:
        """Yield the lines of the guard, until the connection is closed."""
        assert self._process.stdout is not None
        before, has_started = "", False
        for line in self._process.stdout:
            text = line.decode(errors="replace").strip()
            _, is_from_guard, message = text.partition(PREFIX)
            if is_from_guard:
                self._heard = time.monotonic()
                if not has_started:  # what came before was a banner
                    before, has_started, self.last_output = "", True, _NO_REASON
                yield message
            elif text:
                self.last_output = last_reason(f"{before}\n{text}")
                before = text

    def close(self) -> None:
        """End ssh."""
        if not self.closed:
            self.closed = True
            kill_group(self._process.pid)
            self._process.wait()
            self.started.set()
