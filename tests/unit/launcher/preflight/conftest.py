from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.preflight.probe_hosts import HostAnswer, HostFacts
from launcher.preflight.target import Target

HEALTHY = HostFacts(
    python="3.11.7",
    versions={"torch": "2.13.0", "wandb": None},
    source="digest",
    checksums={"/corpora/wiki/manifest.json": "sum"},
    missing_folders=(),
    shared=True,
    write_error=None,
    free_bytes=10**12,
    cache_bytes=None,
    time=0.0,
    gpu_memory_used=(0, 0, 0, 0),
    cores=16,
    interfaces=("lo", "eth0"),
    address="10.0.0.1",
    network_error=None,
    gpu_error=None,
    machine=None,
)


@pytest.fixture
def answer() -> Callable[..., HostAnswer]:
    """Makes the answer of a healthy host, except for what is given."""

    def make(clock_offset: float = 0.0, **facts: object) -> HostAnswer:
        return HostAnswer(replace(HEALTHY, **facts), clock_offset)  # type: ignore[arg-type]

    return make


@pytest.fixture
def target() -> Callable[..., Target]:
    """Makes the target of a run with two ranks on each of these hosts."""

    def make(*hosts: str) -> Target:
        return Target(
            slots=dict.fromkeys(hosts, (0, 1)),
            project="/deepcloze",
            interfaces={"GLOO_SOCKET_IFNAME": ("eth0",)},
            folder=Path("/runs/first"),
            checkpoint_bytes=10**11,
        )

    return make
