"""Collect the facts of the host that this runs on, for `HostFacts`, and its routes to other hosts.

Preflight sends the sources of this file and of `cpu_cores` to `PYTHON -` on other hosts. They import nothing else of
the project and no library, and have to run on Python versions that the project does not support: another version is a
fact to report.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import filterfalse
from pathlib import Path
from typing import Any

from experiment.process.cpu_cores import cpu_cores

LAUNCHER_TOKEN = "launcher"
"""File that the launching machine writes to the token folder, for the hosts to see."""

TOKEN_SECONDS = 5.0  # network disks cache folders for some seconds

FACTS_MARK = "deepcloze facts: "
"""Precedes the facts: the shell of the host may print more, even on the same line."""

_TOKEN_BYTES = 4096  # so that a full disk is noticed
_UNKNOWN = ("[N/A]", "[Not Supported]", "[Insufficient Permissions]")  # the GPU shares its host's memory, or is split
_PCI_DEVICES, _NVIDIA = Path("/sys/bus/pci/devices"), "0x10de"


def main(request: str) -> None:
    """Print the facts as one line of JSON. `request`: a `ProbeRequest` as JSON."""
    facts = collect(json.loads(request)) | {"shell": os.environ.get("SHELL")}  # of sshd
    print(FACTS_MARK + json.dumps(facts))


def collect(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that a `ProbeRequest`, as a dict, asks for."""
    shared, write_error = _exchange_tokens(request["token_folder"], request["token"])
    address, network_error = _way_to(request["peer"])
    gpu_memory_used, gpu_error = _gpu_memory_used()
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in request["libraries"]},
        "source": _source_digest(request["project"], request["packages"]),
        "checksums": {path: _checksum(path) for path in request["files"]},
        "missing_folders": list(filterfalse(os.path.isdir, request["folders"])),  # Path.is_dir() may raise
        "shared": shared,
        "write_error": write_error,
        "free_bytes": _free_bytes(request["token_folder"]) if shared else None,
        "cache_bytes": _cache_bytes(request["cache"], request["kept"]),
        "time": time.time(),
        "gpu_memory_used": gpu_memory_used,
        "gpu_error": gpu_error,
        "cores": cpu_cores(),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "address": address,
        "network_error": network_error,
        "machine": _machine(),
    }


def _exchange_tokens(folder: str | None, token: str) -> tuple[bool | None, str | None]:
    """Return (whether this host sees the launching machine's token in the folder, why its own cannot be written)."""
    if folder is None:
        return None, None
    deadline = time.monotonic() + TOKEN_SECONDS
    while not _lists_token(folder):
        if time.monotonic() > deadline:
            return False, None
        time.sleep(0.2)
    try:
        with Path(folder, token).open("wb") as file:
            file.write(bytes(_TOKEN_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return True, error.strerror
    return True, None


def _lists_token(folder: str) -> bool:
    try:
        return Path(folder, LAUNCHER_TOKEN) in Path(folder).iterdir()  # a lookup by name may be answered from a cache
    except OSError:
        return False


def _free_bytes(folder: str) -> int | None:
    try:
        disk = os.statvfs(folder)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize


def _cache_bytes(cache: str | None, kept: Sequence[str]) -> int | None:
    """Free bytes on the disk of the cache, and the sizes of the files that are kept or replaced there."""
    if cache is None:
        return None
    existing = next(filter(os.path.exists, (Path(cache), *Path(cache).parents)))  # Path.exists() may raise
    free = _free_bytes(str(existing))
    if free is None or not os.access(existing, os.W_OK):
        return 0
    return free + sum(_bytes_below(folder) for folder in kept)


def _bytes_below(folder: str) -> int:
    """Return the size of the files below a folder, in which runs may rename and delete some meanwhile."""
    size = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += Path(directory, name).stat().st_size
    return size


def _version(library: str) -> str | None:
    from importlib import metadata  # slow: start_rank imports this module too

    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _source_digest(project: str | None, packages: Sequence[str]) -> str | None:
    """Return the SHA-256 of the Python files of these packages, with their names; None if there are none."""
    if project is None:
        return None
    root, digest = Path(project), hashlib.sha256()
    files = sorted(path for package in packages for path in (root / package).rglob("*.py"))
    for path in files:
        digest.update(f"{path.relative_to(root)} {_checksum(str(path))}\n".encode())
    return digest.hexdigest() if files else None


def _checksum(path: str) -> str | None:
    """Return the SHA-256 of a file; None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def _gpu_memory_used() -> tuple[list[int | str] | None, str | None]:
    """Return (the bytes in use of each NVIDIA GPU, by its number, why nvidia-smi fails). 0 bytes where it is missing or
    does not know, its message for a broken GPU; no list: there are GPUs of another maker, which are not counted."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, timeout=30)
        lines = done.stdout.decode(errors="replace").splitlines()
        return [0 if line in _UNKNOWN else int(line) << 20 if line.isdigit() else line for line in lines], None
    except subprocess.TimeoutExpired as error:
        return [], f"no answer within {error.timeout:.0f} s"
    except subprocess.CalledProcessError as error:
        if not _has_nvidia_device():  # a CPU machine on which the driver is installed
            return [], None
        text = error.stdout.decode(errors="replace").strip().partition("\n")[0]
        return [], f"{text or 'no message'} (exit code {error.returncode})"
    except OSError:
        pass
    if count := len(list(Path("/dev").glob("nvidia[0-9]*"))):
        return [0] * count, None
    return None if any(map(os.path.exists, ("/dev/kfd", "/dev/dxg"))) else [], None


def _has_nvidia_device() -> bool:
    """Return whether the machine has an NVIDIA device, whatever its driver does."""
    with suppress(OSError):
        return any(path.read_text().strip() == _NVIDIA for path in _PCI_DEVICES.glob("*/vendor"))
    return True


def _machine() -> str | None:
    """Identify the machine until it reboots and, because containers share its kernel, the container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()  # see random(4)
        folders = (f"/proc/self/ns/{name}" for name in ("mnt", "net", "pid"))  # see namespaces(7)
        return " ".join([boot, *map(os.readlink, folders)])
    except OSError:
        return None


def _way_to(peer: str | None) -> tuple[str | None, str | None]:
    """Return (the source address of packets to a host, why there is none)."""
    if peer is None:
        return None, None
    try:
        return route_to(peer)[1], None
    except OSError as error:
        return None, error.strerror or str(error)


def route_to(name: str) -> tuple[str, str]:
    """Return (the address of a host, the source address of packets to it), IPv4 unless there is no route to it. Raises
    OSError if the name has no address, or there is no way to any."""
    failure = OSError(f"no address of {name}")
    found = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)
    for family, kind, protocol, _, address in sorted(found, key=lambda info: info[0] != socket.AF_INET):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # sends nothing
                return str(address[0]), str(probe.getsockname()[0])
        except OSError as error:
            failure = error
    raise failure
