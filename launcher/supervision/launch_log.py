"""RUN/launch.jsonl: one line for each attempt to run, also those that were killed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from experiment.disk_errors import describe_disk_error
from experiment.errors import UserError
from experiment.files import write_text
from experiment.outcome_file import Outcome
from experiment.run_folder import RunFolder
from experiment.strict_json import parse_json
from launcher.hosts.hostfile import Slots
from launcher.messages import notify
from launcher.supervision.launch_result import LaunchResult


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
    """Add a line for an attempt on these slots. Raises UserError if the file cannot be read, OSError if not written.

    start_time: of the attempt, or of the launch that it is the first one of, as time.time().
    """
    attempts = _read(folder)
    record: dict[str, object] = {
        "attempt": len(attempts) + 1,
        "time": datetime.fromtimestamp(start_time).astimezone().isoformat(timespec="seconds"),
        "hosts": {host: list(numbers) for host, numbers in slots.items()},
        "outcome": None,  # remains null if the launcher is killed, or the disk is full when the attempt ends
        "exit": None,
    }
    _write(folder, [*attempts, record])
    return AttemptRecord(folder, len(attempts) + 1, start_time)


def count_attempts(folder: RunFolder) -> int:
    """How often the run was started. Raises UserError if the file cannot be read."""
    return sum(attempt is not None for attempt in _read_lines(folder))


def _read(folder: RunFolder) -> list[dict[str, object]]:
    """The attempts so far. Skips what a full disk or a power cut left of a line, and says so."""
    attempts = _read_lines(folder)
    if damaged := attempts.count(None):
        notify(f"{folder.launches} is damaged: removed {damaged} of its {len(attempts)} lines")
    return [attempt for attempt in attempts if attempt is not None]


def _read_lines(folder: RunFolder) -> list[dict[str, object] | None]:
    """The attempts so far; None for a damaged line."""
    try:
        lines = folder.launches.read_bytes().split(b"\n")  # not str.splitlines, which also splits at U+2028 and others
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"run.dir: cannot read {folder.launches}: {error.strerror}") from None
    return list(map(_attempt, filter(None, lines)))


def _attempt(line: bytes) -> dict[str, object] | None:
    try:
        attempt = parse_json(line)
    except (ValueError, RecursionError):
        return None
    return attempt if isinstance(attempt, dict) else None


def _write(folder: RunFolder, attempts: Sequence[Mapping[str, object]]) -> None:
    write_text(folder.launches, "".join(json.dumps(attempt, ensure_ascii=False) + "\n" for attempt in attempts))
