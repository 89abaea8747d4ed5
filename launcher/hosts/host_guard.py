"""Guards one host of a launch: `guarded_hosts` runs this module there over ssh for as long as the launch lives.

The processes of a launch have its name in their environment. When the launch ends, or its machine or the connection is
lost, all of them are killed. A signal to this process ends none, because they may be saving a checkpoint: it waits for
them. The ranks find the environment variables of the launch in a file that only the user can read.

Both sides send lines. From the launcher: a request as JSON, beats, perhaps `stack PID HOST` or `end`. From here: a
reply as JSON, then as beats the ids of the processes, and `ended`. Imports little, so that it starts at once.
"""

import json
import os
import platform
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from experiment.process.own_process import LAUNCH_VARIABLE
from experiment.process.signals import WARNING_SIGNALS
from experiment.run_files.heartbeat import request_stack
from launcher.hosts.machine import free_port
from launcher.hosts.probe import route_to

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 15.0
"""Without a line for this time, each side considers the other lost."""

END = "end"
STACK = "stack"
ENDED = "ended"
PREFIX = "deepcloze guard: "
"""Prefix of the lines from the host, whose shell may print others, or something before the first one."""

_LIST_SECONDS = 5.0  # between listings of all processes of the host
_KILL_SECONDS = 10.0
_LEAVE = "leave"


def environment_file(launch: str) -> Path:
    """Return the file with the environment variables of a launch on this host, in memory."""
    return Path("/dev/shm") / f"deepcloze-{launch}.json"


def read_environment(launch: str) -> Mapping[str, str]:
    """Return the variables of a launch. Raises FileNotFoundError if it has ended on this host."""
    environment: Mapping[str, str] = json.loads(environment_file(launch).read_bytes())
    return environment


def guard(launch: str, environment: Mapping[str, str], head: str, lines: "queue.SimpleQueue[str]") -> None:
    """Guard this host until the launch ends. environment: variables for its ranks. head: the host of rank 0. lines:
    from the launcher; `_LEAVE` if this process is asked to end."""
    run, _, _ = launch.partition("-")
    # Leftovers of an earlier launch of the run. Another name of this host may have a guard of this launch.
    _end_launches(f"{run}-", keep=launch)
    try:
        _write_environment(environment_file(launch), environment)
        _send(json.dumps({"node": platform.node(), "address": _address(head), "port": free_port()}))
        _wait_for_end(launch, lines)
    finally:
        _end_launches(launch)
    _send(ENDED)


def _wait_for_end(launch: str, lines: "queue.SimpleQueue[str]") -> None:
    last_line, leaving = time.monotonic(), False
    processes, listed_at = list[int](), float("-inf")
    while time.monotonic() - last_line < SILENCE_SECONDS:
        with suppress(queue.Empty):
            if (line := lines.get(timeout=BEAT_SECONDS)) == END:
                return
            if line == _LEAVE:  # the ranks may have got the signal too, as from a batch system, and save a checkpoint
                leaving = True
            else:
                last_line = time.monotonic()
            if line.startswith(STACK):
                _request_stack(launch, line)
        if leaving or time.monotonic() - listed_at >= _LIST_SECONDS:
            processes, listed_at = list(_processes(launch)), time.monotonic()
        _send(json.dumps(processes))
        if leaving and not processes:
            return


def _request_stack(launch: str, line: str) -> None:
    _, pid, host = line.split(maxsplit=2)
    if host == platform.node() and int(pid) in _processes(launch):
        request_stack(int(pid))


def _read_lines(lines: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        lines.put(line.strip())
    lines.put(END)  # the connection is closed


def _end_launches(name: str, keep: str | None = None) -> None:
    """Kill the processes of launches whose name starts with `name`, except `keep`, and remove their files."""
    deadline = time.monotonic() + _KILL_SECONDS
    while (pids := list(_processes(name, keep))) and time.monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    for path in environment_file(name).parent.glob(f"{environment_file(name).stem}*"):
        if keep is None or not path.name.startswith(environment_file(keep).name):
            with suppress(OSError):  # of another user
                path.unlink(missing_ok=True)


def _processes(name: str, keep: str | None = None) -> Iterator[int]:
    """Yield the user's processes on this host that belong to launches whose name starts with `name`, but not to
    `keep`."""
    marker = f"\0{LAUNCH_VARIABLE}={name}".encode()
    kept = f"\0{LAUNCH_VARIABLE}={keep}\0".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended, or of another user
            environ = b"\0" + (folder / "environ").read_bytes()
            if marker in environ and kept not in environ:
                yield int(folder.name)


def _write_environment(path: Path, environment: Mapping[str, str]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")  # found by `_end_launches`
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode=0o600), "w", encoding="utf-8") as file:
            json.dump(dict(environment), file)
        temporary.replace(path)
    except OSError as error:
        sys.exit(f"cannot write to {path.parent}: {error.strerror}")


def _address(name: str) -> str | None:
    """Return the address by which this host reaches another. A host's own name often has a loopback address."""
    with suppress(OSError):
        return route_to(name)[0]
    return None


def _send(line: str) -> None:
    with suppress(OSError):  # the launcher is gone, which the next read tells
        print(f"{PREFIX}{line}", flush=True)


def main() -> None:
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: lines.put(_LEAVE))
    for number in WARNING_SIGNALS:  # a rank that gets one asks all to stop
        signal.signal(number, signal.SIG_IGN)
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_read_lines, args=(lines,), daemon=True).start()
    guard(request["launch"], request["environment"], request["head"], lines)


if __name__ == "__main__":
    main()
