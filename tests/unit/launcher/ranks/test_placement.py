import re
import socket
from contextlib import nullcontext
from typing import Any

import pytest
from pydantic import ValidationError

from experiment.errors import UserError
from launcher.hosts.hostfile import Hosts, Slots
from launcher.hosts.machine import Devices
from launcher.ranks import placement
from launcher.ranks.placement import Launcher, PlacementOptions, check_launcher, parse_filter, select_slots

CPU = Devices("cpu", (0, 1))
GPUS = Devices("cuda", (0, 1, 2, 3))
TWO_HOSTS = {"a": (0, 1, 2, 3), "b": (0, 1)}


def place_ranks(devices: Devices, hosts: Hosts | None = None, **options: Any) -> Slots:
    return placement.place_ranks(devices, PlacementOptions(**options), hosts)


def test_defaults_are_all_gpus_but_one_rank_on_a_cpu():
    """Catches a default that leaves GPUs idle, or fills a laptop with ranks."""
    assert place_ranks(GPUS) == {"localhost": (0, 1, 2, 3)}
    assert place_ranks(CPU) == {"localhost": (0,)}


def test_num_gpus_takes_the_first_ones():
    """Catches a wrong number of ranks."""
    assert place_ranks(Devices("cuda", (4, 6, 7)), num_gpus=2) == {"localhost": (4, 6)}
    assert place_ranks(CPU, num_gpus=2) == {"localhost": (0, 1)}


def test_include_picks_gpus_and_counts_on_a_cpu():
    """Catches slot numbers being checked on a CPU, where they have no meaning."""
    assert place_ranks(GPUS, include="localhost:0,2") == {"localhost": (0, 2)}
    assert place_ranks(CPU, include="localhost:0,2") == {"localhost": (0, 2)}
    assert place_ranks(CPU, include="localhost") == {"localhost": (0, 1)}
    assert place_ranks(CPU, exclude="localhost:0") == {"localhost": (1,)}


def test_more_ranks_than_cores_need_oversubscribe():
    """Catches a run that is slow because its ranks share cores."""
    for crowd in ({"num_gpus": 3}, {"include": "localhost:0,1,2"}, {"hosts": {"localhost": 3}}):
        with pytest.raises(UserError, match=r"3 ranks requested, but this machine has 2 CPU cores; --oversubscribe"):
            place_ranks(CPU, **crowd)
        assert len(place_ranks(CPU, **crowd, oversubscribe=True)["localhost"]) == 3


@pytest.mark.parametrize("oversubscribe", [False, True])
def test_more_ranks_than_gpus_are_rejected(oversubscribe: bool):
    """Catches two ranks on one GPU, which NCCL rejects only after minutes of startup."""
    with pytest.raises(UserError, match="5 ranks requested, but this machine has 4 GPUs"):
        place_ranks(GPUS, num_gpus=5, oversubscribe=oversubscribe)
    with pytest.raises(UserError, match="no GPU 4 on this machine"):
        place_ranks(GPUS, hosts={"localhost": 5}, oversubscribe=oversubscribe)
    with pytest.raises(UserError, match="localhost has no slot 4"):
        place_ranks(GPUS, include="localhost:4", oversubscribe=oversubscribe)


@pytest.mark.parametrize("other", [{"include": "localhost:0"}, {"exclude": "localhost:0"}])
def test_num_gpus_cannot_be_combined_with_filters(other: dict[str, str]):
    """Catches one of two contradicting flags being ignored."""
    with pytest.raises(UserError, match="--num_gpus cannot be combined with"):
        place_ranks(GPUS, num_gpus=1, **other)


@pytest.mark.parametrize("count", [0, -1])
def test_rejects_a_launch_without_ranks(count: int):
    """Catches a launch without ranks, which would end at once and look done."""
    with pytest.raises(ValidationError, match="num_gpus"):
        place_ranks(CPU, num_gpus=count)


def test_a_hostfile_of_this_machine_runs_locally():
    """Catches ssh being used for this machine."""
    assert place_ranks(GPUS, {socket.gethostname(): 2}) == {"localhost": (0, 1)}
    assert place_ranks(GPUS, {"127.0.0.1": 4}, include="127.0.0.1:1") == {"localhost": (1,)}


def test_several_hosts_use_the_slots_of_the_hostfile():
    """Catches other hosts limited by this machine's devices, and reordered hosts."""
    hosts = {"192.0.2.8": 8, "192.0.2.7": 4}
    assert {host: len(slots) for host, slots in place_ranks(CPU, hosts).items()} == {"192.0.2.8": 8, "192.0.2.7": 4}
    assert place_ranks(CPU, hosts, num_gpus=2) == {"192.0.2.8": (0, 1), "192.0.2.7": (0, 1)}
    assert place_ranks(CPU, hosts, include="192.0.2.7:3") == {"192.0.2.7": (3,)}
    with pytest.raises(UserError, match=r"5 ranks requested, but 192\.0\.2\.7 has 4 slots"):
        place_ranks(CPU, hosts, num_gpus=5)


def test_reads_filters():
    """Catches misparsed filters: slots are sorted and unique, a bare host means all its slots."""
    assert parse_filter("a:2,0,2@b", "--include") == {"a": (0, 2), "b": None}


@pytest.mark.parametrize("text", ["", "a:", "a:x", "a:0,", "a:-1", "a@", "@a", "a b", "a:0:1", "0,1,", "a:0 @b"])
def test_rejects_malformed_filters(text: str):
    """Catches a malformed filter that selects something."""
    with pytest.raises(UserError, match=r"--exclude: expected HOST\[:SLOT"):
        parse_filter(text, "--exclude")


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, TWO_HOSTS),
        ("b:1@a:3,0", None, {"a": (0, 3), "b": (1,)}),
        ("b", None, {"b": (0, 1)}),
        (None, "a:0,1", {"a": (2, 3), "b": (0, 1)}),
        (None, "a", {"b": (0, 1)}),
        (None, "b:0,1", {"a": (0, 1, 2, 3)}),
    ],
)
def test_selects_slots(include: str | None, exclude: str | None, expected: dict[str, tuple[int, ...]]):
    """Catches a filter that keeps or drops the wrong slots, or hosts in the filter's order, not the hostfile's."""
    chosen = select_slots(TWO_HOSTS, include, exclude)
    assert list(chosen.items()) == list(expected.items())


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("c", None, "--include: unknown host 'c'; known: a, b"),
        ("b:0,2", None, "--include: b has no slot 2; it has 0, 1"),
        (None, "b:7", "--exclude: b has no slot 7"),
        (None, "a@b", "leaves no slots"),
        ("a", "b", "--include cannot be combined with --exclude"),
        ("a:0@a:1", None, "a appears twice"),
    ],
)
def test_rejects_filters_that_do_not_fit(include: str | None, exclude: str | None, message: str):
    """Catches a filter for a missing host or slot, which would run fewer ranks than requested."""
    with pytest.raises(UserError, match=re.escape(message)):
        select_slots(TWO_HOSTS, include, exclude)


@pytest.mark.parametrize(
    ("launcher", "slots", "message"),
    [
        ("openmpi", {"a": (0, 1), "b": (1, 2)}, "uses the first GPUs of a host, not GPUs 1, 2 of b"),
        ("slurm", {"a": (0,), "b": (0,)}, "this job has --gpus-per-task"),
        ("mpich", {"a": (0, 1), "b": (0,)}, "--launcher mpich needs the same number of slots on every host"),
        ("openmpi", {"a": (0, 1), "b": (0,)}, None),
        ("pdsh", {"a": (0, 1), "b": (2,)}, None),
    ],
)
def test_rejects_slots_that_a_launcher_cannot_start(launcher: Launcher, slots: Slots, message: str | None):
    """Catches ranks on other GPUs than requested, and several on one GPU."""
    with pytest.raises(UserError, match=re.escape(message)) if message else nullcontext():
        check_launcher(launcher, slots, {"SLURM_GPUS_PER_TASK": "1"})


def test_srun_orders_hosts_itself():
    """Catches ranks that wait for rank 0 on the first host of the hostfile, while srun has started it on another."""
    environ = {"SLURM_JOB_NODELIST": "node[1-3]"}
    for hosts in (["node1", "node3"], ["node2"], ["other", "node1", "another"]):
        check_launcher("slurm", dict.fromkeys(hosts, (0,)), environ)
    unordered = dict.fromkeys(["node3", "node2"], (0,))
    with pytest.raises(UserError, match="srun starts rank 0 on node2"):
        check_launcher("slurm", unordered, environ)
    check_launcher("pdsh", unordered, environ)
