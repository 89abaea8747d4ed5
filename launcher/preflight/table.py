"""The result of preflight as text. Pure."""

from collections.abc import Mapping, Sequence
from typing import get_args

from launcher.hosts.hostfile import Slots
from launcher.preflight.bandwidth import Measurement
from launcher.preflight.checks import Check, Problems
from launcher.preflight.facts import HostAnswer, Unreachable

_CHECKS: tuple[Check, ...] = get_args(Check)
_OK, _FAILED, _UNKNOWN = "ok", "FAILED", "?"


def preflight_table(
    answers: Mapping[str, HostAnswer | Unreachable],
    problems: Problems,
    slots: Slots,
    measured: Measurement | None,
    only_failed: bool,
) -> str:
    """A table with a row for each host and a column for each check, then the problems with what fixes them, then what
    was measured.

    Args:
        slots: those that were measured.
        measured: None if nothing was.
        only_failed: leave out the hosts without problems.
    """
    failed = [host for host in answers if problems[host]]
    shown = failed if only_failed else list(answers)
    rows = [_row(host, answers[host], problems) for host in shown]
    parts = [_aligned([["host", *_CHECKS], *rows])] if rows else []
    parts += [_explain(host, problems) for host in failed]
    if measured is not None:
        parts.append(_describe(measured, slots))
    passed = len(answers) - len(failed)
    parts.append(f"preflight: {passed} of {len(answers)} host{'' if len(answers) == 1 else 's'} passed")
    return "\n".join(parts)


def _row(host: str, answer: HostAnswer | Unreachable, problems: Problems) -> list[str]:
    failed = {problem.check for problem in problems[host]}
    if isinstance(answer, Unreachable):
        return [host, *(_FAILED if check in failed else _UNKNOWN for check in _CHECKS)]
    values = _values(answer)
    return [host, *(_FAILED if check in failed else values.get(check, _OK) for check in _CHECKS)]


def _values(answer: HostAnswer) -> dict[Check, str]:
    """What is shown in place of 'ok'."""
    facts = answer.facts
    values: dict[Check, str] = {"Python": facts.python, "clock": f"{answer.clock_offset:+.0f} s"}
    if facts.shared is None:
        values |= {"run folder": "-", "disk": "-"}
    else:
        values["disk"] = _UNKNOWN if facts.free_bytes is None else f"{facts.free_bytes / 1e9:,.0f} GB"
    gpus = facts.gpu_memory_used
    values["devices"] = f"{len(gpus)} GPUs" if gpus else f"{facts.cores} cores"
    if facts.interface is not None:
        values["network"] = facts.interface
    return values


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _explain(host: str, problems: Problems) -> str:
    lines = []
    for problem in problems[host]:
        lines += [f"{host}: {problem.check}: {problem.text}", f"    fix: {problem.fix}"]
    return "\n".join(lines)


def _describe(measured: Measurement, slots: Slots) -> str:
    hosts = list(slots)
    size, milliseconds = measured.bytes / (1 << 20), measured.seconds * 1e3
    text = (
        f"all-reduce of {size:,.0f} MiB over {measured.ranks} ranks: {milliseconds:,.1f} ms, "
        f"{measured.bus_bandwidth / 1e6:,.0f} MB/s bus bandwidth"
    )
    if len(hosts) > 2:  # two share their only link
        link = min(measured.link_bandwidths)
        text += f"; slowest network: {hosts[measured.link_bandwidths.index(link)]}, {link / 1e6:,.0f} MB/s"
    if len(hosts) > 1:
        compute = max(measured.compute_seconds)
        text += f"; slowest to compute: {hosts[measured.compute_seconds.index(compute)]}, {compute * 1e3:,.1f} ms"
    return text
