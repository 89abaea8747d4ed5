"""Weights & Biases. It may be slow, misconfigured or unreachable without affecting the run.

All calls to W&B are made in one daemon thread that reads a queue: `log` never blocks the training loop, and `close` has
a timeout.

W&B ignores a row whose W&B step is not larger than the one before, also after a resume. So each event gets a
number that is the same if it is logged again, and nothing appears twice; and rows that an earlier attempt has not
delivered are sent from metrics.jsonl, so nothing is missing.
"""

import json
import logging
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from experiment.process.signals import WARNING_SIGNALS, signals_blocked
from experiment.run_files.metrics_file import Event, Metrics, is_evaluation
from experiment.run_files.outcome_file import Outcome
from experiment.run_files.run_folder import RunFolder
from experiment.tracking.alerts import Alert, send_by_wandb
from experiment.tracking.config import RUN_SET, WANDB_NAME, TrackingConfig

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

_INIT_SECONDS = 20.0  # timeout for reaching the server; the run is then logged offline
FINISH_SECONDS = 30.0  # timeout for uploading the rest when the run ends
_UPLOAD_SHARE = 0.7  # of it, after which W&B gives up uploading and completes its local file
# W&B's local files have the format of LevelDB's log, with a header of its own and plain CRC-32:
# https://github.com/google/leveldb/blob/main/doc/log_format.md
_FILE_HEADER = 7  # bytes
_BLOCK = 32768
_HEADER = struct.Struct("<IHB")  # checksum, length, type
_FULL, _FIRST, _MIDDLE, _LAST = range(1, 5)
_ROWS_PER_STEP = 10_000  # more than a step has events: scores of earlier checkpoints may come in any number


@dataclass(frozen=True)
class _Summary:
    """Results of the run: name -> value."""

    scores: Mapping[str, float]


class WandbTracker:
    """Logs to the W&B run `run_id`, online or offline, with `step` as the x axis. Its files are in RUN/wandb."""

    def __init__(
        self,
        config: TrackingConfig,
        folder: RunFolder,
        run_id: str,
        parameters: Mapping[str, object],
        kept: Sequence[Event] = (),
        finish_seconds: float = FINISH_SECONDS,
    ) -> None:
        """`kept`: the events of earlier attempts that are not logged again."""
        self._events: SimpleQueue[Metrics | _Summary | Alert | Outcome] = SimpleQueue()
        self._config = config
        self._folder = folder
        self._finish_seconds = finish_seconds
        self._off = False
        self._report: Path | None = None
        own_name = None if RUN_SET in os.environ else config.name
        self._name = own_name or os.environ.get(WANDB_NAME) or folder.path.name
        self._options: dict[str, Any] = {
            "project": config.project,
            # These keep the name of a W&B run that is resumed, maybe without the variables of its sweep or comparison,
            # and its tags, some of which the user may have set in W&B. None would stand for those in WANDB_TAGS.
            "name": "" if kept else self._name,
            "tags": () if kept else config.tags,
            "id": run_id,
            "resume": "allow",  # also offline: `wandb sync` then appends a later attempt instead of replacing the first
            "config": dict(parameters),
            "dir": str(folder.path),
            "reinit": "create_new",  # the caller of `deepcloze.finetune` may have an active run
        }
        self._settings: dict[str, Any] = {
            "init_timeout": _INIT_SECONDS,
            "finish_timeout": _UPLOAD_SHARE * finish_seconds,
            "silent": True,
            "console": "off",  # the terminal belongs to the console tracker and the rank logs
        }
        # An iterator releases the events, which may be many, when all are read.
        self._worker = threading.Thread(target=self._work, args=(iter(kept),), name="wandb", daemon=True)
        self._worker.start()

    def log(self, metrics: Metrics) -> None:
        if not self._off:
            self._events.put(dict(metrics))

    def summarize(self, scores: Mapping[str, float]) -> None:
        """Add scores to the summary, which W&B's tables of runs show. They replace those of an earlier attempt."""
        if not self._off:
            self._events.put(_Summary(scores))

    def alert(self, alert: Alert) -> None:
        if self._config.alerts.wandb and not self._off:
            self._events.put(alert)

    def close(self, outcome: Outcome) -> None:
        if self._config.artifacts and not self._off:
            self._report = self._write_report(outcome)  # here: it takes seconds, which are not for uploading
        self._events.put(outcome)
        self._worker.join(self._finish_seconds)
        if self._worker.is_alive():
            send = f"to upload the rest, run `wandb sync --include-online {self._folder.wandb / 'latest-run'}`"
            self._warn(f"did not finish in {self._finish_seconds:g} s; {send}")
            self._off = True

    def _work(self, kept: Iterator[Event]) -> None:
        try:
            with signals_blocked(WARNING_SIGNALS):  # W&B's own process
                run, first_number = self._start()
            rows = _Rows(run, first_number)
            for earlier in kept:
                rows.log(earlier, again=True)
            while not isinstance(event := self._events.get(), Outcome):
                if isinstance(event, Alert):
                    send_by_wandb(run, event, self._folder.path.name)
                elif isinstance(event, _Summary):
                    run.summary.update(dict(event.scores))
                else:
                    rows.log(event)
            if event is Outcome.STOPPED:
                run.mark_preempting()  # stopped but resumable: neither finished nor failed
            if self._report is not None:
                self._save_artifact(run, self._report)
            run.finish(exit_code=event.exit_code)
        except Exception as error:
            self._warn(f"is switched off for this run: {_describe(error)}")
            self._off = True

    def _start(self) -> tuple["wandb.Run", int]:
        """Open the W&B run; offline, for a later `wandb sync`, if the server cannot be reached. Returns the number of
        its first row that is missing, too."""
        import wandb

        settings = wandb.Settings(**self._settings)
        run = None
        if self._config.wandb == "online":
            try:
                wandb.setup(settings)  # so that `login` is silent too
                if wandb.run is not None:  # of the caller; `login` returns False then
                    if wandb.run.settings.mode != "online":
                        raise RuntimeError("the active W&B run is not online")
                else:
                    with suppress(AttributeError, TypeError):  # no part of W&B's documentation: it may change
                        logs = dict.fromkeys(("info", "warning", "error"), self._warn_of_fatal_error)
                        wandb.termsetup(settings, SimpleNamespace(**logs))
                    if not wandb.login(prompt=False):
                        raise RuntimeError("no API key; `wandb login` stores one")
                run = wandb.init(mode="online", settings=settings, **self._options)
                first_number = run.starting_step
            except Exception as error:
                self._warn(f"cannot be reached; run `wandb sync` on {self._folder.wandb} later: {_describe(error)}")
        if run is None:
            first_number = last_step(self._folder.wandb, self._options["id"]) + 1
            run = wandb.init(mode="offline", settings=settings, **self._options)
        if first_number == 0 and not self._options["name"]:  # earlier attempts did not use W&B
            run.name, run.tags = self._name, self._config.tags
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run, first_number

    def _write_report(self, outcome: Outcome) -> Path | None:
        """Return the page; None if it cannot be written."""
        try:
            from experiment.results.report.pages import write_report  # only one rank needs it

            return write_report(self._folder.path, outcome=outcome)
        except Exception as error:
            self._warn(f"has no artifact of this run: {_describe(error)}")
            return None

    def _save_artifact(self, run: "wandb.Run", page: Path) -> None:
        """Save the files that say where the results come from, and the report."""
        import wandb

        artifact = wandb.Artifact(f"run-{run.id}", type="run")
        try:
            for path in (self._folder.config, self._folder.provenance, page):
                name = str(path.relative_to(self._folder.path))
                artifact.add_file(str(path), name=name, policy="immutable", skip_cache=True)
            run.log_artifact(artifact)
        except Exception as error:
            self._warn(f"has no artifact of this run: {_describe(error)}")

    def _warn_of_fatal_error(self, printed: str) -> None:
        """Warn if W&B stops uploading, which it says only in what it would print."""
        if "Fatal error while uploading" in printed:
            self._warn("has stopped uploading, as after an answer 403; to send the rest, stop the run and resume it")

    def _warn(self, message: str) -> None:
        if not self._off:
            logger.warning("W&B %s", message)


class _Rows:
    """Logs events as rows, numbered by their steps. Rows before `first_number` are there already."""

    def __init__(self, run: "wandb.Run", first_number: int) -> None:
        self._run = run
        self._first_number = first_number
        self._last_number = -1
        self._step = -1  # of the training
        self._late = 0  # events of earlier steps, and scores, since then

    def log(self, event: Metrics, again: bool = False) -> None:
        """Log an event under its number, or the next one that W&B accepts. again: one of an earlier attempt, which is
        logged only if it is missing."""
        number, is_late = self._next(event)
        # A row that is late now may not have been late when the rows before `first_number` were logged.
        if number >= self._first_number or (is_late and not again):
            self._last_number = max(number, self._last_number + 1, self._first_number)
            row = {key: value for key, value in event.items() if value is not None}
            self._run.log(row, step=self._last_number, commit=True)
            if is_late:
                self._run.summary["step"] = self._step  # otherwise that of the last row

    def _next(self, event: Metrics) -> tuple[int, bool]:
        """Return the number of an event, and whether it is of an earlier step than the training, or a score, which may
        come after all other events of its step."""
        step = event["step"]
        assert isinstance(step, int)
        if step > self._step:
            self._step, self._late = step, 0
        is_late = step < self._step or any(key.startswith("downstream/") for key in event)
        self._late += is_late
        slot = 1 + self._late if is_late else int(is_evaluation(event))
        return self._step * _ROWS_PER_STEP + slot, is_late


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def last_step(folder: Path, run_id: str) -> int:
    """Return the largest W&B step of a run in the local files of all its attempts, `RUN/wandb/*run-*-ID*/run-ID.wandb`;
    -1 if there is none."""
    if not (files := list(folder.glob(f"*run-*-{run_id}*/run-{run_id}.wandb"))):
        return -1
    from wandb.proto.wandb_internal_pb2 import Record

    steps = [-1]
    for path in files:
        for data in _read_records(path.read_bytes()):
            record = Record.FromString(data)
            items = [item for item in record.history.item if "_step" in (item.key, *item.nested_key)]
            steps += [json.loads(item.value_json) for item in items]
    return max(steps)


def _read_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file, up to the first one that a killed process left incomplete."""
    record, position = b"", _FILE_HEADER
    while position + _HEADER.size <= len(data):
        if _BLOCK - position % _BLOCK < _HEADER.size:  # the rest of a block is empty
            position += _BLOCK - position % _BLOCK
            continue
        checksum, length, kind = _HEADER.unpack_from(data, position)
        position += _HEADER.size
        part = data[position : position + length]
        position += length
        if len(part) < length or zlib.crc32(bytes([kind]) + part) != checksum:
            return
        record = part if kind in (_FULL, _FIRST) else record + part
        if kind in (_FULL, _LAST):
            yield record
