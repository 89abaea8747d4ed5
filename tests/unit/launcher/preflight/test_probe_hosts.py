"""Asking hosts over ssh, with a stand-in for ssh."""

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from experiment.process.signals import handle_stop_signals
from launcher.hosts.probe import FACTS_MARK
from launcher.preflight import probe_hosts as module
from launcher.preflight.checks import find_problems
from launcher.preflight.probe_hosts import HostAnswer, ProbeRequest, Unreachable, probe_hosts
from launcher.preflight.run import preflight_table
from launcher.preflight.target import Target
from waiting import LIMIT, wait_until

REPOSITORY = Path(__file__).parents[4]

Ssh = Callable[[str], None]


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ssh:
    """Makes `ssh -o … HOST COMMAND` a shell script, where $1 is the host and $2 the command."""

    def make(script: str) -> None:
        (tmp_path / "bin").mkdir()
        program = tmp_path / "bin" / "ssh"
        program.write_text(f"#!/bin/sh\nwhile [ $1 = -o ]; do shift 2; done\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")

    return make


def ask(host: str = "node-1") -> HostAnswer | Unreachable:
    return probe_hosts({host: ProbeRequest(libraries=("pytest",))})[host]


def test_facts_of_a_host(ssh: Ssh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a request or facts that do not survive the way or what a shell prints around them, and modules of the
    working directory that are taken."""
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.setenv("SHELL", "/bin/zsh")
    ssh(f"printf 'Welcome\\n to $1'; cd {tmp_path}; eval $2; echo bye")
    answer = ask()
    assert isinstance(answer, HostAnswer), answer
    assert answer.facts.versions["pytest"] == pytest.__version__
    assert answer.facts.shell == "/bin/zsh"
    assert answer.clock_offset == 0.0


@pytest.mark.parametrize("offset", [-3600, 3600])
def test_a_clock_is_compared_with_the_time_of_the_question(ssh: Ssh, tmp_path: Path, offset: int) -> None:
    """Catches a slow connection that counts as a wrong clock, and a clock that is wrong by hours."""
    (tmp_path / "sitecustomize.py").write_text(f"import time\nnow = time.time\ntime.time = lambda: now() + {offset}\n")
    ssh(f"export PYTHONPATH={tmp_path}; sleep 1; eval $2")
    answer = ask()
    assert isinstance(answer, HostAnswer)
    assert 0 < answer.clock_offset / offset <= 1
    assert abs(answer.clock_offset) > 3000


@pytest.mark.parametrize(
    ("script", "reason", "fix"),
    [
        (
            "echo 'ssh: connect to host node-1 port 22: Connection refused' >&2; exit 255",
            "connection refused: sshd does not run there",
            "sudo systemctl start ssh ",
        ),
        ("echo 'Host key verification failed.' >&2; exit 255", "its host key is unknown", "ssh node-1 true"),
        (
            "echo '@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @' >&2;"
            "echo 'Host key verification failed.' >&2; exit 255",
            "its host key is not the known one",
            "ssh-keygen -R node-1",
        ),
        (
            "echo 'me@node-1: Permission denied (publickey,password).' >&2; exit 255",
            "permission denied without a password",
            "ssh-copy-id node-1",
        ),
        (
            "echo 'ssh: Could not resolve hostname node-1: Name or service not known' >&2; exit 255",
            "its name cannot be resolved",
            "echo 'ADDRESS node-1'",
        ),
        (
            "echo 'ssh: connect to host node-1 port 22: Connection timed out' >&2; exit 255",
            "no connection",
            "ping node-1",
        ),
        ("echo 'kex_exchange: closed' >&2; exit 255", "ssh failed: kex_exchange: closed", "ssh -v node-1 true"),
        (
            "echo 'Too many authentication failures' >&2; echo 'Disconnected from 10.0.0.5 port 22' >&2; exit 255",
            "ssh failed: Too many authentication failures; Disconnected from 10.0.0.5 port 22",
            "ssh -v node-1 true",
        ),
        (
            "echo 'python: error while loading shared libraries: libpython3.11.so.1.0: No such file' >&2; exit 127",
            "does not start: python: error while loading shared libraries: libpython3.11.so.1.0",
            "ssh node-1 ldd ",
        ),
        ("exit 127", f"there is no Python at {sys.executable}", "rsync -a"),
        ("exit 126", "cannot be executed", "rsync -a"),
        ("echo 'SyntaxError: invalid syntax' >&2; exit 1", "exit code 1: SyntaxError: invalid syntax", "rsync -a"),
        ("cat > /dev/null; echo welcome", "printed no facts, but 'welcome'", "rsync -a"),
    ],
)
def test_a_host_without_facts_says_why(ssh: Ssh, script: str, reason: str, fix: str) -> None:
    """Catches one message for all failures, of which each has another remedy."""
    ssh(script)
    answer = ask()
    assert isinstance(answer, Unreachable)
    assert reason in answer.reason
    assert fix in answer.fix
    silent = ("connection refused", "its name cannot", "no connection")
    assert answer.answers != answer.reason.startswith(silent)


def test_a_path_passes_two_shells(ssh: Ssh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a fix in which the shell of the host splits the path."""
    monkeypatch.setattr(sys, "executable", "/my venv/bin/python")
    ssh("echo 'python: error while loading shared libraries: libpython3.11.so.1.0' >&2; exit 127")
    answer = ask()
    assert isinstance(answer, Unreachable)
    assert shlex.split(shlex.split(answer.fix)[-1]) == ["/my venv/bin/python"]


def test_a_host_that_hangs_is_given_up(ssh: Ssh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ANSWER_SECONDS", 0.2)
    ssh("exec sleep 1000")
    answer = ask()
    assert isinstance(answer, Unreachable)
    assert answer.reason == "no answer within 0 s"


def test_a_program_that_waits_for_a_disk_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a process that each look leaves on a host, where nothing else ends it."""
    monkeypatch.setattr(module, "_ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(module.inspect, "getsource", lambda _: "import time\ndef main(_): time.sleep(3600)")
    program = module.probe_program(ProbeRequest())
    done = subprocess.run([sys.executable, "-"], input=program, text=True, check=False, timeout=LIMIT)
    assert done.returncode == -signal.SIGALRM


def test_hosts_are_asked_in_a_thread(ssh: Ssh) -> None:
    """Catches signal handlers in a thread that waits for hosts to return, where Python allows none."""
    ssh("eval $2")
    with ThreadPoolExecutor() as threads:
        assert isinstance(threads.submit(ask).result(), HostAnswer)


def test_hosts_are_asked_in_a_notebook(ssh: Ssh) -> None:
    """Catches an event loop that is started where one runs, as in the cells of a notebook."""
    ssh("eval $2")

    async def cell() -> HostAnswer | Unreachable:
        return ask()

    assert isinstance(asyncio.run(cell()), HostAnswer)


def test_a_machine_without_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, as in a container without it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    answer = ask()
    assert isinstance(answer, Unreachable)
    assert (answer.reason, answer.connected) == ("ssh is not installed on this machine", False)


def test_a_signal_ends_the_questions(ssh: Ssh, tmp_path: Path) -> None:
    """Catches ssh processes that outlive the command, and a signal at a moment at which the command then hangs."""
    ssh(f"echo $$ >> {tmp_path}/pids; exec sleep 1000")
    code = """
import os, signal, sys, threading
from launcher.preflight.probe_hosts import ProbeRequest, probe_hosts
from experiment.process.signals import handle_stop_signals

def handler(number):
    raise KeyboardInterrupt

with handle_stop_signals(handler):
    for milliseconds in range(60):
        timer = threading.Timer(milliseconds / 1000, os.kill, (os.getpid(), signal.SIGTERM))
        try:
            timer.start()
            probe_hosts({"node-1": ProbeRequest()})
        except KeyboardInterrupt:
            print("interrupted")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True, timeout=LIMIT
    )
    assert done.stdout.splitlines() == ["interrupted"] * 60
    processes = [Path("/proc", pid) for pid in (tmp_path / "pids").read_text().split()]
    assert processes
    wait_until(lambda: not any(process.exists() for process in processes))


def test_a_signal_that_its_handler_notes_ends_the_questions(ssh: Ssh) -> None:
    """Catches a launch that is restarting and ends with a traceback when it is asked to stop."""
    ssh(f"kill -TERM {os.getpid()}; exec sleep 1000")
    received: list[int] = []
    with handle_stop_signals(received.append):
        answer = ask()
    assert received == [signal.SIGTERM]
    assert isinstance(answer, Unreachable)
    assert answer.reason == "a signal interrupted the question"


def test_hosts_are_asked_at_once_but_not_all(
    ssh: Ssh, tmp_path: Path, answer: Callable[..., HostAnswer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hosts that are asked one after another, and too many processes at once."""
    monkeypatch.setattr(module, "_AT_ONCE", 8)
    monkeypatch.setattr(module, "_ANSWER_SECONDS", LIMIT)
    (tmp_path / "facts").write_text(FACTS_MARK + json.dumps(asdict(answer().facts)))
    for folder in ("asked", "running"):
        (tmp_path / folder).mkdir()
    answers_with_others = "until [ $(ls asked | wc -l) -ge 8 ]; do sleep 0.02; done"
    ssh(
        f"cat > /dev/null; cd {tmp_path}; touch asked/$1 running/$1; ls running | wc -l >> counts; "
        f"{answers_with_others}; rm running/$1; exec cat facts"
    )
    answers = probe_hosts({f"node-{number}": ProbeRequest() for number in range(24)})
    assert {type(found) for found in answers.values()} == {HostAnswer}
    assert max(map(int, (tmp_path / "counts").read_text().split())) <= 8


def test_hundreds_of_hosts_take_seconds(answer: Callable[..., HostAnswer], target: Callable[..., Target]) -> None:
    """Catches anything quadratic."""
    hosts = target(*(f"node-{number}" for number in range(512)))
    missing = Unreachable("there is no Python", "rsync -a", connected=True, answers=True)
    answers = {host: missing if host == "node-77" else answer() for host in hosts.slots}
    start = time.process_time()
    problems = find_problems(answers, answer().facts, hosts, set(answers))
    table = preflight_table(answers, problems, hosts.slots, None, only_failed=False)
    assert time.process_time() - start < 1  # 0.02 s
    assert [host for host in answers if problems[host]] == ["node-77"]
    assert sum(line.startswith("node-") and "3.11.7" in line for line in table.splitlines()) == 511
    assert table.endswith("preflight: 511 of 512 hosts passed")
