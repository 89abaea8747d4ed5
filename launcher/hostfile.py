"""Hostfiles, and the filters that select slots of their hosts.

A slot holds one rank: a GPU by its number, or a share of the CPU on machines without GPUs. The syntax is DeepSpeed's.
Parsing is stricter: DeepSpeed falls back to the local machine when a hostfile is missing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experiment.errors import UserError

Slots = Mapping[str, tuple[int, ...]]
"""Host name -> the slots to use on it, hosts in rank order."""

_NAME = r"(?P<name>[A-Za-z0-9_][A-Za-z0-9_.-]*)"
_LINE = re.compile(_NAME + r"\s+slots=(?P<slots>[0-9]+)")
_FILTER = re.compile(_NAME + r"(?::(?P<slots>[0-9]+(?:,[0-9]+)*))?")


@dataclass(frozen=True)
class Host:
    """One line of a hostfile: a machine and its number of slots."""

    name: str
    slots: int


def read_hostfile(path: Path | str) -> tuple[Host, ...]:
    """Read the hosts of a hostfile, in file order.

    Raises UserError for a file that cannot be read and for whatever `parse_hostfile` rejects.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the hostfile {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the hostfile {path} is not UTF-8 text: {error}") from None
    return parse_hostfile(text, origin=str(path))


def parse_hostfile(text: str, origin: str = "hostfile") -> tuple[Host, ...]:
    """Parse the text of a hostfile: one `NAME slots=N` per line; blank lines and `# comments` are skipped.

    Raises UserError for any other line, a duplicate host, a host without slots and a text without hosts. The message
    names `origin`, the line number and what was found.
    """
    hosts: dict[str, Host] = {}
    line_of: dict[str, int] = {}
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        match = _LINE.fullmatch(entry)
        if match is None:
            raise UserError(f"{origin}, line {number}: expected 'NAME slots=N', found {entry!r}")
        host = Host(match["name"], int(match["slots"]))
        if host.slots == 0:
            raise UserError(
                f"{origin}, line {number}: {host.name} has slots=0, expected at least 1; remove the line instead"
            )
        if host.name in hosts:
            raise UserError(
                f"{origin}, line {number}: duplicate host {host.name}, already on line {line_of[host.name]}"
            )
        hosts[host.name], line_of[host.name] = host, number
    if not hosts:
        raise UserError(f"{origin}: no hosts found, expected lines such as 'worker-1 slots=4'")
    return tuple(hosts.values())


def parse_filter(text: str, flag: str) -> dict[str, tuple[int, ...] | None]:
    """Parse a filter such as `host1:0,2@host2` into host -> slots; None means all slots of the host.

    Raises UserError naming `flag` for a malformed filter and for a host that appears twice.
    """
    named: dict[str, tuple[int, ...] | None] = {}
    for part in text.split("@"):
        match = _FILTER.fullmatch(part)
        if match is None:
            raise UserError(f"{flag}: expected HOST[:SLOT[,SLOT…]][@HOST…] such as localhost:0,2, found {text!r}")
        if match["name"] in named:
            raise UserError(f"{flag}: {match['name']} appears twice in {text!r}")
        named[match["name"]] = (
            tuple(sorted({int(slot) for slot in match["slots"].split(",")})) if match["slots"] else None
        )
    return named


def select_slots(available: Slots, include: str | None = None, exclude: str | None = None) -> Slots:
    """Filter the available slots by `include` or `exclude`; hosts left without slots are dropped.

    Raises UserError if both filters are given, a filter names an unknown host or slot, or no slot remains.
    """
    if include is not None and exclude is not None:
        raise UserError("--include cannot be combined with --exclude")
    if include is None and exclude is None:
        return available
    flag = "--include" if include is not None else "--exclude"
    text = include if include is not None else exclude
    assert text is not None
    named = {host: _matching_slots(host, slots, available, flag) for host, slots in parse_filter(text, flag).items()}
    if include is not None:
        chosen = {host: named[host] for host in available if host in named}
    else:
        chosen = {
            host: tuple(slot for slot in slots if slot not in named.get(host, ())) for host, slots in available.items()
        }
    chosen = {host: slots for host, slots in chosen.items() if slots}
    if not chosen:
        raise UserError(f"{flag} {text} leaves no slots")
    return chosen


def _matching_slots(host: str, slots: tuple[int, ...] | None, available: Slots, flag: str) -> tuple[int, ...]:
    if host not in available:
        raise UserError(f"{flag}: unknown host {host!r}; known: {', '.join(available)}")
    missing = [slot for slot in slots or () if slot not in available[host]]
    if missing:
        raise UserError(f"{flag}: {host} has no slot {missing[0]}; it has {', '.join(map(str, available[host]))}")
    return available[host] if slots is None else slots
