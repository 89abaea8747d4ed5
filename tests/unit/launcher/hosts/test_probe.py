import errno
import hashlib
import os
import platform
import socket
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.hosts import probe
from launcher.hosts.probe import route_to
from launcher.preflight.probe_hosts import ProbeRequest, probe_program, probe_this_machine

REPOSITORY = Path(__file__).parents[4]
IPV4, IPV6 = ("127.0.0.1", 9), ("::1", 9, 0, 0)
BROADCAST = ("255.255.255.255", 9)  # to which an ordinary socket cannot connect

ADDRESSES = {found.address for interface in psutil.net_if_addrs().values() for found in interface}
needs_ipv6 = pytest.mark.skipif("::1" not in ADDRESSES, reason="needs IPv6")


def facts(**request: Any) -> Any:
    return probe_this_machine(ProbeRequest(**request)).facts


def test_versions_and_checksums(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    paths = (str(tmp_path / "file"), str(tmp_path / "none"))
    found = facts(libraries=("pytest", "no-such-library"), files=paths, folders=("/", str(tmp_path / "none")))
    assert found.python == platform.python_version()
    assert found.versions == {"pytest": metadata.version("pytest"), "no-such-library": None}
    assert found.checksums == {paths[0]: hashlib.sha256(b"text").hexdigest(), paths[1]: None}
    assert found.missing_folders == (str(tmp_path / "none"),)


def test_the_space_of_a_cache_has_what_is_in_it(tmp_path: Path) -> None:
    """Catches a host that fails because its disk is full of the copies that it needs."""
    kept = tmp_path / "cache" / "1"
    free = facts(cache=str(tmp_path / "missing")).cache_bytes
    kept.mkdir(parents=True)
    with (kept / "shard").open("wb") as file:
        file.truncate(1 << 40)  # takes no space
    found = facts(cache=str(tmp_path / "cache"), kept=(str(kept),)).cache_bytes
    assert found == pytest.approx(free + (1 << 40), abs=1 << 34)
    assert facts().cache_bytes is None


def test_a_folder_of_another_user_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a host that is called unreachable because its user may not search a folder above the cache, or above the
    working directory."""
    private, stat = tmp_path / "private", os.stat
    private.mkdir()

    def refuse(path: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(f"{private}/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    found = facts(folders=(str(private / "work"),), cache=str(private / "cache"))
    assert found.missing_folders == (str(private / "work"),)
    assert found.cache_bytes is not None


def test_a_copy_may_be_deleted_while_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a host that is called unreachable because another run freed space in the cache at that moment."""
    monkeypatch.setattr(probe.os, "walk", lambda folder: [(folder, [], ["deleted"])])
    assert facts(cache=str(tmp_path), kept=(str(tmp_path),)).cache_bytes > 0


def test_a_change_of_the_source_changes_its_digest(tmp_path: Path) -> None:
    """Catches hosts with other code."""
    package = tmp_path / "package"
    package.mkdir()
    assert facts(project=str(tmp_path), packages=("package",)).source is None
    digests = set()
    for name, text in (("a", "x = 1"), ("a", "x = 2"), ("b", "x = 2")):
        (package / f"{name}.py").write_text(text)
        digests.add(facts(project=str(tmp_path), packages=("package",)).source)
    assert len(digests) == 3
    (package / "notes.txt").touch()
    assert facts(project=str(tmp_path), packages=("package",)).source in digests


def test_tokens_are_exchanged(tmp_path: Path) -> None:
    """Catches a host that looks once: a network disk shows a new file some time later."""
    writer = threading.Timer(0.3, (tmp_path / probe.LAUNCHER_TOKEN).touch)
    writer.start()
    found = facts(token_folder=str(tmp_path), token="host-1")
    writer.join()
    assert (found.shared, found.write_error) == (True, None)
    assert found.free_bytes is not None
    assert (tmp_path / "host-1").stat().st_size == 4096


def test_a_folder_that_is_not_shared_gets_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "TOKEN_SECONDS", 0.0)
    found = facts(token_folder=str(tmp_path / "run" / "token"), token="host-1")
    assert (found.shared, found.free_bytes) == (False, None)
    assert list(tmp_path.iterdir()) == []


def test_a_token_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / probe.LAUNCHER_TOKEN).touch()
    found = facts(token_folder=str(tmp_path), token="no/folder")
    assert (found.shared, found.write_error) == (True, "No such file or directory")


def test_the_way_to_another_host() -> None:
    found = facts(peer="localhost")
    assert (found.address, found.network_error) == ("127.0.0.1", None)
    assert "lo" in found.interfaces
    assert facts(peer="no-such-host.invalid").network_error


def test_gpus_as_nvidia_smi_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches units: nvidia-smi prints MiB, a GPU that shares the memory of its host, a driver that is broken, and a
    broken GPU that counts as free."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 3\necho 40960\necho '[Not Supported]'\necho '[GPU requires reset]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert (facts().gpu_memory_used, facts().gpu_error) == ((3 << 20, 40 << 30, 0, "[GPU requires reset]"), None)
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    for vendor, error in (("0x10de", "NVIDIA-SMI has failed (exit code 9)"), ("0x8086", None)):
        (tmp_path / "0000:17:00.0").mkdir(exist_ok=True)
        (tmp_path / "0000:17:00.0/vendor").write_text(f"{vendor}\n")
        monkeypatch.setattr(probe, "_PCI_DEVICES", tmp_path)
        assert facts().gpu_memory_used is not None
        assert facts().gpu_error == error, "a CPU machine may have the driver's package"
    program.unlink()
    assert facts().gpu_error is None, "a host without NVIDIA GPUs has no nvidia-smi"


def test_the_probe_needs_nothing_but_python() -> None:
    """Catches an import of the project or of a library, which the host may lack."""
    program = probe_program(ProbeRequest(peer="localhost"))
    done = subprocess.run([sys.executable, "-I", "-S", "-"], input=program, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert platform.python_version() in done.stdout


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[object, ...]) -> None:
    found = [
        (socket.AF_INET6 if len(address) == 4 else socket.AF_INET, socket.SOCK_DGRAM, 0, "", address)
        for address in addresses
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


@needs_ipv6
def test_ipv4_is_preferred_if_there_is_a_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a guard that takes another address than preflight has checked, and a name with an old IPv4 address."""
    resolve_to(monkeypatch, IPV6, IPV4)
    assert route_to("node-1") == ("127.0.0.1", "127.0.0.1")
    resolve_to(monkeypatch, BROADCAST, IPV6)
    assert route_to("node-1") == ("::1", "::1")


def test_a_host_without_a_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="Name or service not known"):
        route_to("no-such-host.invalid")
    resolve_to(monkeypatch, BROADCAST)
    with pytest.raises(OSError, match="Permission denied"):
        route_to("node-1")
