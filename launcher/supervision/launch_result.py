"""The result of an attempt, from its ranks' files and DeepSpeed's exit code, and the record in launch.jsonl."""

import json
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

from experiment.errors import UserError, describe_disk_error, notify
from experiment.files import parse_records, write_text
from experiment.process.signals import STOP_SIGNALS
from experiment.run_files.heartbeat import read_heartbeat
from experiment.run_files.outcome_file import (
    BEFORE_FIRST_STEP,
    Cause,
    Outcome,
    RankRecord,
    host_of,
    rank_records,
    read_outcome,
    read_rank_records,
    reserve_outcome,
)
from experiment.run_files.run_folder import RunFolder
from launcher.hosts.hostfile import Slots
from launcher.hosts.ssh import SSH_FAILED

_KILLS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
_MOST_NAMED = 4
_TAIL_LINES = 15
_TAIL_BYTES = 1 << 15


@dataclass(frozen=True)
class LaunchResult:
    """The result of a launch."""

    outcome: Outcome
    message: str = ""
    cause: Cause | None = None  # of a failure or stop
    lost: frozenset[str] = frozenset()  # hosts
    failed_on: frozenset[str] = frozenset()  # the host of a failure, if it is known


STOPPED_EARLY = LaunchResult(Outcome.STOPPED, f"stopped {BEFORE_FIRST_STEP}; run the same command again", Cause.SIGNAL)


def has_begun(folder: RunFolder) -> bool:
    """Return whether a rank has begun: until then, signals end it at once."""
    return any(rank_records(folder))


def all_done(folder: RunFolder, ranks: int) -> bool:
    """Return whether the run is done, and the processes of all its ranks, which are on this machine, have ended."""
    if (reported := read_outcome(folder)) is None or reported.outcome is not Outcome.DONE:
        return False
    processes = read_rank_records(folder)
    return len(processes) == ranks and all(process.exit == 0 and not is_running(process.pid) for process in processes)


def is_running(pid: int) -> bool:
    """Return whether there is such a process that has not ended."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def log_sizes(folder: RunFolder) -> dict[Path, int]:
    """Return the bytes of the log of each rank that has one."""
    return {path: path.stat().st_size for path in folder.logs.glob("rank-*.log")}


def read_result(
    folder: RunFolder,
    exit_code: int,
    earlier: Mapping[Path, int],
    silent: Sequence[RankRecord],
    remote: bool,
    ranks: Counter[str],
    others_killed: bool = False,
) -> LaunchResult:
    """Return the result of a launch whose processes have exited.

    Args:
        exit_code: of DeepSpeed's launcher.
        earlier: `log_sizes` when the ranks began.
        silent: the ranks that ended without recording it, except those that were killed because another had failed.
        remote: whether ranks ran on other hosts.
        ranks: how many each host had, by its own name.
        others_killed: whether ranks that waited for others were killed.
    """
    reported, killer = read_outcome(folder), _killer(exit_code, remote)
    cause = Cause.KILLED if killer else Cause.ERROR
    suspects = silent if others_killed or len(silent) <= _MOST_NAMED else ()
    ending = _describe_kill(killer, _name_ranks(folder, suspects, " or ") or "a rank", exit_code) if killer else ""
    if remote and exit_code == SSH_FAILED:
        killer, cause, ending = None, Cause.LOST_HOST, "ssh failed or lost the connection to a host"
    # DeepSpeed's launcher exits with 0 if a signal ended the program that starts ranks on other hosts.
    if remote and exit_code == 0 and (silent or not has_begun(folder)):
        cause, ending = Cause.KILLED, "pdsh, mpirun or srun, which runs the ranks on other hosts, was killed"
    if others_killed and silent and (reported is None or reported.outcome is Outcome.STOPPED):
        cause, ending = Cause.KILLED, f"{_name_ranks(folder, silent)} ended first"
    if reported is None:
        if killer in STOP_SIGNALS:  # ranks catch them when they begin, after their imports
            return STOPPED_EARLY
        if exit_code == Outcome.STOPPED.exit_code:
            message = f"the ranks ended, and could not write why to {folder.logs}; their output has the reason"
            return LaunchResult(Outcome.STOPPED, message, Cause.AGREED)
        message = _failure_message(folder, ending or f"exit code {exit_code}", earlier, suspects)
        return LaunchResult(Outcome.FAILED, message, cause)
    outcome, message, reported_cause = reported
    if BEFORE_FIRST_STEP in message:
        # DeepSpeed's launcher stops the other ranks, or those of its host, when one fails, and they report that.
        unrecorded = ranks - Counter(rank.host for rank in read_rank_records(folder))  # ended during their imports
        hosts, reporter = {*unrecorded, *(rank.host for rank in silent)}, host_of(message)
        if unrecorded and not remote and exit_code in (Outcome.FAILED.exit_code, Outcome.REFUSED.exit_code):
            return LaunchResult(Outcome.FAILED, f"a rank failed during its start (exit code {exit_code})", Cause.ERROR)
        if hosts and (killer not in (None, *STOP_SIGNALS) or (others_killed and reporter in hosts)):
            ending = ending or f"a rank that was starting on {reporter} ended first"
            return LaunchResult(Outcome.FAILED, ending, Cause.KILLED)
    if outcome is not Outcome.FAILED:
        return LaunchResult(outcome, message, reported_cause)
    if ending:
        message = f"{ending}; {message}"  # the other ranks only know that they lost their peer, not why
    elif silent and reported_cause is Cause.LOST_RANK:
        message = f"{message}; ended without reporting an outcome: {_name_ranks(folder, silent)}"
    return LaunchResult(outcome, message, cause if reported_cause is Cause.LOST_RANK and ending else reported_cause)


def _name_ranks(folder: RunFolder, ranks: Sequence[RankRecord], separator: str = ", ") -> str:
    """Return the processes of ranks as a text, of many only some; empty if there are none."""
    names = []
    for process in ranks[:_MOST_NAMED]:
        beat = read_heartbeat(folder, process.rank)
        step = "" if beat is None else f" after step {beat.step}"
        names.append(f"rank {process.rank} on {process.host} (process {process.pid}){step}")
    if more := len(ranks) - len(names):
        names.append(f"{more} more ranks")
    return separator.join(names)


def _killer(exit_code: int, remote: bool) -> signal.Signals | None:
    """Return the signal that an exit code means: -N if it ended DeepSpeed's launcher, 256 - N if it ended a rank, or
    128 + N with mpirun and srun, which may end the other ranks of a failed one by a stop signal."""
    number = exit_code - 128 if remote and exit_code - 128 in _KILLS else -exit_code % 256
    try:
        return signal.Signals(number)
    except ValueError:
        return None


def _describe_kill(killer: signal.Signals, killed: str, exit_code: int) -> str:
    """Describe a kill, of a rank or of DeepSpeed's launcher. `killed`: the ranks that may have been killed."""
    if exit_code < 0:
        killed = "DeepSpeed's launcher"
    reason = ", possibly because the system ran out of memory" if killer is signal.SIGKILL else ""
    return f"{killed} was killed by {killer.name}{reason}"


def _failure_message(folder: RunFolder, reason: str, earlier: Mapping[Path, int], killed: Sequence[RankRecord]) -> str:
    """Return the message for ranks that exited without writing an outcome, with the end of the failed rank's log.
    earlier: the bytes of each log that are from earlier attempts. killed: the ranks that may have been killed."""
    message = f"the ranks exited without reporting an outcome ({reason}); their logs are in {folder.logs}"
    logs = sorted(folder.logs.glob("rank-*.log"))
    tails = {path: tail for path in logs if (tail := _tail(path, earlier.get(path, 0)))}
    if not tails:
        return message
    # The failed rank stops logging first; the others notice its loss later.
    failed = [path for path, tail in tails.items() if "Traceback" in tail]
    failed = failed or [path for process in killed if (path := folder.rank_log(process.rank)) in tails]
    path = min(failed, key=_modified_ns) if failed else max(tails, key=_modified_ns)
    return f"{message}\nthe end of {path.name}:\n{tails[path]}"


def _modified_ns(path: Path) -> int:
    return path.stat().st_mtime_ns


def _tail(path: Path, start: int) -> str:
    """Return the last lines of a log, which may have grown for weeks, after its first `start` bytes."""
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - _TAIL_BYTES))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:])


@dataclass(frozen=True)
class AttemptRecord:
    """The line of one attempt. Updates that do not fit on the disk are reported and dropped."""

    folder: RunFolder
    number: int
    start_time: float  # as time.time()

    def start(self, argv: Sequence[str]) -> None:
        """Add the command of DeepSpeed's launcher."""
        self._update({"argv": list(argv)})

    def end(self, result: LaunchResult) -> None:
        """Add how the attempt ended."""
        ending: dict[str, object] = {"outcome": result.outcome.value, "exit": result.outcome.exit_code}
        if result.outcome in (Outcome.FAILED, Outcome.STOPPED):
            ending |= {"cause": result.cause, "message": result.message}
        self._update(ending)

    def _update(self, values: Mapping[str, object]) -> None:
        try:
            attempts = _read(self.folder)
            for attempt in attempts:
                if attempt.get("attempt") == self.number:
                    attempt.update(values)
            _write(self.folder, attempts)
        except (OSError, UserError) as error:
            notify(f"cannot record this launch: {describe_disk_error(error) or error}")


def begin_attempt(folder: RunFolder, slots: Slots, start_time: float) -> AttemptRecord:
    """Prepare the run folder for an attempt on these slots: remove the reports of ranks of earlier ones, reserve space
    for its outcome, and add its line. Raises UserError if launch.jsonl cannot be read, OSError if anything cannot be
    written.

    start_time: of the attempt, or of the launch that it is the first one of, as time.time().
    """
    for path in (folder.outcome, *rank_records(folder), *folder.logs.glob("rank-*.beat")):
        path.unlink(missing_ok=True)
    reserve_outcome(folder)
    attempts = _read(folder)
    numbers = (number for attempt in attempts if isinstance(number := attempt.get("attempt"), int))
    new = max(numbers, default=0) + 1  # lines may be missing
    record: dict[str, object] = {
        "attempt": new,
        "time": datetime.fromtimestamp(start_time).astimezone().isoformat(timespec="seconds"),
        "hosts": {host: list(numbers) for host, numbers in slots.items()},
        "outcome": None,  # remains null if the launcher is killed, or the disk is full when the attempt ends
        "exit": None,
    }
    _write(folder, [*attempts, record])
    return AttemptRecord(folder, new, start_time)


def count_attempts(folder: RunFolder) -> int:
    """Count the starts of the run. Raises UserError if the file cannot be read."""
    return len(parse_records(dict[str, object], _read_bytes(folder)))


def _read(folder: RunFolder) -> list[dict[str, object]]:
    """Return the attempts so far. Skips truncated lines, after a full disk or a power cut, with a message."""
    content = _read_bytes(folder)
    attempts, lines = parse_records(dict[str, object], content), sum(map(bool, content.split(b"\n")))
    if damaged := lines - len(attempts):
        notify(f"{folder.launches} is damaged: removed {damaged} of its {lines} lines")
    return attempts


def _read_bytes(folder: RunFolder) -> bytes:
    try:
        return folder.launches.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(f"run.dir: cannot read {folder.launches}: {error.strerror}") from None


def _write(folder: RunFolder, attempts: Sequence[Mapping[str, object]]) -> None:
    write_text(folder.launches, "".join(json.dumps(attempt, ensure_ascii=False) + "\n" for attempt in attempts))
