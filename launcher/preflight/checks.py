"""Compare the facts of hosts with the needs of a run. Pure, and linear in the number of hosts."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from statistics import median_high, median_low
from typing import Literal

from launcher.hosts.hostfile import Slots
from launcher.hosts.ssh import copy_command, quoted_for_host
from launcher.preflight.bandwidth import Measurement
from launcher.preflight.probe_hosts import Answer, HostAnswer, HostFacts, Unreachable
from launcher.preflight.target import CacheNeeds, Target

Check = Literal[
    "ssh", "Python", "packages", "code", "files", "run folder", "disk", "devices", "clock", "network", "speed"
]

_TORCH_BUILD = re.compile(r"\+(cpu|cu\d+)$")  # which only torch's own index has
_FOREIGN_SHELLS = ("csh", "tcsh")  # have no `export`
_CLOCK_SECONDS = 60.0
_BUSY_BYTES = 1 << 30  # of GPU memory; drivers and displays use less
# A host is slow if the others' median is this many times faster. Neighbours and clocks make less difference.
_SLOW_FACTOR = 4.0
# Slower than this is a fault in any network: Fast Ethernet, of 1995.
_SLOWEST_LINK = 12.5e6  # bytes/s


@dataclass(frozen=True)
class Problem:
    """Why a host cannot take part in a run."""

    check: Check
    text: str  # found and expected
    fix: str  # a command


Problems = Mapping[str, Sequence[Problem]]
"""Problems by host; empty for a host without any."""


def find_problems(
    answers: Mapping[str, Answer], own: HostFacts, target: Target, tokens: Set[str]
) -> dict[str, list[Problem]]:
    """Return the problems of each host, in the order of the hosts. answers: the one of the run's first host first. own:
    the facts of the launching machine. tokens: the hosts whose tokens this machine sees in the run folder."""
    problems = {}
    names: dict[str, str] = {}  # of machines
    for host, answer in answers.items():
        if isinstance(answer, Unreachable):
            check: Check = "Python" if answer.connected else "ssh"
            problems[host] = [Problem(check, answer.reason, answer.fix)]
        else:
            if isinstance(answers.get(target.peer_of(host) or ""), Unreachable):  # which may be why it is not reached
                answer = replace(answer, facts=replace(answer.facts, network_error=None))
            problems[host] = list(_problems_of_host(host, answer, own, target, host in tokens))
            machine = answer.facts.machine
            if machine is not None and (first := names.setdefault(machine, host)) != host:
                text = f"it is the same machine as {first}"
                problems[host].append(Problem("network", text, f"--exclude {host}    # or {first}"))
    return problems


def _problems_of_host(host: str, answer: HostAnswer, own: HostFacts, target: Target, seen: bool) -> Iterator[Problem]:
    facts = answer.facts
    if target.launcher == "pdsh" and facts.shell is not None and Path(facts.shell).name in _FOREIGN_SHELLS:
        text = f"the login shell is {facts.shell}, which ignores the variables that DeepSpeed sets for ranks"
        yield Problem("ssh", text, f"ssh {host} chsh -s /bin/bash")
    yield from _software_problems(host, facts, own, target)
    yield from _file_problems(host, facts, own)
    if target.folder is not None:
        yield from _disk_problems(host, facts, target, seen)
    if target.cache is not None:
        yield from _cache_problems(host, facts, target.cache)
    yield from _device_problems(host, facts, target)
    if abs(answer.clock_offset) > _CLOCK_SECONDS:
        side = "ahead of" if answer.clock_offset > 0 else "behind"
        text = f"its clock is at least {abs(answer.clock_offset):.0f} s {side} this machine's; a minute is allowed"
        yield Problem("clock", text, f"ssh {host} sudo chronyc makestep")
    yield from _network_problems(host, facts, target)


def _software_problems(host: str, facts: HostFacts, own: HostFacts, target: Target) -> Iterator[Problem]:
    python = quoted_for_host(sys.executable)
    if facts.python != own.python:
        text = f"Python {facts.python} at {sys.executable}, expected {own.python}"
        yield Problem("Python", text, copy_command(str(Path(sys.executable).parent.parent), host))
    wrong = {name: version for name, version in own.versions.items() if version and facts.versions[name] != version}
    if wrong:
        found = ", ".join(f"{name} {facts.versions[name] or 'missing'} (expected {wrong[name]})" for name in wrong)
        needed = " ".join(f"{name}=={version}" for name, version in wrong.items())
        if build := _TORCH_BUILD.search(wrong.get("torch", "")):
            needed += f" --extra-index-url https://download.pytorch.org/whl/{build[1]}"
        yield Problem("packages", found, f"ssh {host} {python} -m pip install {needed}")
    copy = copy_command(target.project, host)
    if facts.source is None:
        yield Problem("code", f"deepcloze is not at {target.project}", copy)
    elif facts.source != own.source:
        yield Problem("code", f"other Python files at {target.project} than on this machine", copy)


def _file_problems(host: str, facts: HostFacts, own: HostFacts) -> Iterator[Problem]:
    for path, checksum in own.checksums.items():
        if facts.checksums[path] != checksum:
            found = "cannot be read" if facts.checksums[path] is None else "differs from this machine's"
            yield Problem("files", f"{path} {found}", copy_command(str(Path(path).parent), host))
    for folder in facts.missing_folders:
        text = f"there is no folder {folder}, the working directory of this launch"
        yield Problem("files", text, f"ssh {host} mkdir -p {quoted_for_host(folder)}")


def _disk_problems(host: str, facts: HostFacts, target: Target, seen: bool) -> Iterator[Problem]:
    folder = quoted_for_host(str(target.folder))
    if not facts.shared or (facts.write_error is None and not seen):
        unseen = "files that the host writes there are not seen on this machine"
        if not facts.shared:
            unseen = "files that this machine writes there are not seen on the host"
        fix = f"ssh {host} df -h {folder}    # mount the disk of this machine, or choose another run.dir"
        yield Problem("run folder", f"{target.folder} is not shared: {unseen}", fix)
    elif facts.write_error is not None:
        yield Problem(
            "run folder", f"cannot write to {target.folder}: {facts.write_error}", f"ssh {host} df -h {folder}"
        )
    if facts.free_bytes is not None and (lack := lack_of_space(facts.free_bytes, target)):
        yield Problem("disk", lack, f"ssh {host} df -h {folder}    # free space, or lower checkpoint.keep_last")


def lack_of_space(free_bytes: int, target: Target) -> str:
    """Describe a disk that has no room for the planned checkpoints; empty if it has."""
    if free_bytes >= target.checkpoint_bytes:
        return ""
    expected = f"expected {_gigabytes(target.checkpoint_bytes)} for the planned checkpoints"
    return f"{_gigabytes(free_bytes)} free at {target.folder}, {expected}"


def _cache_problems(host: str, facts: HostFacts, needs: CacheNeeds) -> Iterator[Problem]:
    if facts.cache_bytes is not None and facts.cache_bytes < needs.bytes:
        text = f"{_gigabytes(facts.cache_bytes)} for corpora at {needs.folder}, expected {_gigabytes(needs.bytes)}"
        fix = f"ssh {host} df -h {quoted_for_host(needs.folder)}    # free space, or choose another corpus.cache"
        yield Problem("disk", text, fix)


def _device_problems(host: str, facts: HostFacts, target: Target) -> Iterator[Problem]:
    slots, used = target.slots[host], facts.gpu_memory_used
    if facts.gpu_error is not None and not target.uses_cpu:
        fix = f"ssh {host} nvidia-smi    # or set DS_ACCELERATOR=cpu to train on the CPU"
        yield Problem("devices", f"nvidia-smi failed: {facts.gpu_error}", fix)
        return
    if used is None:
        return
    if target.uses_cpu or not used:
        if len(slots) > facts.cores and not target.oversubscribe:
            text = f"{facts.cores} CPU cores, expected {len(slots)}, one for each rank"
            yield Problem("devices", text, "ask for fewer slots or tasks, or pass --oversubscribe")
        return
    if missing := [slot for slot in slots if slot >= len(used)]:
        text = f"no GPU {missing[0]}: {len(used)} GPUs, expected {len(slots)} for its slots"
        numbers = ",".join(map(str, missing))
        fix = f"ssh {host} nvidia-smi    # then ask for fewer slots or GPUs, or --exclude {host}:{numbers}"
        yield Problem("devices", text, fix)
    states = {slot: _describe_use(used[slot]) for slot in slots if slot < len(used)}
    if unusable := {slot: state for slot, state in states.items() if state}:
        shown = ", ".join(f"{slot} ({state})" for slot, state in unusable.items())
        fix = f"ssh {host} nvidia-smi    # or --exclude {host}:{','.join(map(str, unusable))}"
        yield Problem("devices", f"broken or busy GPUs: {shown}", fix)


def _describe_use(used: int | str) -> str:
    """Describe why a GPU cannot be used; empty if it can. `used`: see `HostFacts`."""
    if isinstance(used, str):
        return used
    return f"{_gigabytes(used)} in use" if used > _BUSY_BYTES else ""


def _network_problems(host: str, facts: HostFacts, target: Target) -> Iterator[Problem]:
    peer = target.peer_of(host)
    if facts.network_error is not None:
        yield Problem("network", f"cannot reach {peer}: {facts.network_error}", f"ssh {host} getent hosts {peer}")
    elif facts.address is not None and ip_address(facts.address).is_loopback:
        text = f"it resolves {peer} to a loopback address"
        yield Problem("network", text, f"ssh {host} getent hosts {peer}    # correct its /etc/hosts")
    for variable, names in target.interfaces.items():
        if not any(name in facts.interfaces for name in names):
            text = f"no interface {' or '.join(names)}, as {variable} says; it has {', '.join(facts.interfaces)}"
            yield Problem(
                "network", text, f"ssh {host} ip -br address    # set {variable} to interfaces that all hosts have"
            )


def find_slow_hosts(slots: Slots, measured: Measurement) -> dict[str, list[Problem]]:
    """Return the hosts that are far slower than the others; with two hosts, the slower link cannot be told from the
    faster."""
    problems: dict[str, list[Problem]] = {host: [] for host in slots}
    usual_link = median_high(measured.link_bandwidths) if measured.link_bandwidths else 0.0
    usual_compute = median_low(measured.compute_seconds)
    for number, host in enumerate(slots):
        seconds = measured.compute_seconds[number]
        if seconds > _SLOW_FACTOR * usual_compute:
            text = f"computes {seconds / usual_compute:.1f} times slower than the median of all hosts"
            problems[host].append(Problem("speed", text, f"ssh {host} top -b -n 1    # or --exclude {host}"))
        if measured.link_bandwidths:
            link = measured.link_bandwidths[number]
            if link < max(_SLOWEST_LINK, usual_link / _SLOW_FACTOR):
                problems[host].append(_slow_link(host, slots, link, usual_link))
    return problems


def _slow_link(host: str, slots: Slots, link: float, usual: float) -> Problem:
    fix = f"ssh {host} ip -s link    # or --exclude {host}"
    if len(slots) == 2:
        first, second = slots
        text = f"{_bandwidth(link)} between {first} and {second}, whichever of them is slow"
        return Problem("speed", f"{text}; expected at least {_bandwidth(_SLOWEST_LINK)}", fix)
    return Problem(
        "speed", f"its network gives {_bandwidth(link)}; the median of all hosts is {_bandwidth(usual)}", fix
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _bandwidth(size: float) -> str:
    return f"{size / 1e6:,.1f} MB/s"
