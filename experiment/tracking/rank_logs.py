"""Log messages: each rank writes its own file in the run folder; rank 0 also prints to the terminal."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime

from rich.text import Text

from experiment.files import PACKAGES
from experiment.progress import terminal, warning_console
from experiment.run_files.run_folder import RunFolder
from experiment.tracking.progress_line import PROGRESS_LOG

OUR_PACKAGES = frozenset({"__main__", *PACKAGES, "benchmarks"})
COLORS = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}
_Removed = tuple[logging.Logger, logging.Handler, bool]  # and whether the logger passed messages on
FILE_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_up_logging(folder: RunFolder, rank: int) -> list[_Removed]:
    """Log to RUN/logs/rank-N.log; on rank 0, also print our messages and the libraries' warnings to the terminal.

    Python's warnings go to the file only. Removes the handlers through which libraries print to the terminal, so call
    it after they are imported. Returns them.
    """
    folder.logs.mkdir(parents=True, exist_ok=True)
    logging.captureWarnings(True)
    removed = _remove_terminal_handlers()
    _remove_own_handlers()
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    log_file = _RankLog(folder.rank_log(rank), encoding="utf-8")
    log_file.setFormatter(_Formatter(FILE_FORMAT))
    root.addHandler(log_file)
    if rank == 0:
        root.addHandler(_Terminal())
    return removed


@contextmanager
def logging_set_up(folder: RunFolder) -> Iterator[None]:
    """Log in the block as rank 0 does, for a command of one process, or a function that a script calls."""
    root, show_warning = logging.getLogger(), warnings.showwarning
    level, others = root.level, [(handler, handler.level) for handler in root.handlers]
    removed = set_up_logging(folder, 0)
    captured_before = warnings.showwarning is show_warning
    for handler, own_level in others:
        handler.setLevel(max(level, own_level))
        if type(handler) is logging.StreamHandler:
            handler.addFilter(_is_left_to_others)
    try:
        yield
    finally:
        _remove_own_handlers()
        for handler, own_level in others:
            handler.setLevel(own_level)
            handler.removeFilter(_is_left_to_others)
        for logger, handler, propagate in removed:
            logger.addHandler(handler)
            logger.propagate = propagate
        root.setLevel(level)
        if not captured_before:
            logging.captureWarnings(False)


def _remove_own_handlers() -> None:
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _RankLog | _Terminal)]:
        root.removeHandler(handler)
        with suppress(OSError):  # messages that did not fit on a full disk are lost
            handler.close()


def _remove_terminal_handlers() -> list[_Removed]:
    """Make libraries that print their own messages pass them to the root logger instead."""
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    removed: list[_Removed] = [
        (logger, handler, logger.propagate)
        for logger in loggers
        for handler in logger.handlers
        if type(handler) is logging.StreamHandler
    ]
    for logger, handler, _ in removed:
        logger.removeHandler(handler)
        logger.propagate = True
    return removed


class _Formatter(logging.Formatter):
    """Writes times with their offset from UTC: hosts, and containers on them, may have different time zones."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        return datetime.fromtimestamp(record.created).astimezone().isoformat(" ", "milliseconds")


class _RankLog(logging.FileHandler):
    """A rank's log file; a class of its own so that a second set-up can replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Leave out empty messages, with which DeepSpeed frames its tables."""
        if str(record.msg).strip():
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Drop messages that do not fit on a full disk: logging would print a traceback for each message."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _is_left_to_others(record: logging.LogRecord) -> bool:
    """Return whether the terminal shows a message only if the script that calls us has a handler for it."""
    ours = record.name.split(".")[0] in OUR_PACKAGES
    return not ours and (record.levelno < logging.WARNING or record.name == "py.warnings")


class _Terminal(logging.Handler):
    """Prints above the progress line."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name != PROGRESS_LOG and not _is_left_to_others(record)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            prefix = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
            console = terminal() if record.levelno < logging.WARNING else warning_console()
            console.print(Text(prefix + self.format(record), COLORS.get(record.levelno, "")))
        except Exception:
            self.handleError(record)
