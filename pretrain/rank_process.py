"""The process of a rank: its records for the launcher, its end and its exit code."""

import logging
import os
import platform
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch.distributed as dist

from experiment.errors import AgreedFailureError, HostError, UserError, is_out_of_memory
from experiment.process.own_process import LAUNCH_VARIABLE, has_launcher, raise_limit_of_open_files
from experiment.run_files.outcome_file import (
    BEFORE_FIRST_STEP,
    Cause,
    Outcome,
    RankRecord,
    ReportedOutcome,
    write_first_outcome,
    write_outcome,
)
from experiment.run_files.run_folder import RunFolder, open_run_folder
from experiment.run_files.run_lock import lock_run, lock_until_exit
from pretrain.batching.loader import DataWorkerError
from pretrain.engine.process_group import LostRankError
from pretrain.training.cpu_group import AgreedError
from pretrain.training.stop_request import StopRequest, receive_stop_requests

log = logging.getLogger(__name__)

# gloo raises RuntimeError: with the line of its source, or, if another collective of the group has timed out, without.
_GLOO_ERRORS = ("gloo/transport", "Application timeout caused pair closure")


@dataclass
class RankRecorder:
    """Records in the run folder, as far as it is writable, how a rank and the run are doing, for the launcher."""

    folder: RunFolder
    rank: int
    holds_folder: bool = True  # False: another run may be using it; nothing is recorded until `start`

    def start(self) -> None:
        """Record this process, and lock the run folder until it ends. A record without an exit code means that the
        process was killed."""
        self.holds_folder = True
        with suppress(OSError):
            lock_until_exit(self.folder)
        self._record(None)

    def begin_training(self) -> None:
        """Record that this rank now looks for stop requests itself."""
        self._record(None, training=True)

    def record_agreed(self, ending: ReportedOutcome) -> None:
        """Record how the run ended, on which all ranks have agreed. Only rank 0 writes."""
        if self.rank == 0:
            with suppress(OSError):
                write_outcome(self.folder, *ending)

    def announce_refusal(self, error: UserError) -> None:
        """Print and record a mistake that all ranks have raised. Only rank 0 does."""
        if self.rank == 0:
            print(f"deepcloze: {error}", file=sys.stderr)
        self.record_agreed(ReportedOutcome(Outcome.REFUSED, str(error), Cause.AGREED))

    def fail(self, outcome: Outcome, message: str, cause: Cause | None) -> None:
        """Record an outcome that this rank alone knows of, unless another rank has failed before: losing that
        rank is why this one fails."""
        if self.holds_folder:
            with suppress(OSError):
                write_first_outcome(self.folder, outcome, message, cause)

    def end(self, exit_code: int) -> None:
        self._record(exit_code)

    def _record(self, exit_code: int | None, training: bool = False) -> None:
        if self.holds_folder:
            with suppress(OSError):
                RankRecord(self.rank, platform.node(), os.getpid(), training, exit_code).write(self.folder)


def run_rank(train: Callable[[StopRequest], Outcome], recorder: RankRecorder) -> NoReturn:
    """Call `train` and end the process with the exit code of its outcome, or of its exception."""
    raise_limit_of_open_files()
    with ExitStack() as resources:
        if recorder.rank == 0 and not has_launcher():
            _take_run_folder(recorder, resources)
        outcome = _run_rank(train, recorder)
    exit_process(outcome)


def _take_run_folder(recorder: RankRecorder, resources: ExitStack) -> None:
    """Do what `deepcloze` does before it starts ranks: lock the run folder, and remove its outcome and STOP file."""
    try:
        folder = open_run_folder(recorder.folder.path)
        resources.enter_context(lock_run(folder, await_processes=False))  # other ranks of this launch may be faster
        for earlier in (folder.outcome, folder.stop):
            earlier.unlink(missing_ok=True)
    except UserError as error:
        exit_refused(error, recorder.rank)


def _run_rank(train: Callable[[StopRequest], Outcome], recorder: RankRecorder) -> Outcome:
    # On several hosts the launcher ends all ranks at once: others would wait for one that ends alone.
    stop_file = recorder.folder.stop if recorder.rank == 0 and LAUNCH_VARIABLE not in os.environ else None
    stop = StopRequest(partial(_stop_before_training, recorder), partial(_stop_at_once, recorder))
    with receive_stop_requests(stop, stop_file):
        if recorder.holds_folder:
            recorder.start()
        ending = _call(partial(train, stop), recorder)
        if ending.outcome in (Outcome.FAILED, Outcome.REFUSED):
            recorder.fail(*ending)
        recorder.end(ending.outcome.exit_code)
        return ending.outcome


def exit_refused(error: UserError, rank: int) -> NoReturn:
    """Print a mistake in the command line or config, and end the process."""
    _print_mistake(error, rank)
    exit_process(Outcome.REFUSED)


def give_up(recorder: RankRecorder, message: str) -> NoReturn:
    """End a process whose main thread may be blocked, waiting for a rank that is lost."""
    _end_early(recorder, Outcome.FAILED, message, Cause.LOST_RANK)


def exit_process(outcome: Outcome) -> NoReturn:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the process that read it has exited
            stream.flush()
    os._exit(outcome.exit_code)  # a normal exit with live collective threads sometimes aborts


def _call(train: Callable[[], Outcome], recorder: RankRecorder) -> ReportedOutcome:
    """Return the outcome on this rank, and the reason for a failure."""
    here = f"{platform.node()}, rank {recorder.rank}"
    try:
        return ReportedOutcome(train(), "")
    except AgreedError as error:
        return ReportedOutcome(Outcome.REFUSED, str(error), Cause.AGREED)  # rank 0 has printed it
    except HostError as error:  # before UserError, which it is a kind of
        log.error("%s", error)
        return ReportedOutcome(Outcome.FAILED, f"{here}: {error}", Cause.LOST_HOST)
    except UserError as error:
        _print_mistake(error, recorder.rank)
        return ReportedOutcome(Outcome.REFUSED, str(error), Cause.AGREED)
    except AgreedFailureError as error:
        return ReportedOutcome(Outcome.FAILED, str(error).partition("\n")[0], Cause.AGREED)  # the rest has been logged
    except DataWorkerError as error:  # the rest has been logged; a restart may succeed
        return ReportedOutcome(Outcome.FAILED, str(error).partition("\n")[0], Cause.ERROR)
    except BaseException as error:
        log.exception("this rank failed")
        return ReportedOutcome(Outcome.FAILED, f"{here}: {type(error).__name__}: {error}", cause_of(error))


def cause_of(error: BaseException) -> Cause:
    """Return what an exception that ends a rank means for a restart."""
    if is_out_of_memory(error):
        return Cause.OUT_OF_MEMORY
    if isinstance(error, dist.DistError | LostRankError) or any(words in str(error) for words in _GLOO_ERRORS):
        return Cause.LOST_RANK
    return Cause.ERROR


def _stop_before_training(recorder: RankRecorder, reason: str) -> None:
    message = f"{reason} {BEFORE_FIRST_STEP}; run the same command again"
    _end_early(recorder, Outcome.STOPPED, message, Cause.SIGNAL)


def _stop_at_once(recorder: RankRecorder, reason: str) -> None:
    """End a process that trains, without a checkpoint of its step. The other ranks lose it."""
    message = f"{reason}; run the same command again to resume from the last complete checkpoint"
    _end_early(recorder, Outcome.STOPPED, message, Cause.SIGNAL)


def _end_early(recorder: RankRecorder, outcome: Outcome, message: str, cause: Cause) -> NoReturn:
    message = f"{platform.node()}, rank {recorder.rank}: {message}"
    recorder.fail(outcome, message, cause)
    recorder.end(outcome.exit_code)
    with suppress(OSError):  # stderr may be closed
        print(f"deepcloze: {message}", file=sys.stderr, flush=True)
    os._exit(outcome.exit_code)


def _print_mistake(error: UserError, rank: int) -> None:
    if rank == 0:
        print(f"deepcloze: {error}", file=sys.stderr)
    elif os.environ.get("LOCAL_RANK", "0") == "0":  # once for each host
        print(f"deepcloze: {platform.node()}, rank {rank}: {error}", file=sys.stderr)
