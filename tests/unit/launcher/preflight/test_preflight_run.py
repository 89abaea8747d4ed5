import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.run_files.run_folder import RunFolder
from launcher import launch
from launcher.cli import main
from launcher.hosts.machine import Devices, Machine
from launcher.preflight import run
from launcher.preflight.bandwidth import Measurement, MeasurementError
from launcher.preflight.checks import Problem
from launcher.preflight.probe_hosts import Answer, HostAnswer, ProbeRequest, Unreachable
from launcher.preflight.run import Report, check_hosts, preflight_table, require_hosts
from launcher.preflight.target import CacheNeeds, Target, target_of_hosts
from launcher.ranks.placement import HostOptions, Launcher

MACHINE = Machine(Devices("cpu", (0, 1)), environ={}, find_port=lambda: 29500)
SLOTS = {"localhost": (0, 1)}
NODES = {"node-1": (0,), "node-2": (0,), "node-10": (0,)}


@pytest.fixture
def target(tmp_path: Path) -> Target:
    machine = replace(MACHINE, environ={"DS_ACCELERATOR": "cpu"})
    hosts = target_of_hosts(SLOTS, machine, HostOptions(oversubscribe=True))
    return replace(hosts, folder=tmp_path / "runs" / "first")


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Stands for the all-reduce: the slots that were measured."""
    seen: list[object] = []

    def measure(slots: object, *_: object) -> Measurement:
        seen.append(slots)
        return Measurement(2, 1 << 20, 0.1, (0.1,), ())

    monkeypatch.setattr(run, "measure", measure)
    return seen


def test_a_healthy_machine_passes_and_nothing_is_left(target: Target, tmp_path: Path, measured: list[object]) -> None:
    """Catches a run folder that preflight leaves behind."""
    report = check_hosts(target, MACHINE)
    assert report.passed == SLOTS, report.text
    assert measured == [SLOTS]
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_keeps_its_files(target: Target) -> None:
    logs = RunFolder(target.folder).logs
    logs.mkdir(parents=True)
    (logs / "rank-0.log").touch()
    check_hosts(target, MACHINE)
    assert [path.name for path in logs.iterdir()] == ["rank-0.log"]


def test_a_host_without_room_for_the_corpora_fails(target: Target, tmp_path: Path) -> None:
    """Catches a launch whose copies of the corpora fill the disk."""
    report = check_hosts(replace(target, cache=CacheNeeds(str(tmp_path), None, {"copy": 1 << 60})), MACHINE)
    assert report.passed == {}
    assert f"for corpora at {tmp_path}" in report.text


def test_folders_of_killed_preflights_are_removed(target: Target) -> None:
    """Catches folders that pile up, and one of a preflight that still runs which is removed."""
    logs = RunFolder(target.folder).logs
    for name in (".preflight-node-1-left", ".preflight-node-2-running"):
        (logs / name).mkdir(parents=True)
    os.utime(logs / ".preflight-node-1-left", (0, 0))
    check_hosts(target, MACHINE)
    assert [path.name for path in logs.iterdir()] == [".preflight-node-2-running"]


def test_hosts_that_failed_are_not_measured(
    target: Target, measured: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an all-reduce that waits for a host that cannot take part."""
    slots = {"192.0.2.1": (0,), "localhost": (0, 1)}

    def probe_hosts(requests: Mapping[str, ProbeRequest], show_progress: bool) -> dict[str, Answer]:
        own = run.probe_this_machine(replace(requests["localhost"], peer=None))
        return {"192.0.2.1": Unreachable("refused", "ping"), "localhost": own}

    monkeypatch.setattr(run, "probe_hosts", probe_hosts)
    monkeypatch.setattr(run, "check_installed", lambda _: None)
    report = check_hosts(replace(target, slots=slots), MACHINE)
    assert measured == [{"localhost": (0, 1)}], report.text
    assert report.passed == {"localhost": (0, 1)}


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ("pdsh", "--launcher pdsh: pdsh is not installed on this machine; sudo apt-get install pdsh"),
        ("openmpi", "--launcher openmpi: ompi_info is not installed on this machine, or not in PATH"),
    ],
)
def test_a_missing_program_is_named_before_hosts_are_asked(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: Launcher, message: str
) -> None:
    """Catches DeepSpeed's traceback, again at each restart: `mpirun` alone may be another MPI's."""
    (tmp_path / "mpirun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=message):
        check_hosts(replace(target, slots=NODES, launcher=launcher), MACHINE)


def test_a_host_that_does_not_pass_is_explained_once(
    target: Target, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a host that answers again, but is not taken back, silently; and one message every ten seconds."""
    own = run.probe_this_machine(ProbeRequest())
    versions = iter(["3.12.1", "3.12.1", "3.13.0"])
    denied = Unreachable("permission denied", "ssh-copy-id", answers=True)

    def probe(*_: object, **__: object) -> object:
        facts = replace(own.facts, shared=True, python=next(versions), source="its own")
        answers = {"node-1": Unreachable("refused", "ping"), "node-2": replace(own, facts=facts), "node-3": denied}
        return answers, replace(own.facts, python="3.11.7", source="its own"), {"node-2"}

    monkeypatch.setattr(run, "_probe", probe)
    printed: dict[str, str] = {}
    target = replace(target, slots={"node-1": (0,), "node-2": (0,), "node-3": (0,)})
    for _ in range(3):
        problems = run.preflight_problems(target, ["node-1", "node-2", "node-3"], ["node-1"], printed)
        assert list(problems) == ["node-1", "node-2", "node-3"]
        assert problems["node-3"] == "ssh: permission denied"
    first, denial, second = capsys.readouterr().err.splitlines()
    assert first.startswith("deepcloze: node-2 answers, but does not pass preflight: Python: Python 3.12.1 at ")
    assert denial == "deepcloze: node-3 answers, but does not pass preflight: ssh: permission denied"
    assert "Python 3.13.0" in second


@pytest.mark.parametrize(
    ("hosts", "peers", "expected"),
    [
        (["node-2"], ["node-1"], {"node-2": "node-1"}),
        (["node-1", "node-2"], ["node-10"], {"node-1": "node-10", "node-2": "node-10"}),
        (["node-2", "node-10"], ["node-2", "node-10"], {"node-2": "node-10", "node-10": "node-2"}),
        (["node-2"], ["node-2"], {"node-2": None}),
    ],
)
def test_a_host_that_comes_back_must_reach_one_that_answers(
    hosts: list[str],
    peers: list[str],
    expected: dict[str, str | None],
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a host that is taken back although it resolves the first host to a loopback address, and hosts that do
    not pass because the first one is lost and its name unknown."""
    asked: dict[str, str | None] = {}

    def probe_hosts(requests: Mapping[str, ProbeRequest], _: bool) -> dict[str, Answer]:
        asked.update({host: request.peer for host, request in requests.items()})
        return {host: Unreachable("refused", "ping") for host in requests}

    monkeypatch.setattr(run, "probe_hosts", probe_hosts)
    run.preflight_problems(replace(target, slots=NODES), hosts, peers, {})
    assert asked == expected


def test_a_host_that_comes_back_needs_no_room_for_saved_checkpoints(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a host that is left out because the run itself has filled the disk."""
    seen = []
    monkeypatch.setattr(run, "_probe", lambda subset, **_: seen.append(subset) or ({}, None, {}))
    monkeypatch.setattr(run, "find_problems", lambda *_: {"localhost": []})
    run.preflight_problems(replace(target, checkpoint_bytes=1 << 60), ["localhost"], [], {})
    assert [subset.checkpoint_bytes for subset in seen] == [0]


def test_an_all_reduce_that_fails_fails_preflight(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches hosts that pass one by one but do not work together, and --allow_missing that ignores it."""

    def measure(*_: object) -> Measurement:
        raise MeasurementError("the all-reduce failed: no route")

    monkeypatch.setattr(run, "measure", measure)
    with pytest.raises(UserError, match="preflight: the all-reduce failed: no route"):
        require_hosts(check_hosts(target, MACHINE), target, allow_missing=True)


@pytest.mark.parametrize(("allow_missing", "code"), [(False, 2), (True, 0)])
def test_the_exit_code_of_the_command(
    allow_missing: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a failed host that a script does not notice."""
    monkeypatch.setattr(launch, "check_hosts", lambda *_: Report({"192.0.2.1": (0,)}, "the table"))
    (tmp_path / "hosts").write_text("192.0.2.1 slots=1\n192.0.2.2 slots=1\n")
    flags = ["--allow_missing"] if allow_missing else []
    assert main(["preflight", "--hostfile", str(tmp_path / "hosts"), *flags]) == code
    printed = capsys.readouterr()
    assert printed.out == "the table\n"
    assert ("1 of 2 hosts failed: 192.0.2.2" in printed.err) == (code == 2)


def test_an_override_needs_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", "--schedule.steps=3"]) == 2
    assert "--schedule.steps applies to a config: give --config too" in capsys.readouterr().err


def table(answer: Callable[..., HostAnswer], only_failed: bool = False) -> str:
    answers = {"node-1": answer(), "node-2": answer(clock_offset=3600.0), "node-10": Unreachable("refused", "start it")}
    problems = {
        "node-1": [],
        "node-2": [Problem("clock", "an hour ahead", "ssh node-2 chronyc"), Problem("disk", "full", "df")],
        "node-10": [Problem("ssh", "refused", "start it")],
    }
    measured = Measurement(3, 1 << 20, 0.002, (0.1, 0.2, 0.1), (1e9, 5e8, 9e8))
    return preflight_table(answers, problems, NODES, measured, only_failed)


def test_a_row_for_each_host_and_a_fix_for_each_problem(answer: Callable[..., HostAnswer]) -> None:
    header, first, second, third, *rest = table(answer).splitlines()
    assert header.split()[:4] == ["host", "ssh", "Python", "packages"]
    for row in (first, second):  # aligned
        assert row[header.index("Python")] == "3"
    assert second.count("FAILED") == 2
    assert second[header.index("clock") :].startswith("FAILED")
    assert second[header.index("disk") :].startswith("FAILED")
    assert first.endswith("ok")
    assert third.split()[:3] == ["node-10", "FAILED", "?"]
    assert rest[:6] == [
        "node-2: clock: an hour ahead",
        "    fix: ssh node-2 chronyc",
        "node-2: disk: full",
        "    fix: df",
        "node-10: ssh: refused",
        "    fix: start it",
    ]
    assert rest[6] == (
        "all-reduce of 1 MiB over 3 ranks: 2.0 ms, 699 MB/s bus bandwidth; slowest network: node-2, 500 MB/s; "
        "slowest to compute: node-2, 200.0 ms"
    )
    assert rest[7:] == ["preflight: 1 of 3 hosts passed"]


def test_before_a_launch_healthy_hosts_need_no_row(answer: Callable[..., HostAnswer]) -> None:
    assert "node-1 " not in table(answer, only_failed=True)
    assert table(answer, only_failed=True).splitlines()[1].startswith("node-2")
    healthy = preflight_table({"node-1": answer()}, {"node-1": []}, {"node-1": (0,)}, None, only_failed=True)
    assert healthy == "preflight: 1 of 1 host passed"


def test_a_host_that_was_not_timed_is_not_fast(answer: Callable[..., HostAnswer]) -> None:
    """Catches a speed that is ok although nothing was measured, as for a single rank."""
    table = preflight_table({"node-1": answer()}, {"node-1": []}, {"node-1": (0,)}, None, only_failed=False)
    assert table.splitlines()[1].split()[-1] == "-"
