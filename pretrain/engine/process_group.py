"""Join and leave the process group of a run."""

import datetime
import os

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pretrain.world import World


def connect(timeout: datetime.timedelta, rank: int | None = None, world_size: int | None = None) -> World:
    """Join the process group described by the environment (MASTER_ADDR, RANK, WORLD_SIZE …).

    `timeout`: of every collective.
    """
    # The first init on a CPU compiles a shared-memory kernel for inference, which training never uses and which fails
    # without a compiler. An empty table of compatible ops skips it.
    deepspeed.ops.__compatible_ops__ = {}
    for name, default in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
    ):
        os.environ.setdefault(name, default)
    os.environ.setdefault("MASTER_PORT", "29500")
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(),
        auto_mpi_discovery=False,
        timeout=timeout,
        rank=-1 if rank is None else rank,
        world_size=-1 if world_size is None else world_size,
        verbose=False,
    )
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))


def disconnect() -> None:
    deepspeed.comm.destroy_process_group()
