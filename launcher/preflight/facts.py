"""What a host is asked, and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ProbeRequest:
    """What `probe.py` reports of a host, besides what needs no question. None: not asked for."""

    libraries: tuple[str, ...] = ()  # distributions
    project: str | None = None  # folder of the packages
    packages: tuple[str, ...] = ()  # of the project
    files: tuple[str, ...] = ()  # absolute paths
    folders: tuple[str, ...] = ()  # absolute paths
    token_folder: str | None = None  # in the run folder; holds `probe.LAUNCHER_TOKEN`
    token: str = ""  # name of the file that this host writes there
    port: int | None = None
    peer: str | None = None  # another host


@dataclass(frozen=True)
class HostFacts:
    """The answer of a host."""

    python: str  # version
    versions: Mapping[str, str | None]  # library -> version; None: missing
    commit: str | None  # None: no git checkout, or no git
    source: str | None  # digest of the project's Python files; None: there are none
    checksums: Mapping[str, str | None]  # file -> SHA-256; None: cannot be read
    missing_folders: tuple[str, ...]
    shared: bool | None  # whether the launching machine's token is there
    write_error: str | None  # why the own token cannot be written
    free_bytes: int | None  # of the run folder's disk
    time: float  # `time.time()`
    gpu_memory_used: tuple[int, ...] | None  # bytes, by GPU; None: unknown
    cores: int
    port_free: bool | None
    interfaces: tuple[str, ...]
    interface: str | None  # the one towards the peer
    address: str | None  # the own one on it
    network_error: str | None  # why there is no way to the peer
    machine: str | None = None  # the same only for another name of the machine, or of the container
    shell: str | None = None  # the login shell; None: not reached over ssh


@dataclass(frozen=True)
class HostAnswer:
    """The facts of a host, and how far its clock is off at least."""

    facts: HostFacts
    clock_offset: float  # seconds; positive if it is ahead of the launching machine's


@dataclass(frozen=True)
class Unreachable:
    """Why a host gave no facts."""

    reason: str
    fix: str  # a command
    connected: bool = False  # ssh works
