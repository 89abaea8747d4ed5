import itertools
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiment.process.own_process import LAUNCH_VARIABLE
from experiment.process.signals import HANDLED_SIGNALS
from experiment.run_files.heartbeat import STACK_SIGNAL, Heartbeat
from launcher.hosts import guarded_hosts, host_guard
from launcher.hosts.guarded_hosts import GuardedHosts
from launcher.hosts.host_guard import environment_file, read_environment
from stand_in_hosts import STAND_IN_GUARD, install_ssh
from waiting import LIMIT, wait_until


@pytest.fixture
def run() -> Iterator[str]:
    """A run of its own, so that nothing else is killed."""
    name = os.urandom(8).hex()
    yield name
    for left in environment_file(name).parent.glob(f"deepcloze-{name}*"):  # by a guard that the test has stopped
        left.unlink()


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_ssh(tmp_path / "bin", monkeypatch, before="echo welcome; printf 'to $1'")


ENVIRONMENT = {"SECRET": "two words 'quoted'"}


def start_process(launch: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(["sleep", "3600"], env=os.environ | {LAUNCH_VARIABLE: launch})


@pytest.fixture
def process(run: str) -> Iterator["subprocess.Popen[bytes]"]:
    process = start_process(f"{run}-1")
    yield process
    process.kill()
    process.wait()


def test_the_end_of_a_launch_ends_its_processes(run: str, process: "subprocess.Popen[bytes]") -> None:
    """Catches orphans, a kill of another run's processes, and a secret that stays."""
    other = start_process(f"{os.urandom(8).hex()}-1")
    try:
        with GuardedHosts(["localhost"], f"{run}-2", ENVIRONMENT, lambda: None) as hosts:
            assert process.wait(LIMIT) == -9, "left by an earlier launch of the run"
            own = start_process(f"{run}-2")
            wait_until(lambda: hosts.processes.get("localhost") == {own.pid})
            assert read_environment(f"{run}-2") == {"SECRET": "two words 'quoted'"}
            assert environment_file(f"{run}-2").stat().st_mode & 0o077 == 0
        assert own.wait(LIMIT) == -9
        assert other.poll() is None
        assert not environment_file(f"{run}-2").exists()
        assert hosts.lost == {}
    finally:
        other.kill()
        other.wait()


def test_a_process_that_ends_is_noticed(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a killed rank that a launch does not know of, and one that is taken for a process of another host."""
    lists = "".join(
        f"until [ -e {tmp_path}/{number} ]; do sleep 0.02; done; echo 'deepcloze guard: {found}'\n"
        for number, found in enumerate(([7, 8], [8], []))
    )
    guard = STAND_IN_GUARD.replace("while read", f"{lists}while read")
    install_ssh(tmp_path / "bin", monkeypatch, before=guard)
    with GuardedHosts(["10.0.0.1"], f"{run}-1", ENVIRONMENT, lambda: None) as hosts:
        (tmp_path / "0").touch()
        wait_until(lambda: hosts.processes.get("10.0.0.1") == {7, 8})
        assert not hosts.has_ended("node", 7)
        (tmp_path / "1").touch()
        wait_until(lambda: hosts.has_ended("node", 7))
        assert not hosts.has_ended("node", 8)
        assert not hosts.has_ended("node", 9), "it was never there"
        assert not hosts.has_ended("another", 7)
        assert hosts.ended_host() is None
        (tmp_path / "2").touch()
        wait_until(lambda: hosts.ended_host() == "10.0.0.1")


def test_hosts_reply_with_what_the_ranks_need(run: str) -> None:
    with GuardedHosts(["localhost", "node-2"], f"{run}-1", ENVIRONMENT, lambda: None) as hosts:
        assert {reply.address for reply in hosts.replies.values()} == {"127.0.0.1"}
        assert all(reply.port > 0 for reply in hosts.replies.values())


def test_a_host_that_cannot_be_reached_is_lost(run: str) -> None:
    with GuardedHosts(["missing-1", "node-2"], f"{run}-1", ENVIRONMENT, lambda: None) as hosts:
        assert hosts.lost == {"missing-1": "ssh: Could not resolve hostname missing-1: Name or service not known"}
        assert list(hosts.replies) == ["node-2"]


def test_no_signal_to_all_processes_ends_ssh(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that are killed on all hosts because systemd or a batch system signals all processes on the machine
    of the launch: without ssh, a guard considers it lost."""
    popen, blocked = subprocess.Popen, set[signal.Signals]()

    def start(*arguments: object, **options: object) -> "subprocess.Popen[bytes]":
        blocked.update(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        return popen(*arguments, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(subprocess, "Popen", start)
    with GuardedHosts(["localhost"], f"{run}-1", ENVIRONMENT, lambda: None):
        assert blocked >= set(HANDLED_SIGNALS)


def test_a_silent_host_is_lost(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that waits for a host that has lost its power, which closes no connection."""
    install_ssh(tmp_path / "bin", monkeypatch, before=f"echo $$ > {tmp_path}/guard.pid")
    monkeypatch.setattr(guarded_hosts, "SILENCE_SECONDS", 1.0)
    lost = threading.Event()
    with GuardedHosts(["localhost"], f"{run}-1", ENVIRONMENT, lost.set) as hosts:
        os.kill(int((tmp_path / "guard.pid").read_text()), 19)
        assert lost.wait(60)
        assert hosts.lost == {"localhost": "no answer within 1 s"}


def test_a_host_that_reads_nothing_disturbs_no_other_host(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches beats to all hosts, and the end, that wait for a host whose pipe is full: its variables do not fit."""
    hangs = f'case "$1" in hangs) exec sleep 3600;; esac\nexec tee {tmp_path}/sent | {{ {STAND_IN_GUARD} }}'
    install_ssh(tmp_path / "bin", monkeypatch, before=hangs)
    monkeypatch.setattr(guarded_hosts, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(guarded_hosts, "SILENCE_SECONDS", 3600.0)
    monkeypatch.setattr(guarded_hosts, "_START_SECONDS", 3600.0)
    monkeypatch.setattr(guarded_hosts, "_END_SECONDS", 0.1)
    hosts = GuardedHosts(["hangs", "node-2"], f"{run}-1", {"LONG": "x" * (1 << 17)}, lambda: None)
    threading.Thread(target=hosts.start, daemon=True).start()
    wait_until(lambda: (tmp_path / "sent").exists() and (tmp_path / "sent").read_bytes().count(b"\n") > 10)
    hosts.close()


def test_a_cancelled_start_waits_for_no_host(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stop of a launch that waits for a host that hangs."""
    install_ssh(tmp_path / "bin", monkeypatch, before="exec sleep 3600")
    hosts = GuardedHosts(["hangs"], f"{run}-1", ENVIRONMENT, lambda: None)
    hosts.cancel()
    started = time.monotonic()
    with hosts:
        pass
    assert time.monotonic() - started < guarded_hosts._END_SECONDS


@pytest.mark.parametrize("session", ["", "setsid"])
def test_a_process_that_ssh_has_started_delays_no_end(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, session: str
) -> None:
    """Catches a start or stop that never returns if ssh uses a ProxyCommand, which keeps its output open, to a silent
    host, also if that has left the process group."""
    started = f"{session} sh -c 'echo $$ > {tmp_path}/pid; exec sleep 3600' &"
    install_ssh(tmp_path / "bin", monkeypatch, before=f"{started} sleep 3600")
    for limit in ("_END_SECONDS", "_CLOSE_SECONDS"):
        monkeypatch.setattr(guarded_hosts, limit, 0.1)
    hosts = GuardedHosts(["hangs"], f"{run}-1", ENVIRONMENT, lambda: None)
    starting, closing = (threading.Thread(target=target, daemon=True) for target in (hosts.start, hosts.close))
    starting.start()
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    closing.start()
    closing.join(LIMIT)
    starting.join(10.0)
    with suppress(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 9)
    assert not closing.is_alive()
    assert not starting.is_alive()


def test_a_killed_guard_leaves_nothing(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks and secrets that stay on a host whose guard alone was killed, because memory ran out, and a line
    of a login banner as the reason."""
    install_ssh(tmp_path / "bin", monkeypatch, before=f"echo welcome; echo $$ > {tmp_path}/guard.pid")
    with GuardedHosts(["localhost"], f"{run}-1", ENVIRONMENT, lambda: None) as hosts:
        own = start_process(f"{run}-1")
        written = environment_file(f"{run}-1").with_name(f"{environment_file(f'{run}-1').name}.7")
        written.touch()  # by a guard that was killed at once
        os.kill(int((tmp_path / "guard.pid").read_text()), 9)
        assert own.wait(LIMIT) == -9
        assert hosts.lost == {"localhost": "the connection was closed"}
    assert not environment_file(f"{run}-1").exists()
    assert not written.exists()


def start_guard(launch: str, silence_seconds: float = host_guard.SILENCE_SECONDS) -> "subprocess.Popen[bytes]":
    """A guard without ssh, which has replied."""
    code = f"from launcher.hosts import host_guard\nhost_guard.SILENCE_SECONDS = {silence_seconds}\nhost_guard.main()"
    guard = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    request = {"launch": launch, "environment": ENVIRONMENT, "head": "localhost"}
    guard.stdin.write(json.dumps(request).encode() + b"\n")
    guard.stdin.flush()
    guard.stdout.readline()
    return guard


@pytest.mark.parametrize("killed", [True, False])
def test_a_lost_launcher_ends_the_processes(run: str, process: "subprocess.Popen[bytes]", killed: bool) -> None:
    """Catches ranks that keep the GPUs of a host because their launcher was killed or cut off."""
    guard = start_guard(f"{run}-1", silence_seconds=host_guard.SILENCE_SECONDS if killed else 2.0)
    own = start_process(f"{run}-1")
    if killed:
        guard.stdin.close()
    assert own.wait(LIMIT) == -9
    guard.wait(LIMIT)
    assert not environment_file(f"{run}-1").exists()


def test_a_guard_that_is_asked_to_end_gives_the_ranks_time(run: str) -> None:
    """Catches a host that shuts down and kills ranks that are saving a checkpoint."""
    guard = start_guard(f"{run}-1")
    own = start_process(f"{run}-1")
    guard.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        own.wait(2.0)
    own.terminate()  # saved
    assert own.wait(LIMIT) == -15
    guard.wait(LIMIT)
    assert not environment_file(f"{run}-1").exists()


def test_a_guard_that_is_asked_to_end_stays_while_the_launcher_lives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches ranks that are killed while they save a large checkpoint, because the guard alone got a signal."""
    seconds = itertools.count()
    monkeypatch.setattr(host_guard, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    monkeypatch.setattr(host_guard, "_processes", lambda _: range(1))
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    for line in [host_guard._LEAVE, *[""] * 100, host_guard.END]:
        lines.put(line)
    host_guard._wait_for_end("launch", lines)
    assert len(capsys.readouterr().out.splitlines()) == 101


def test_processes_are_listed_rarely(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a guard that reads all of /proc for each line, and one that stays for processes that have ended."""
    lists = iter([range(2), range(1), range(0)])
    monkeypatch.setattr(host_guard, "_processes", lambda _: next(lists))
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    for line in ["", "", "", host_guard._LEAVE, ""]:
        lines.put(line)
    host_guard._wait_for_end("launch", lines)
    sent = [line.removeprefix(host_guard.PREFIX) for line in capsys.readouterr().out.splitlines()]
    assert sent == ["[0, 1]", "[0, 1]", "[0, 1]", "[0]", "[]"]


def test_many_hosts_are_guarded_at_once(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches hosts that are connected one after another."""
    names = [f"node-{number}" for number in range(20)]
    (tmp_path / "connected").mkdir()
    wait_for_all = f"touch $1; until [ $(ls | wc -l) -eq {len(names)} ]; do sleep 0.05; done"
    guard = STAND_IN_GUARD.replace("read -r request", f"read -r request; cd {tmp_path}/connected; {wait_for_all}")
    install_ssh(tmp_path / "bin", monkeypatch, before=guard)
    monkeypatch.setattr(guarded_hosts, "_START_SECONDS", LIMIT)
    with GuardedHosts(names, f"{run}-1", ENVIRONMENT, lambda: None) as hosts:
        assert len(hosts.replies) == len(names)


def test_a_guard_says_where_it_cannot_write(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the last line of a traceback, without a path, as the reason why a host is lost."""
    monkeypatch.setattr(host_guard, "environment_file", lambda launch: tmp_path / "missing" / f"{launch}.json")
    with pytest.raises(SystemExit, match=f"cannot write to {tmp_path}/missing: No such file or directory"):
        host_guard.guard(f"{run}-1", {}, "localhost", queue.SimpleQueue())


def test_a_rank_is_asked_for_its_stack(run: str, tmp_path: Path) -> None:
    """Catches a rank on another host without stack, and a signal to a process that is none of the launch."""
    code = f"import faulthandler, time; faulthandler.register({STACK_SIGNAL:d}, open({str(tmp_path / 'stack')!r}, 'w'))"
    code += f"; open({str(tmp_path / 'ready')!r}, 'w').close(); time.sleep(3600)"
    other = start_process(f"{os.urandom(8).hex()}-1")
    with GuardedHosts(["localhost"], f"{run}-1", ENVIRONMENT, lambda: None) as hosts:
        own = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {LAUNCH_VARIABLE: f"{run}-1"})
        wait_until((tmp_path / "ready").exists)
        for host, pid in (("another", own.pid), (platform.node(), other.pid), (platform.node(), own.pid)):
            hosts.request_stack(Heartbeat(0, host, pid, 1, 57, "training", False, 0.0))
        wait_until((tmp_path / "stack").read_text)
    assert (tmp_path / "stack").read_text().count("most recent call first") == 1
    own.wait(LIMIT)
    assert other.poll() is None
    other.kill()
    other.wait()
