"""Find out how a launch ended, from what the ranks left in the run folder and from the exit code of DeepSpeed."""

import json
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiment.run_folder import Outcome, RunFolder

_SSH_FAILED = 255
_MOST_NAMED = 4
_TAIL_LINES = 15


@dataclass(frozen=True)
class LaunchResult:
    """How a launch ended."""

    outcome: Outcome
    message: str = ""


def clear_reports(folder: RunFolder) -> None:
    """Remove what the ranks of an earlier launch left."""
    for path in (folder.outcome, *_rank_processes(folder)):
        path.unlink(missing_ok=True)


def read_result(folder: RunFolder, exit_code: int, start_time: float, remote: bool) -> LaunchResult:
    """The result of a launch whose processes have exited.

    Args:
        exit_code: of DeepSpeed's launcher.
        start_time: when the launch began, as `time.time()`.
        remote: whether ranks ran on other hosts.
    """
    reported = folder.read_outcome()
    if reported is not None and reported[0] is not Outcome.FAILED:
        return LaunchResult(*reported)
    silent = list(_silent_ranks(folder))
    lost_ssh = remote and exit_code == _SSH_FAILED
    ending = "ssh failed or lost the connection to a host" if lost_ssh else _describe_kill(exit_code, silent)
    if reported is None:
        return LaunchResult(Outcome.FAILED, _failure_message(folder, ending or f"exit code {exit_code}", start_time))
    parts = [reported[1]]
    if ending:
        parts.insert(0, ending)  # the other ranks only know that they lost their peer, not why
    elif silent:
        parts.append(f"ended without reporting an outcome: {', '.join(silent)}")
    return LaunchResult(Outcome.FAILED, "; ".join(parts))


def _rank_processes(folder: RunFolder) -> Iterator[Path]:
    return folder.logs.glob("rank-*.json")


def _silent_ranks(folder: RunFolder) -> Iterator[str]:
    """The processes of the ranks that have started and not recorded their end."""
    for path in sorted(_rank_processes(folder)):
        try:
            process = json.loads(path.read_text(encoding="utf-8"))
            if process["exit"] is None:
                yield f"rank {process['rank']} on {process['host']} (process {process['pid']})"
        except (OSError, ValueError, KeyError, TypeError):
            continue


def _describe_kill(exit_code: int, silent: Sequence[str]) -> str | None:
    """Which rank was killed by which signal, if the exit code means a signal.

    A signal is -N if it ended DeepSpeed's launcher and 256 - N if it ended a rank. `silent`: the ranks that it may have
    ended.
    """
    try:
        killer = signal.Signals(-exit_code if exit_code < 0 else 256 - exit_code)
    except ValueError:
        return None
    rank = " or ".join(silent) if 0 < len(silent) <= _MOST_NAMED else "a rank"
    reason = ", possibly because the system ran out of memory" if killer is signal.SIGKILL else ""
    return f"{rank} was killed by {killer.name}{reason}"


def _failure_message(folder: RunFolder, reason: str, start_time: float) -> str:
    """The message for ranks that exited without writing an outcome, with the end of the failed rank's log."""
    message = f"the ranks exited without reporting an outcome ({reason}); their logs are in {folder.logs}"
    logs = [path for path in sorted(folder.logs.glob("rank-*.log")) if path.stat().st_mtime >= start_time]
    tails = {path: _tail(path) for path in logs}
    if not tails:
        return message
    # The failed rank stops logging first; the others notice its loss later.
    failed = [path for path, tail in tails.items() if "Traceback" in tail]
    path = min(failed, key=_modified_ns) if failed else max(tails, key=_modified_ns)
    return f"{message}\nthe end of {path.name}:\n{tails[path]}"


def _modified_ns(path: Path) -> int:
    return path.stat().st_mtime_ns


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])
