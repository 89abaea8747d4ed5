"""Join and leave the process group of a run."""

import datetime
import errno
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import deepspeed
import psutil
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.groups import _clone_world_group

from experiment.errors import HostError, first_line
from experiment.process.hardware import unusable_gpus
from pretrain.world import World

log = logging.getLogger(__name__)


class LostRankError(Exception):
    """Another rank did not connect in time, cannot be reached, or has been started twice."""


def connect(
    timeout: datetime.timedelta, end_process: Callable[[str], object], on_met: Callable[[], object] | None = None
) -> World:
    """Join the process group described by the environment (MASTER_ADDR, RANK, WORLD_SIZE …).

    Args:
        timeout: of every collective, and of each of the two parts of connecting: to rank 0, then to all ranks.
        end_process: called with a message, in a thread, if a rank is lost in the second part, where torch may wait for
            it forever. It must end the process itself, by `os._exit`: an exception would end the thread only.
        on_met: called after the first part. The ranks are then those of one start.

    Raises LostRankError if a rank is missing in the first part, cannot be reached or has connected twice, HostError if
    there is a GPU that torch cannot use: DeepSpeed would take the CPU.
    """
    # The first init on a CPU compiles a shared-memory kernel for inference, which training never uses and which fails
    # without a compiler. An empty table of compatible ops skips it.
    deepspeed.ops.__compatible_ops__ = {}
    world = _local_world()
    failure: HostError | None = None
    try:
        _select_device(world)
    except HostError as error:
        if world.rank == 0:  # while it serves no store: others would fail without it
            raise
        failure = error
    store = _meet(world, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout)
    if on_met is not None:
        on_met()
    if failure is not None:  # not earlier: only now may it be recorded
        raise failure
    accelerator = get_accelerator()
    backend = accelerator.communication_backend_name()
    used = backend if backend != "gloo" else f"gloo{_gloo_address()}"
    message = f"the ranks did not connect to each other within {timeout.total_seconds():.0f} s by {used}"
    with deadline(timeout, lambda: end_process(message)):
        # As DeepSpeed does.
        device_id = accelerator.device(world.local_rank) if backend == "nccl" and world.size > 1 else None
        try:
            dist.init_process_group(
                backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout, device_id=device_id
            )
        except RuntimeError as error:
            if backend != "gloo" or isinstance(error, dist.DistError):  # DistError: of the store
                raise
            raise LostRankError(f"the ranks cannot connect by {used}: {first_line(error)}") from error
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)  # uses the group
        # ZeRO communicates in a copy of the group, which has the default timeout of torch.
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # before torch 2.15
        set_timeout(timeout, _clone_world_group())
    return world


@contextmanager
def deadline(timeout: datetime.timedelta, end_process: Callable[[], object]) -> Iterator[None]:
    """Call `end_process` in a thread if the block takes longer than `timeout`. It may wait for other ranks in C++ code,
    which no exception interrupts."""
    timer = threading.Timer(timeout.total_seconds(), end_process)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def disconnect() -> None:
    deepspeed.comm.destroy_process_group()


def _local_world() -> World:
    """Read this rank from the environment, by default a single one."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    for name, default in {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        os.environ.setdefault(name, default)
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))


def _select_device(world: World) -> None:
    """Select the device of this rank. Raises HostError."""
    if problem := unusable_gpus(os.environ):
        raise HostError(problem)
    try:
        get_accelerator().set_device(world.local_rank)
    except RuntimeError as error:  # such as a GPU that has failed since the launch
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        place = f"GPU {world.local_rank} of CUDA_VISIBLE_DEVICES={visible}"
        raise HostError(f"{place} cannot be used: {first_line(error)}") from error


def _meet(world: World, address: str, port: int, timeout: datetime.timedelta) -> dist.Store:
    """Return the store of the process group, when all ranks have connected to it."""
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # it serves the store itself
    serves = world.rank == 0 and not of_torchrun
    listener = _listen(address, port) if serves else None
    store: dist.Store = dist.TCPStore(
        address, port, world.size, serves, timeout, wait_for_workers=False, master_listen_fd=listener
    )
    if of_torchrun:
        # After a restart, the store still has the addresses of the ranks before. Each host counts its restarts apart:
        # with several, each rank counts its own starts, and lags behind the others if it once ended before this.
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world.size):
            start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        else:
            start = store.add(f"starts/{world.rank} of {world.size}", 1)
        store = dist.PrefixStore(f"start-{start} of {world.size}", store)
    keys = [f"connected/{rank} of {world.size}" for rank in range(world.size)]
    if store.add(keys[world.rank], 1) > 1:
        raise LostRankError(
            f"another rank {world.rank} has connected to {address}:{port}: this run has been started already, or "
            "another one uses the port (set --master_port)"
        )
    try:
        store.wait(keys, timeout)
    except dist.DistStoreError:
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        raise LostRankError(
            f"not connected to {address}:{port} within {timeout.total_seconds():.0f} s: rank {', '.join(missing)}"
        ) from None
    return store


def _gloo_address() -> str:
    """Describe the address that gloo uses, if its interface is set."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
    entries = psutil.net_if_addrs().get(interface, ())
    internet = (entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6))
    if (address := next(internet, None)) is None:
        return ""
    return f" (on this host the first address of {interface}, {address}, which others must be able to reach)"


def _listen(address: str, port: int) -> int:
    """Return the file descriptor of a socket that listens on this address only, not on all networks of the machine.

    For a name, it listens on all of them: on the machine itself, its own name often resolves to a loopback address.
    """
    try:
        numeric = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        family, _, _, _, resolved = numeric[0]
        return socket.create_server(resolved, family=family, backlog=socket.SOMAXCONN).detach()
    except socket.gaierror:
        pass
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        log.warning("%s is not an address of this machine: listening on all of them", address)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=socket.SOMAXCONN, dualstack_ipv6=both).detach()
