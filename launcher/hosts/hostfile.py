"""Hostfiles: the hosts of a launch and their slots.

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

HOST_NAME = r"(?P<name>[A-Za-z0-9_][A-Za-z0-9_.-]*)"
_LINE = re.compile(HOST_NAME + r"\s+slots=(?P<slots>[0-9]{1,4})")


@dataclass(frozen=True)
class Host:
    """One line of a hostfile: a machine and its number of slots."""

    name: str
    slots: int


def read_hostfile(path: Path | str) -> tuple[Host, ...]:
    """Read the hosts of a hostfile, in file order.

    Raises UserError for a file that cannot be read and for whatever `parse_hostfile` rejects.
    """
    return parse_hostfile(read_text(Path(path), "the hostfile"), origin=str(path))


def read_text(path: Path, what: str) -> str:
    """The text of a file. Raises UserError that calls it `what`."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text: {error}") from None


def hostfile_text(slots: Slots) -> str:
    """A hostfile with room for the slots of each host."""
    return "".join(f"{host} slots={max(numbers) + 1}\n" for host, numbers in slots.items())


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
        name = host.name.lower()  # host names are case-insensitive, see RFC 4343
        if name in hosts:
            raise UserError(f"{origin}, line {number}: duplicate host {host.name}, already on line {line_of[name]}")
        hosts[name], line_of[name] = host, number
    if not hosts:
        raise UserError(f"{origin}: no hosts found, expected lines such as 'worker-1 slots=4'")
    return tuple(hosts.values())
