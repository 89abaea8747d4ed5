"""Preflight: check that hosts can run a launch, before they do, and show the result as a table."""

import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from experiment.errors import UserError, describe_disk_error, is_quiet, notify
from experiment.files import PACKAGES, created_parents, temporary_folder, write_text
from experiment.formatting import counted
from experiment.run_files.provenance import LIBRARIES
from experiment.run_files.run_folder import RunFolder, check_creatable
from launcher.hosts.hostfile import Slots
from launcher.hosts.machine import Machine
from launcher.hosts.probe import LAUNCHER_TOKEN, TOKEN_SECONDS
from launcher.preflight.bandwidth import Measurement, MeasurementError, measure
from launcher.preflight.checks import Check, Problems, find_problems, find_slow_hosts
from launcher.preflight.probe_hosts import (
    Answer,
    HostAnswer,
    HostFacts,
    ProbeRequest,
    Unreachable,
    probe_hosts,
    probe_this_machine,
)
from launcher.preflight.target import Target
from launcher.ranks.placement import check_installed, is_local, name_localhost

_CHECKS: tuple[Check, ...] = get_args(Check)
_OK, _FAILED, _UNKNOWN = "ok", "FAILED", "?"


@dataclass(frozen=True)
class Report:
    """The outcome of preflight."""

    passed: Slots  # of the hosts without problems
    text: str
    failure: str | None = None  # of all hosts together


def check_hosts(target: Target, machine: Machine, only_failed: bool = False) -> Report:
    """Check all hosts of a launch in parallel, then measure the ones that passed.

    Writes to the run folder, and removes it again if it made it. `only_failed`: report hosts with problems only.
    Raises UserError if this machine cannot write there, or lacks a program that starts ranks on other hosts.
    """
    if not is_local(target.slots):
        check_installed(target.launcher)
    answers, own, tokens = _probe(target)
    problems = find_problems(answers, own, target, tokens)
    passing = {host: numbers for host, numbers in target.slots.items() if not problems[host]}
    measured, failure = _measure(passing, machine, target)
    if measured is not None:
        for host, slow in find_slow_hosts(passing, measured).items():
            problems[host] += slow
    text = preflight_table(answers, problems, passing, measured, only_failed)
    passed = {host: numbers for host, numbers in passing.items() if not problems[host]}
    return Report(passed, text, failure)


def preflight_problems(
    target: Target, hosts: Collection[str], peers: Collection[str], printed: dict[str, str]
) -> dict[str, str]:
    """Return why hosts do not pass the checks for a run that has begun, for those of `hosts` that do not. Measures
    nothing, and expects no room for checkpoints, some of which are there by now.

    Args:
        peers: hosts that answer. Each host must reach the first other one: the name of a lost host may be unknown by
            now.
        printed: host -> the last printed reason. Another reason of a host that answers is printed, and stored there.
    """
    target = replace(target, checkpoint_bytes=0, slots={host: target.slots[host] for host in (*peers, *hosts)})
    try:
        answers, own, tokens = _probe(target, hosts=hosts, show_progress=False)
    except (OSError, UserError) as error:  # the run folder does not answer
        return dict.fromkeys(hosts, describe_disk_error(error) or str(error))
    problems = find_problems(answers, own, target, tokens)
    texts = {host: "; ".join(f"{problem.check}: {problem.text}" for problem in problems[host]) for host in answers}
    for host, answer in answers.items():
        text = texts[host]
        if text and (isinstance(answer, HostAnswer) or answer.answers) and printed.get(host) != text:
            printed[host] = text
            notify(f"{host} answers, but does not pass preflight: {text}")
    return {host: text for host, text in texts.items() if text}


def require_hosts(report: Report, target: Target, allow_missing: bool) -> Slots:
    """Return the slots of the hosts that passed. Raises UserError if all have failed, or one without
    `allow_missing`."""
    if report.failure is not None:
        raise UserError(f"preflight: {report.failure}")
    failed = [host for host in target.slots if host not in report.passed]
    if failed and not (allow_missing and report.passed):
        shown = ", ".join(failed[:4]) + (" …" if len(failed) > 4 else "")
        advice = "; --allow_missing leaves them out" if report.passed else ""
        raise UserError(f"preflight: {len(failed)} of {len(target.slots)} hosts failed: {shown}{advice}")
    return report.passed


def _measure(slots: Slots, machine: Machine, target: Target) -> tuple[Measurement | None, str | None]:
    """Return the measurement, or why it failed; neither for less than two ranks."""
    if (ranks := sum(map(len, slots.values()))) < 2:
        return None, None
    if not is_quiet():
        print(f"preflight: timing an all-reduce over {ranks} ranks", file=sys.stderr, flush=True)
    try:
        return measure(name_localhost(slots), machine, target), None
    except MeasurementError as error:
        return None, str(error)


def _probe(
    target: Target, hosts: Collection[str] | None = None, show_progress: bool = True
) -> tuple[Mapping[str, Answer], HostFacts, set[str]]:
    """Return the answers of the hosts, the facts of this machine, and the hosts whose tokens are in the run folder.
    `hosts`: of the target; None: all."""
    request = ProbeRequest(
        libraries=LIBRARIES,
        project=target.project,
        packages=PACKAGES,
        files=tuple(map(str, target.files)),
        folders=(str(Path.cwd()),),  # DeepSpeed changes to it on all hosts
        cache=target.cache.folder if target.cache else None,
        kept=target.cache.kept if target.cache else (),
    )
    own = probe_this_machine(request)
    with _token_folder(target.folder) as folder:
        request = replace(request, token_folder=None if folder is None else str(folder))
        requests = {
            host: replace(request, token=f"host-{number}", peer=target.peer_of(host))
            for number, host in enumerate(target.slots if hosts is None else hosts)
        }
        answers: Mapping[str, Answer]
        if is_local(target.slots):
            answers = {host: probe_this_machine(request) for host, request in requests.items()}
        else:
            answers = probe_hosts(requests, show_progress)
        expected = {
            requests[host].token: host
            for host, answer in answers.items()
            if isinstance(answer, HostAnswer) and answer.facts.shared and answer.facts.write_error is None
        }
        return answers, own.facts, set() if folder is None else _seen_tokens(folder, expected)


@contextmanager
def _token_folder(run: Path | None) -> Iterator[Path | None]:
    """A new folder in the run folder with this machine's token."""
    if run is None:
        yield None
        return
    check_creatable(RunFolder(run))
    prefix = RunFolder(run).logs / ".preflight-"
    with created_parents(prefix), temporary_folder(prefix.parent, prefix.name, mode=0o777) as folder:
        write_text(folder / LAUNCHER_TOKEN, "")
        yield folder


def _seen_tokens(folder: Path, expected: Mapping[str, str]) -> set[str]:
    """Return the hosts whose tokens are in the folder. `expected`: token -> host."""
    deadline = time.monotonic() + TOKEN_SECONDS
    while True:
        names = {path.name for path in folder.iterdir()}
        if names.issuperset(expected) or time.monotonic() > deadline:
            return {host for token, host in expected.items() if token in names}
        time.sleep(0.2)


def preflight_table(
    answers: Mapping[str, Answer], problems: Problems, slots: Slots, measured: Measurement | None, only_failed: bool
) -> str:
    """Return a table with a row for each host and a column for each check, then the problems with their fixes, then the
    measurements. slots: the measured ones. only_failed: leave out the hosts without problems."""
    failed = [host for host in answers if problems[host]]
    shown = failed if only_failed else list(answers)
    timed = {} if measured is None else slots
    rows = [_row(host, answers[host], problems, is_timed=host in timed) for host in shown]
    parts = [_aligned([["host", *_CHECKS], *rows])] if rows else []
    for host in failed:
        for problem in problems[host]:
            parts += [f"{host}: {problem.check}: {problem.text}", f"    fix: {problem.fix}"]
    if measured is not None:
        parts.append(_describe(measured, slots))
    passed = len(answers) - len(failed)
    parts.append(f"preflight: {passed} of {counted(len(answers), 'host')} passed")
    return "\n".join(parts)


def _row(host: str, answer: Answer, problems: Problems, is_timed: bool) -> list[str]:
    failed = {problem.check for problem in problems[host]}
    if isinstance(answer, Unreachable):
        return [host, *(_FAILED if check in failed else _UNKNOWN for check in _CHECKS)]
    values = _values(answer) | ({} if is_timed else {"speed": "-"})
    return [host, *(_FAILED if check in failed else values.get(check, _OK) for check in _CHECKS)]


def _values(answer: HostAnswer) -> dict[Check, str]:
    """Return the texts that are shown in place of 'ok'."""
    facts = answer.facts
    values: dict[Check, str] = {"Python": facts.python, "clock": f"{answer.clock_offset:+.0f} s"}
    if facts.shared is None:
        values |= {"run folder": "-", "disk": "-"}
    else:
        values["disk"] = _UNKNOWN if facts.free_bytes is None else f"{facts.free_bytes / 1e9:,.0f} GB"
    gpus = facts.gpu_memory_used
    values["devices"] = f"{len(gpus)} GPUs" if gpus else f"{facts.cores} cores"
    if facts.address is not None:
        values["network"] = facts.address
    elif facts.network_error is not None:
        values["network"] = _UNKNOWN
    return values


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


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
