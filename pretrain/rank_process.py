"""The process of a rank: what ends it, what it leaves for the launcher, and its exit code."""

import contextlib
import logging
import os
import platform
import resource
import sys
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from experiment.errors import AgreedFailureError, UserError
from experiment.outcome_file import Outcome
from pretrain.batching.loader import DataWorkerError
from pretrain.rank_report import RankReport
from pretrain.training.host_group import AgreedError
from pretrain.training.stop_request import exit_on_stop_request

log = logging.getLogger(__name__)


def run_rank(train: Callable[[], Outcome], report: RankReport) -> NoReturn:
    """Call `train` and end the process with the exit code of its outcome, or of what it raises."""
    _raise_limit_of_open_files()
    stop_file = report.folder.stop if report.rank == 0 else None
    with exit_on_stop_request(partial(_stop_before_training, report), stop_file):
        report.start()
        outcome, message = _call(train, report)
        if outcome in (Outcome.FAILED, Outcome.REFUSED):
            report.fail(outcome, message)
        report.end(outcome.exit_code)
        exit_process(outcome)


def exit_refused(error: UserError, rank: int) -> NoReturn:
    """Print a mistake in the command line or config, and end the process."""
    _print_mistake(error, rank)
    exit_process(Outcome.REFUSED)


def give_up(report: RankReport, message: str) -> NoReturn:
    """End a process whose main thread may be blocked, waiting for a rank that is lost."""
    _end_early(report, Outcome.FAILED, message)


def exit_process(outcome: Outcome) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(outcome.exit_code)  # a normal exit with live collective threads sometimes aborts


def _raise_limit_of_open_files() -> None:
    """Raise the soft limit, often 1024, to the hard limit: corpora and connections take file descriptors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some systems allow less than their hard limit says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _call(train: Callable[[], Outcome], report: RankReport) -> tuple[Outcome, str]:
    """The outcome on this rank, and the reason for a failure."""
    here = f"{platform.node()}, rank {report.rank}"
    try:
        return train(), ""
    except AgreedError as error:
        return Outcome.REFUSED, str(error)  # rank 0 has printed it
    except UserError as error:
        _print_mistake(error, report.rank)
        return Outcome.REFUSED, str(error)
    except AgreedFailureError as error:
        return Outcome.FAILED, str(error).partition("\n")[0]  # the rest has been logged
    except DataWorkerError as error:
        log.error("%s", error)
        return Outcome.FAILED, f"{here}: {error}".partition("\n")[0]
    except BaseException as error:
        log.exception("this rank failed")
        return Outcome.FAILED, f"{here}: {type(error).__name__}: {error}"


def _stop_before_training(report: RankReport, reason: str) -> None:
    _end_early(report, Outcome.STOPPED, f"{reason} before the first step; run the same command again")


def _end_early(report: RankReport, outcome: Outcome, message: str) -> NoReturn:
    message = f"{platform.node()}, rank {report.rank}: {message}"
    report.fail(outcome, message)
    report.end(outcome.exit_code)
    print(f"deepcloze: {message}", file=sys.stderr, flush=True)
    os._exit(outcome.exit_code)


def _print_mistake(error: UserError, rank: int) -> None:
    if rank == 0:
        print(f"deepcloze: {error}", file=sys.stderr)
    elif os.environ.get("LOCAL_RANK", "0") == "0":  # once for each host
        print(f"deepcloze: {platform.node()}, rank {rank}: {error}", file=sys.stderr)
