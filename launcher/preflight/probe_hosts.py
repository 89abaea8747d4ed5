"""Ask hosts for their facts, in parallel over ssh."""

import inspect
import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter, ValidationError

from experiment.process import cpu_cores
from experiment.process.signals import handle_stop_signals, kill_group
from experiment.progress import progress
from launcher.hosts import probe
from launcher.hosts.ssh import CONNECT_SECONDS, SSH_FAILED, copy_command, last_reason, quoted_for_host, start_ssh

_ANSWER_SECONDS = 60.0  # from the start of ssh
_POLL_SECONDS = 0.2
_AT_ONCE = 128  # three file descriptors each
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127  # exit codes of shells

# The working directory, which `python -` searches first, may have modules of any name. The alarm ends a program that
# waits for a disk: killing ssh does not.
_PROGRAM = """\
import signal, sys, types
signal.alarm({seconds})
sys.path = [folder for folder in sys.path if folder]
cores = sys.modules["experiment.process.cpu_cores"] = types.ModuleType("cpu_cores")
exec(compile({cores!r}, "cpu_cores.py", "exec"), vars(cores))
probe = {{"__name__": "probe"}}
exec(compile({source!r}, "probe.py", "exec"), probe)
probe["main"]({request!r})
"""


@dataclass(frozen=True)
class ProbeRequest:
    """Arguments of `probe.collect`. None: not asked for."""

    libraries: tuple[str, ...] = ()  # distributions
    project: str | None = None  # folder of the packages
    packages: tuple[str, ...] = ()  # of the project
    files: tuple[str, ...] = ()  # absolute paths
    folders: tuple[str, ...] = ()  # absolute paths
    token_folder: str | None = None  # in the run folder; holds `probe.LAUNCHER_TOKEN`
    token: str = ""  # name of the file that this host writes there
    cache: str | None = None  # folder on a local disk
    kept: tuple[str, ...] = ()  # folders in the cache whose files are taken for free, or the cache itself
    peer: str | None = None  # another host


@dataclass(frozen=True)
class HostFacts:
    """The answer of a host."""

    python: str  # version
    versions: Mapping[str, str | None]  # library -> version; None: missing
    source: str | None  # digest of the project's Python files; None: there are none
    checksums: Mapping[str, str | None]  # file -> SHA-256; None: cannot be read
    missing_folders: tuple[str, ...]
    shared: bool | None  # whether the launching machine's token is there
    write_error: str | None  # why the own token cannot be written
    free_bytes: int | None  # of the run folder's disk
    cache_bytes: int | None  # that the copies in the cache can have
    time: float  # `time.time()`
    gpu_memory_used: tuple[int | str, ...] | None  # bytes, or what is wrong, by GPU; None: unknown
    cores: int
    interfaces: tuple[str, ...]
    address: str | None  # the own one towards the peer
    network_error: str | None  # why it cannot reach the peer
    gpu_error: str | None  # why nvidia-smi fails
    machine: str | None  # the same only for another name of the machine, or of the container
    shell: str | None = None  # the login shell; None: not reached over ssh


@dataclass(frozen=True)
class HostAnswer:
    """The facts of a host, and how far its clock is off at least."""

    facts: HostFacts
    clock_offset: float  # seconds; positive if it is ahead of the launching machine's


@dataclass(frozen=True)
class Unreachable:
    """Why a host gave no facts."""

    reason: str
    fix: str  # a command
    connected: bool = False  # ssh works
    answers: bool = False  # the host does, even if ssh fails


Answer = HostAnswer | Unreachable
_FACTS = TypeAdapter(HostFacts)


def probe_hosts(requests: Mapping[str, ProbeRequest], show_progress: bool = False) -> dict[str, Answer]:
    """Return the facts of each host, or why it gave none. Bounded in time: a host has a minute to answer.

    In the main thread, a stop signal ends the questions, then its handler is called; if that does not raise, no host
    has given any.
    """
    questions = _Questions()
    in_main_thread = threading.current_thread() is threading.main_thread()
    with (
        handle_stop_signals(questions.end) if in_main_thread else nullcontext(),
        progress("preflight", len(requests), "hosts", show_progress) as advance,
        ThreadPoolExecutor(_AT_ONCE) as threads,
    ):
        asked = {host: threads.submit(questions.ask, host, probe_program(requests[host])) for host in requests}
        waiting = set(asked.values())
        while waiting:  # in parts: a signal just before a wait does not end it
            done, waiting = wait(waiting, _POLL_SECONDS)
            advance(len(done))
    if questions.signals:
        signal.raise_signal(questions.signals[0])
        return {host: _interrupted(host) for host in requests}
    return {host: answer.result() for host, answer in asked.items()}


def probe_this_machine(request: ProbeRequest) -> HostAnswer:
    return HostAnswer(_FACTS.validate_python(probe.collect(asdict(request))), clock_offset=0.0)


def probe_program(request: ProbeRequest) -> str:
    """Return the program that `PYTHON -` reads on a host. It prints the facts as one line."""
    cores, source = map(inspect.getsource, (cpu_cores, probe))
    seconds, arguments = math.ceil(_ANSWER_SECONDS), json.dumps(asdict(request))
    return _PROGRAM.format(seconds=seconds, cores=cores, source=source, request=arguments)


class _Questions:
    """Asks hosts, in threads, until a signal comes."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._running: dict[str, subprocess.Popen[bytes]] = {}  # host -> ssh

    def end(self, number: int) -> None:
        """Handle a signal: end the questions, and ask no other host. Waits for no lock."""
        self.signals.append(number)
        for process in list(self._running.values()):
            _kill(process)

    def ask(self, host: str, program: str) -> Answer:
        start = time.time()
        if self.signals:
            return _interrupted(host)
        try:
            ssh = start_ssh(host, [sys.executable, "-"], subprocess.PIPE, subprocess.PIPE, subprocess.PIPE)
        except FileNotFoundError:
            return Unreachable("ssh is not installed on this machine", "sudo apt-get install openssh-client")
        with ssh as process:
            self._running[host] = process
            if self.signals:  # by now
                _kill(process)
            try:
                stdout, stderr = process.communicate(program.encode(), _ANSWER_SECONDS)
            except subprocess.TimeoutExpired:
                _kill(process)
                return Unreachable(f"no answer within {_ANSWER_SECONDS:.0f} s", f"ssh {host} uptime")
        error = stderr.decode(errors="replace").strip()
        if process.returncode == 0:
            return _parse(host, stdout, error, start, time.time())
        return _why_unreachable(host, process.returncode, error)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if process.returncode is None:
        kill_group(process.pid)


def _interrupted(host: str) -> Unreachable:
    return Unreachable("a signal interrupted the question", f"ssh {host} uptime")


def _parse(host: str, stdout: bytes, error: str, start: float, end: float) -> Answer:
    """Parse an answer. `start`, `end`: of ssh, by the clock of the launching machine."""
    line = stdout.partition(probe.FACTS_MARK.encode())[2].partition(b"\n")[0]
    try:
        facts = _FACTS.validate_json(line)
    except ValidationError:
        shown = error or stdout.decode(errors="replace").strip() or "nothing"
        return _no_facts(host, f"{sys.executable} printed no facts, but {last_reason(shown)!r}")
    return HostAnswer(facts, clock_offset=max(0.0, facts.time - end) + min(0.0, facts.time - start))


def _why_unreachable(host: str, exit_code: int | None, error: str) -> Unreachable:
    if exit_code == _NOT_FOUND and "error while loading shared libraries" in error:
        reason = f"{sys.executable} does not start: {last_reason(error)}"
        return Unreachable(reason, f"ssh {host} ldd {quoted_for_host(sys.executable)}", connected=True, answers=True)
    if exit_code == _NOT_FOUND:
        return _no_facts(host, f"there is no Python at {sys.executable}")
    if exit_code == _NOT_EXECUTABLE:
        return _no_facts(host, f"{sys.executable} cannot be executed")
    if exit_code != SSH_FAILED:
        return _no_facts(host, f"{sys.executable} failed with exit code {exit_code}: {last_reason(error)}")
    for text, reason, fix in _SSH_ERRORS:
        if text in error:
            return Unreachable(reason, fix.format(host=host), answers=text not in _SILENT)
    return Unreachable(f"ssh failed: {last_reason(error)}", f"ssh -v {host} true", answers=True)


# A part of ssh's message, its meaning, a command.
_SSH_ERRORS = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is not the known one",
        "ssh-keygen -R {host}; ssh {host} true    # accept the new key, if the host was installed again",
    ),
    ("Host key verification failed", "its host key is unknown", "ssh {host} true    # accept the key"),
    (
        "Could not resolve hostname",
        "its name cannot be resolved",
        "echo 'ADDRESS {host}' | sudo tee -a /etc/hosts    # or correct the hostfile or DNS",
    ),
    ("Permission denied", "permission denied without a password", "ssh-copy-id {host}"),
    (
        "Connection refused",
        "connection refused: sshd does not run there",
        "sudo systemctl start ssh    # on {host}; the unit may be called sshd, the package is openssh-server",
    ),
    ("timed out", f"no connection within {CONNECT_SECONDS} s", "ping {host}"),
    ("No route to host", "no route to the host", "ping {host}"),
)
# Usual for a host that is down or starts.
_SILENT = ("Could not resolve hostname", "Connection refused", "timed out", "No route to host")


def _no_facts(host: str, reason: str) -> Unreachable:
    return Unreachable(reason, copy_command(sys.prefix, host), connected=True, answers=True)
