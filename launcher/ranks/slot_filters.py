"""The filters --include and --exclude, which select slots of hosts, in DeepSpeed's syntax."""

import re

from experiment.errors import UserError
from launcher.hosts.hostfile import HOST_NAME, Slots

_FILTER = re.compile(HOST_NAME + r"(?::(?P<slots>[0-9]+(?:,[0-9]+)*))?")


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
