"""How ranks connect, and what happens if one of them does not."""

import os
import platform
import re
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from experiment.errors import HostError
from experiment.run_files.outcome_file import Outcome, read_outcome
from experiment.run_files.run_folder import RunFolder
from launches import Start, config_file, patched, rank_environment, wait_for_exit
from pretrain.world import World
from rank_pool import COLLECTIVE_SECONDS, RankPool, free_port
from waiting import LIMIT

HOST = platform.node()

# All ranks have met at the store. Before they connect to each other, rank 1 is lost; rank 0 gives up soon.
LOST = """
import os, signal
from datetime import timedelta
from pretrain.engine import process_group
deadline = process_group.deadline
def soon(_, end_process):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    return deadline(timedelta(seconds=1), end_process)
process_group.deadline = soon
"""


def test_a_rank_lost_while_the_ranks_connect_to_each_other(
    start: Start, wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a rank that waits for a lost one forever: the timeout of torch does not apply there."""
    config, port = config_file(tmp_path, wordpiece_corpus, health__hang_seconds=600), free_port()
    command = (sys.executable, "-m", "pretrain.run", "--config", str(config))
    variables = patched(tmp_path, LOST)
    ranks = [start(*command, **variables, **rank_environment(rank, 2, port)) for rank in range(2)]
    code, output = wait_for_exit(ranks[0])
    assert code == 1, output
    outcome, message, _ = read_outcome(RunFolder(tmp_path / "run")) or (None, "", None)
    assert outcome is Outcome.FAILED
    assert message == f"{HOST}, rank 0: the ranks did not connect to each other within 600 s by gloo"
    assert ranks[1].poll() is None


def test_ranks_that_do_not_start_are_named(start: Start, wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a timeout that does not say which rank to look at."""
    config, port = config_file(tmp_path, wordpiece_corpus, health__hang_seconds=2), free_port()
    command = (sys.executable, "-m", "pretrain.run", "--config", str(config))
    code, output = wait_for_exit(start(*command, **rank_environment(0, 3, port)))
    assert code == 1, output
    outcome, message, _ = read_outcome(RunFolder(tmp_path / "run")) or (None, "", None)
    assert outcome is Outcome.FAILED
    assert re.fullmatch(rf".*, rank 0: LostRankError: not connected to 127.0.0.1:{port} within 2 s: rank 1, 2", message)


def listening_case(world: World) -> list[str]:
    """The addresses on which the store listens."""
    port = int(os.environ["MASTER_PORT"])
    connections = psutil.Process().net_connections("tcp")
    return [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port]


def test_the_store_listens_on_one_address(pools: dict[int, RankPool]) -> None:
    """Catches a store that everyone in the networks of the machine can write to."""
    assert pools[2].run(listening_case) == [["127.0.0.1"], []]


def test_a_rank_that_meets_another_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a start in the folder of a live run whose rank 1 connects to another run at the default port, takes the
    folder for its own, and changes records of the live run; and restarts by torchrun that do not connect."""
    import torch.distributed as dist

    from pretrain.engine.process_group import LostRankError, _meet

    port = free_port()

    def meet(rank: int, size: int = 2) -> Any:
        return _meet(World(rank, size), "127.0.0.1", port, timedelta(seconds=LIMIT))

    with ThreadPoolExecutor(2) as ranks:
        stores = list(ranks.map(meet, range(2)))  # open while the others try
    with pytest.raises(LostRankError, match=f"another rank 1 has connected to 127.0.0.1:{port}: "):
        meet(1)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for count in ("0", "1", "1"):  # of the restarts of one host: those for a rank of another one do not count
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        with ThreadPoolExecutor(2) as ranks:
            stores += ranks.map(meet, range(2))
        assert not stores[-1].check(["address"]), "gloo would connect to ranks that have ended"
        stores[-1].set("address", "of this start")
    assert not meet(0, size=1).check(["address"])  # a host has left
    dist.TCPStore("127.0.0.1", port, is_master=False).add("starts/1 of 2", 1)  # rank 0 has ended before it met
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "4")
    with ThreadPoolExecutor(2) as ranks:
        stores += ranks.map(meet, range(2))


def failed_case(world: World, kind: str, message: str) -> str:
    """The error of a rank whose process group cannot be made, on an interface with the address 127.0.0.1."""
    import torch.distributed as dist

    from pretrain.engine import process_group

    def fail(*_: Any, **__: Any) -> None:
        raise {"RuntimeError": RuntimeError, "DistNetworkError": dist.DistNetworkError}[kind](message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setattr(process_group, "_meet", lambda *_: dist.HashStore())
        patch.setattr(dist, "init_process_group", fail)
        with pytest.raises(Exception, match=message) as raised:
            process_group.connect(timedelta(seconds=LIMIT), lambda _: None)
    return f"{raised.type.__name__}: {raised.value}"


@pytest.mark.parametrize(
    ("kind", "message", "expected"),
    [
        (
            "RuntimeError",
            "socket.cc:142: connect: Network is unreachable",
            "LostRankError: the ranks cannot connect by gloo (on this host the first address of lo, 127.0.0.1, which "
            "others must be able to reach): socket.cc:142: connect: Network is unreachable",
        ),
        ("DistNetworkError", "Failed to recv, got 0 bytes", "DistNetworkError: Failed to recv, got 0 bytes"),
    ],
)
def test_the_address_that_others_cannot_reach_is_named(
    pools: dict[int, RankPool], kind: str, message: str, expected: str
) -> None:
    """Catches a launch that ends in gloo's message alone: it takes the first address of an interface. Also a lost rank
    0, with its store, for which no address is to blame."""
    assert pools[1].run(failed_case, kind, message) == [expected]


def timeouts_case(world: World) -> list[float]:
    """Seconds that collectives wait for other ranks: of the default group and of ZeRO's."""
    import torch
    import torch.distributed as dist
    from deepspeed.utils.groups import _clone_world_group

    groups = (dist.group.WORLD, _clone_world_group())
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_all_groups_have_the_timeout_of_the_run(pools: dict[int, RankPool]) -> None:
    """Catches ranks that wait in a collective of ZeRO for half an hour, the default, instead of `hang_seconds`."""
    assert pools[2].run(timeouts_case) == [[COLLECTIVE_SECONDS, COLLECTIVE_SECONDS]] * 2


@pytest.mark.parametrize("address", ["localhost", "192.0.2.1"])
def test_a_name_or_an_address_of_another_machine_listens_on_all(address: str) -> None:
    """Catches a run whose other hosts cannot connect because rank 0 resolves its own name to a loopback address, or
    that cannot start if MASTER_ADDR is translated, as that of a Kubernetes service."""
    from pretrain.engine.process_group import _listen

    port = free_port()
    descriptor = _listen(address, port)
    try:
        socket.create_connection(("127.0.0.2", port), timeout=60).close()  # another address of this machine
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(("rank", "before"), [(0, []), (1, ["meets rank 0", "takes the folder"])])
def test_a_rank_with_a_gpu_that_torch_cannot_use_fails(
    monkeypatch: pytest.MonkeyPatch, rank: int, before: list[str]
) -> None:
    """Catches a host with GPUs that trains on its CPU, or waits for ranks that connect through theirs, a run that is
    not restarted without the host, and a rank of plain deepspeed that may not record yet why it fails: the SIGTERM that
    ends rank 0 would count."""
    from pretrain.engine import process_group

    events: list[str] = []
    for name, value in rank_environment(rank, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process_group, "unusable_gpus", lambda environ: "there is a GPU")
    monkeypatch.setattr(process_group, "_meet", lambda *_: events.append("meets rank 0"))
    with pytest.raises(HostError, match="there is a GPU"):
        process_group.connect(timedelta(seconds=1), pytest.fail, lambda: events.append("takes the folder"))
    assert events == before


def test_a_rank_whose_gpu_has_failed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that ends, not restarted without the host, because one of its GPUs is gone."""
    from pretrain.engine import process_group

    def fail(_: object, index: int) -> None:
        raise RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be reported later")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(type(process_group.get_accelerator()), "set_device", fail)
    with pytest.raises(
        HostError, match=r"^GPU 0 of CUDA_VISIBLE_DEVICES=3 cannot be used: CUDA error: invalid device ordinal$"
    ):
        process_group.connect(timedelta(seconds=1), pytest.fail)


def connections() -> dict[Any, str]:
    """The states of the sockets of this process, by their addresses."""
    return {(found.laddr, found.raddr): found.status for found in psutil.Process().net_connections()}


def sockets_case(world: World) -> tuple[list[str], list[int]]:
    """The states of the sockets that the hosts' group of ranks with GPUs opens at once, and what its collectives
    return."""
    import torch.distributed as dist

    from pretrain.training.cpu_group import CpuGroup

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_GLOO_LAZY_INIT", "set and deleted, so that it is restored")
        patch.delenv("TORCH_GLOO_LAZY_INIT")
        patch.setattr(dist, "get_backend", lambda: "nccl")
        before = connections()
        group = CpuGroup(world, timedelta(seconds=LIMIT))
        opened = [status for addresses, status in connections().items() if addresses not in before]
    dist.barrier()  # of the default group: the first collective of a faster rank would connect it to this one
    results = [*group.all_reduce_sum([world.rank]), *group.all_gather_objects(world.rank)]
    group.barrier()
    dist.destroy_process_group(group._group)
    return opened, results


def test_ranks_with_gpus_connect_their_hosts_on_first_use(pools: dict[int, RankPool]) -> None:
    """Catches 1,023 connections of each of 1,024 ranks, most of which are never used."""
    for opened, results in pools[3].run(sockets_case):
        assert opened == [psutil.CONN_LISTEN], "none to the other two ranks"
        assert results == [3, 0, 1, 2]
