"""The process of a rank: what ends it, what it leaves for the launcher, and its exit code."""

import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from experiment.errors import AgreedFailureError, UserError
from experiment.outcome_file import Cause, Outcome, ReportedOutcome
from experiment.own_process import GATE_VARIABLE, LAUNCH_VARIABLE, raise_limit_of_open_files
from pretrain.batching.loader import DataWorkerError
from pretrain.engine.process_group import LostRankError
from pretrain.rank_report import RankReport
from pretrain.training.cpu_group import AgreedError
from pretrain.training.stop_request import exit_on_stop_request

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.01
# gloo raises RuntimeError: with the line of its source, or, if another collective of the group has timed out, without.
_GLOO_ERRORS = ("gloo/transport", "Application timeout caused pair closure")


def wait_at_gate() -> None:
    """Wait until the launch that has started this process lets it begin. Ends the process if the launch has ended,
    which usually kills it."""
    if (path := os.environ.pop(GATE_VARIABLE, None)) is None:
        return
    gate = Path(path)
    while not gate.exists():
        if not gate.parent.exists():
            exit_process(Outcome.REFUSED)
        time.sleep(_POLL_SECONDS)


def run_rank(train: Callable[[], Outcome], report: RankReport) -> NoReturn:
    """Call `train` and end the process with the exit code of its outcome, or of what it raises."""
    raise_limit_of_open_files()
    # On several hosts the launcher ends all ranks at once: others would wait for one that ends alone.
    stop_file = report.folder.stop if report.rank == 0 and LAUNCH_VARIABLE not in os.environ else None
    with exit_on_stop_request(partial(_stop_before_training, report), stop_file):
        report.start()
        ending = _call(train, report)
        if ending.outcome in (Outcome.FAILED, Outcome.REFUSED):
            report.fail(*ending)
        report.end(ending.outcome.exit_code)
        exit_process(ending.outcome)


def exit_refused(error: UserError, rank: int) -> NoReturn:
    """Print a mistake in the command line or config, and end the process."""
    _print_mistake(error, rank)
    exit_process(Outcome.REFUSED)


def give_up(report: RankReport, message: str) -> NoReturn:
    """End a process whose main thread may be blocked, waiting for a rank that is lost."""
    _end_early(report, Outcome.FAILED, message, Cause.LOST_RANK)


def stop_at_once(report: RankReport, reason: str) -> NoReturn:
    """End a process that trains, without a checkpoint of its step. The other ranks lose it."""
    message = f"{reason}; run the same command again to resume from the last complete checkpoint"
    _end_early(report, Outcome.STOPPED, message, Cause.SIGNAL)


def exit_process(outcome: Outcome) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(outcome.exit_code)  # a normal exit with live collective threads sometimes aborts


def _call(train: Callable[[], Outcome], report: RankReport) -> ReportedOutcome:
    """The outcome on this rank, and the reason for a failure."""
    here = f"{platform.node()}, rank {report.rank}"
    try:
        return ReportedOutcome(train(), "")
    except AgreedError as error:
        return ReportedOutcome(Outcome.REFUSED, str(error), Cause.AGREED)  # rank 0 has printed it
    except UserError as error:
        _print_mistake(error, report.rank)
        return ReportedOutcome(Outcome.REFUSED, str(error), Cause.AGREED)
    except AgreedFailureError as error:
        return ReportedOutcome(Outcome.FAILED, str(error).partition("\n")[0], Cause.AGREED)  # the rest has been logged
    except DataWorkerError as error:  # the rest has been logged; a restart may succeed
        return ReportedOutcome(Outcome.FAILED, str(error).partition("\n")[0], Cause.ERROR)
    except BaseException as error:
        log.exception("this rank failed")
        return ReportedOutcome(Outcome.FAILED, f"{here}: {type(error).__name__}: {error}", cause_of(error))


def cause_of(error: BaseException) -> Cause:
    """What an exception that ends a rank means for a restart."""
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return Cause.OUT_OF_MEMORY
    if isinstance(error, dist.DistError | LostRankError) or any(words in str(error) for words in _GLOO_ERRORS):
        return Cause.LOST_RANK
    return Cause.ERROR


def _stop_before_training(report: RankReport, reason: str) -> None:
    message = f"{reason} before the first step; run the same command again"
    _end_early(report, Outcome.STOPPED, message, Cause.SIGNAL)


def _end_early(report: RankReport, outcome: Outcome, message: str, cause: Cause) -> NoReturn:
    message = f"{platform.node()}, rank {report.rank}: {message}"
    report.fail(outcome, message, cause)
    report.end(outcome.exit_code)
    print(f"deepcloze: {message}", file=sys.stderr, flush=True)
    os._exit(outcome.exit_code)


def _print_mistake(error: UserError, rank: int) -> None:
    if rank == 0:
        print(f"deepcloze: {error}", file=sys.stderr)
    elif os.environ.get("LOCAL_RANK", "0") == "0":  # once for each host
        print(f"deepcloze: {platform.node()}, rank {rank}: {error}", file=sys.stderr)
