import socket

import pytest

from experiment.errors import UserError
from launcher import placement
from launcher.hostfile import Host
from launcher.placement import Devices, cpu_cores, find_devices, free_port, is_this_machine, place_ranks

CPU = Devices("cpu", (0, 1))
GPUS = Devices("cuda", (0, 1, 2, 3))


def test_defaults_are_all_gpus_but_one_rank_on_a_cpu():
    """Catches a default that leaves GPUs idle, or fills a laptop with ranks."""
    assert place_ranks(GPUS) == {"localhost": (0, 1, 2, 3)}
    assert place_ranks(CPU) == {"localhost": (0,)}


def test_num_gpus_takes_the_first_ones():
    """Catches a wrong number of ranks."""
    assert place_ranks(Devices("cuda", (4, 6, 7)), num_gpus=2) == {"localhost": (4, 6)}
    assert place_ranks(CPU, num_gpus=2) == {"localhost": (0, 1)}


def test_include_picks_gpus_and_counts_on_a_cpu():
    """Catches include on a CPU checking slot numbers, which mean nothing there."""
    assert place_ranks(GPUS, include="localhost:0,2") == {"localhost": (0, 2)}
    assert place_ranks(CPU, include="localhost:0,2") == {"localhost": (0, 2)}
    assert place_ranks(CPU, include="localhost") == {"localhost": (0, 1)}
    assert place_ranks(CPU, exclude="localhost:0") == {"localhost": (1,)}


def test_more_ranks_than_cores_only_when_asked_for():
    """Catches a run that crawls because nobody noticed that ranks share cores."""
    for crowd in ({"num_gpus": 3}, {"include": "localhost:0,1,2"}, {"hosts": (Host("localhost", 3),)}):
        with pytest.raises(UserError, match=r"3 ranks asked for, more than the 2 CPU cores .*--oversubscribe"):
            place_ranks(CPU, **crowd)
        assert len(place_ranks(CPU, **crowd, oversubscribe=True)["localhost"]) == 3


@pytest.mark.parametrize("oversubscribe", [False, True])
def test_more_ranks_than_gpus_never(oversubscribe: bool):
    """Catches two ranks on one GPU, which NCCL refuses only after minutes of start-up."""
    with pytest.raises(UserError, match="5 ranks asked for, more than the 4 GPUs of this machine"):
        place_ranks(GPUS, num_gpus=5, oversubscribe=oversubscribe)
    with pytest.raises(UserError, match="no GPU 4 on this machine"):
        place_ranks(GPUS, hosts=(Host("localhost", 5),), oversubscribe=oversubscribe)
    with pytest.raises(UserError, match="localhost has no slot 4"):
        place_ranks(GPUS, include="localhost:4", oversubscribe=oversubscribe)


@pytest.mark.parametrize("other", [{"include": "localhost:0"}, {"exclude": "localhost:0"}])
def test_counting_and_naming_exclude_each_other(other: dict[str, str]):
    """Catches one of two contradicting flags being ignored."""
    with pytest.raises(UserError, match="give one of them"):
        place_ranks(GPUS, num_gpus=1, **other)


@pytest.mark.parametrize("count", [0, -1])
def test_refuses_to_start_no_rank(count: int):
    """Catches a launch without ranks, which ends at once and looks done."""
    with pytest.raises(UserError, match="expected at least 1"):
        place_ranks(CPU, num_gpus=count)


def test_a_hostfile_of_this_machine_runs_locally():
    """Catches a detour over ssh for one's own machine."""
    assert place_ranks(GPUS, (Host(socket.gethostname(), 2),)) == {"localhost": (0, 1)}
    assert place_ranks(GPUS, (Host("127.0.0.1", 4),), include="127.0.0.1:1") == {"localhost": (1,)}


def test_several_hosts_get_what_the_hostfile_grants():
    """Catches this machine's devices limiting other machines, or the hosts losing their order."""
    hosts = (Host("192.0.2.8", 8), Host("192.0.2.7", 4))
    assert {host: len(slots) for host, slots in place_ranks(CPU, hosts).items()} == {"192.0.2.8": 8, "192.0.2.7": 4}
    assert place_ranks(CPU, hosts, num_gpus=2) == {"192.0.2.8": (0, 1), "192.0.2.7": (0, 1)}
    assert place_ranks(CPU, hosts, include="192.0.2.7:3") == {"192.0.2.7": (3,)}
    with pytest.raises(UserError, match=r"5 ranks asked for, more than the 4 slots of 192\.0\.2\.7"):
        place_ranks(CPU, hosts, num_gpus=5)


def test_knows_this_machine():
    """Catches a far host being taken for this one. 192.0.2.0/24 is reserved for documentation."""
    assert is_this_machine("localhost")
    assert is_this_machine(socket.gethostname())
    assert is_this_machine("127.0.0.1")
    assert not is_this_machine("192.0.2.1")


def test_a_gpu_machine_can_be_asked_for_its_cpu():
    """Catches DS_ACCELERATOR=cpu being ignored."""
    devices = find_devices({"DS_ACCELERATOR": "cpu"})
    assert devices == Devices("cpu", tuple(range(cpu_cores())))


def test_gpus_keep_the_numbers_of_cuda_visible_devices(monkeypatch: pytest.MonkeyPatch):
    """Catches a run on other GPUs than the user (or the queue) has set aside: DeepSpeed ignores the variable."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_devices({}) == Devices("cuda", (0, 1))
    assert find_devices({"CUDA_VISIBLE_DEVICES": "6, 3"}) == Devices("cuda", (6, 3))
    with pytest.raises(UserError, match="found 'MIG-1'"):
        find_devices({"CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2"})


def test_a_container_quota_counts(monkeypatch: pytest.MonkeyPatch):
    """Catches threads for all the cores of a host in a container that may use a few."""
    monkeypatch.setattr(placement.os, "sched_getaffinity", lambda _: set(range(64)))
    for text, cores in {"200000 100000": 2, "50000 100000": 1, "max 100000": 64}.items():
        monkeypatch.setattr(placement.Path, "read_text", lambda _, text=text: text)
        assert cpu_cores() == cores


def test_a_free_port_can_be_listened_on():
    """Catches a port that is taken, on which the ranks would wait for each other in vain."""
    with socket.socket() as server:
        server.bind(("", free_port()))
        server.listen()
