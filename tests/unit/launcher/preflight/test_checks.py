"""Facts of hosts that differ in one thing from what a run needs."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from launcher.preflight.bandwidth import Measurement
from launcher.preflight.checks import find_problems, find_slow_hosts
from launcher.preflight.probe_hosts import HostAnswer, Unreachable
from launcher.preflight.run import _values
from launcher.preflight.target import CacheNeeds, Target

Answers = Callable[..., HostAnswer]
Targets = Callable[..., Target]
GB = 10**9


@pytest.mark.parametrize(
    ("changes", "check", "text", "fix"),
    [
        (
            {"python": "3.12.1"},
            "Python",
            "Python 3.12.1 at /venv/bin/python, expected 3.11.7",
            "rsync -a /venv/ b:/venv/",
        ),
        (
            {"versions": {"torch": "2.11.0", "wandb": "0.31"}},
            "packages",
            "torch 2.11.0 (expected 2.13.0)",
            "ssh b /venv/bin/python -m pip install torch==2.13.0",
        ),
        ({"shell": "/bin/tcsh"}, "ssh", "the login shell is /bin/tcsh", "ssh b chsh -s /bin/bash"),
        ({"versions": {"torch": None}}, "packages", "torch missing (expected 2.13.0)", "torch==2.13.0"),
        ({"source": "changed"}, "code", "other Python files at /deepcloze", "rsync -a /deepcloze/"),
        ({"source": None}, "code", "deepcloze is not at /deepcloze", "rsync"),
        (
            {"checksums": {"/corpora/wiki/manifest.json": None}},
            "files",
            "/corpora/wiki/manifest.json cannot be read",
            "rsync -a /corpora/wiki/ b:/corpora/wiki/",
        ),
        ({"checksums": {"/corpora/wiki/manifest.json": "other"}}, "files", "differs from this machine's", "rsync"),
        ({"missing_folders": ("/home/me",)}, "files", "no folder /home/me", "ssh b mkdir -p /home/me"),
        (
            {"missing_folders": ("/a b",)},
            "files",
            "no folder /a b",
            f"ssh b mkdir -p {shlex.quote(shlex.quote('/a b'))}",
        ),
        ({"shared": False, "free_bytes": None}, "run folder", "are not seen on the host", "ssh b df -h /runs/first"),
        ({"write_error": "Read-only file system"}, "run folder", "cannot write to /runs/first: Read-only", "ssh b df"),
        ({"free_bytes": 99 * GB}, "disk", "99.0 GB free at /runs/first, expected 100.0 GB", "checkpoint.keep_last"),
        ({"gpu_memory_used": (0,)}, "devices", "no GPU 1: 1 GPUs, expected 2", "or --exclude b:1"),
        ({"gpu_memory_used": (0, 9 * GB)}, "devices", "busy GPUs: 1 (9.0 GB in use)", "--exclude b:1"),
        ({"gpu_memory_used": (0, "[Unknown Error]")}, "devices", "busy GPUs: 1 ([Unknown Error])", "--exclude b:1"),
        ({"gpu_memory_used": (), "cores": 1}, "devices", "1 CPU cores, expected 2", "tasks, or pass --oversub"),
        (
            {"gpu_memory_used": (), "gpu_error": "NVIDIA-SMI has failed (exit code 9)"},
            "devices",
            "nvidia-smi failed: NVIDIA-SMI has failed (exit code 9)",
            "ssh b nvidia-smi",
        ),
        ({"clock_offset": -61.0}, "clock", "at least 61 s behind this machine's", "ssh b sudo chronyc makestep"),
        ({"clock_offset": 3600.0}, "clock", "at least 3600 s ahead of this machine's", "ssh b"),
        ({"network_error": "Name or service not known"}, "network", "cannot reach a: Name or", "ssh b getent hosts a"),
        ({"address": "127.0.1.1"}, "network", "loopback", "/etc/hosts"),
        ({"address": "::1"}, "network", "loopback", "/etc/hosts"),
        (
            {"interfaces": ("lo", "ib0")},
            "network",
            "no interface eth0, as GLOO_SOCKET_IFNAME says; it has lo, ib0",
            "ssh b ip -br address",
        ),
    ],
)
def test_a_difference_is_one_problem_of_its_host(
    answer: Answers,
    target: Targets,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    check: str,
    text: str,
    fix: str,
) -> None:
    """Catches a check that does not see its difference, or blames another check or host for it."""
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    answers = {"a": answer(), "b": answer(**changes), "c": answer()}
    problems = find_problems(answers, answer().facts, target("a", "b", "c"), {"a", "b", "c"})
    assert problems["a"] == problems["c"] == []
    (problem,) = problems["b"]
    assert problem.check == check
    assert text in problem.text
    assert fix in problem.fix


@pytest.mark.parametrize(
    ("version", "end"),
    [
        ("2.13.0+cu126", "torch==2.13.0+cu126 --extra-index-url https://download.pytorch.org/whl/cu126"),
        ("2.13.0+cpu", "torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu"),
        ("2.13.0a0+e1c3b1f", "torch==2.13.0a0+e1c3b1f"),
    ],
)
def test_builds_of_torch_are_installed_from_their_index(
    answer: Answers, target: Targets, version: str, end: str
) -> None:
    """Catches a command that fails, because PyPI has no version with a build."""
    here = answer(versions={"torch": version, "wandb": None})
    (problem,) = find_problems({"a": answer()}, here.facts, target("a"), {"a"})["a"]
    assert problem.fix.endswith(f"-m pip install {end}")


@pytest.mark.parametrize(
    "changes",
    [
        {"clock_offset": 59.0},
        {"shell": "/usr/bin/fish"},
        {"versions": {"torch": "2.13.0", "wandb": "0.31"}},  # the launching machine has none
        {"gpu_memory_used": (0, 1 << 29, "[Unknown Error]", 9 * GB)},  # GPUs 2 and 3 are not needed
        {"gpu_memory_used": None, "cores": 1},  # of a maker that is not counted
    ],
)
def test_what_does_not_matter_is_no_problem(answer: Answers, target: Targets, changes: dict[str, Any]) -> None:
    assert find_problems({"a": answer(**changes)}, answer().facts, target("a"), {"a"}) == {"a": []}


def test_a_driver_does_not_matter_on_the_cpu(answer: Answers, target: Targets) -> None:
    hosts = replace(target("a"), uses_cpu=True)
    assert find_problems({"a": answer(gpu_error="failed")}, answer().facts, hosts, {"a"}) == {"a": []}


def test_a_token_that_is_not_seen_here_means_another_folder(answer: Answers, target: Targets) -> None:
    """Catches a run folder that is shared in one direction, by a copy for example."""
    problems = find_problems({"a": answer(), "b": answer()}, answer().facts, target("a", "b"), {"a"})
    (problem,) = problems["b"]
    assert problem.check == "run folder"
    assert "files that the host writes there are not seen on this machine" in problem.text
    assert problems["a"] == []


def test_a_lost_peer_is_no_problem_of_other_hosts(answer: Answers, target: Targets) -> None:
    """Catches healthy hosts that fail because the name of the first one is unknown by now, and a table that says that
    their network works."""
    unknown = answer(address=None, network_error="Name or service not known")
    lost = Unreachable("its name cannot be resolved", "correct DNS")
    answers = {"a": lost, "b": unknown, "c": unknown}
    problems = find_problems(answers, answer().facts, target("a", "b", "c"), {"b", "c"})
    assert [len(found) for found in problems.values()] == [1, 0, 0]
    assert _values(unknown)["network"] == "?"


def test_without_a_run_its_folder_and_disk_are_not_checked(answer: Answers, target: Targets) -> None:
    hosts = replace(target("a"), folder=None, checkpoint_bytes=0)
    facts = answer(shared=None, free_bytes=None)
    assert find_problems({"a": facts}, answer().facts, hosts, set()) == {"a": []}


def test_a_slow_host_is_told_from_its_neighbours() -> None:
    slots = dict.fromkeys("abcde", (0,))
    measured = Measurement(5, 1 << 20, 0.1, (0.1, 0.1, 0.9, 0.1, 0.1), (1e9, 1e9, 1e9, 2e8, 9e8))
    problems = find_slow_hosts(slots, measured)
    assert {host: [problem.text for problem in found] for host, found in problems.items() if found} == {
        "c": ["computes 9.0 times slower than the median of all hosts"],
        "d": ["its network gives 200.0 MB/s; the median of all hosts is 1,000.0 MB/s"],
    }


def test_the_slow_one_of_two_hosts() -> None:
    """Catches two hosts of which none can be slower than the median. Their link is that of both."""
    slots = {"a": (0,), "b": (0,)}
    slow_link = find_slow_hosts(slots, Measurement(2, 1 << 20, 0.1, (0.1, 0.1), (1e6, 1e6)))
    assert all("between a and b, whichever of them is slow" in slow_link[host][0].text for host in slots)
    slow_compute = find_slow_hosts(slots, Measurement(2, 1 << 20, 0.1, (0.1, 0.5), (1e9, 1e9)))
    assert [len(slow_compute[host]) for host in slots] == [0, 1]


def test_one_host_is_not_slow() -> None:
    assert find_slow_hosts({"a": (0, 1)}, Measurement(2, 1 << 20, 0.1, (0.1,), ())) == {"a": []}


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    """An all-reduce of S bytes in t seconds over n ranks: S/t · 2(n-1)/n."""
    assert Measurement(4, 10**9, 0.5, (0.1,), ()).bus_bandwidth == pytest.approx(3e9)


def test_two_names_of_one_machine_are_found(answer: Answers, target: Targets) -> None:
    """Catches a name and an address of one machine, on whose devices twice as many ranks would start."""
    answers = {"a": answer(machine="1"), "b": answer(machine="2"), "10.0.0.1": answer(machine="1")}
    problems = find_problems(answers, answer().facts, target(*answers), set(answers))
    assert problems["a"] == problems["b"] == []
    (problem,) = problems["10.0.0.1"]
    assert problem.text == "it is the same machine as a"
    assert problem.fix.startswith("--exclude 10.0.0.1 ")


@pytest.mark.parametrize(("free", "fails"), [(None, False), (10**9, True), (2 * 10**9, False)])
def test_corpora_must_fit_the_cache(answer: Answers, target: Targets, free: int | None, fails: bool) -> None:
    """Catches a host that would run out of space after an hour of copying."""
    needs = CacheNeeds("/nvme/deepcloze", None, {"/nvme/deepcloze/1/a": 10**9, "/nvme/deepcloze/2/b": 10**9})
    hosts = replace(target("a"), cache=needs)
    problems = find_problems({"a": answer(cache_bytes=free)}, answer().facts, hosts, {"a"})["a"]
    expected = ["1.0 GB for corpora at /nvme/deepcloze, expected 2.0 GB"] if fails else []
    assert [problem.text for problem in problems] == expected
