"""Log messages: every rank's to its own file in the run folder, those that people should see to the terminal as well.

Call it after the libraries are imported, since they fit their loggers with handlers of their own then.
"""

import logging

from rich.text import Text

from experiment.run_folder import RunFolder
from experiment.tracking.console import terminal

OUR_PACKAGES = frozenset({"__main__", "launcher", "pretrain", "finetune", "experiment", "benchmarks"})
COLOURS = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}
FILE_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_up_logging(folder: RunFolder, rank: int) -> None:
    """Send what is logged to RUN/logs/rank-N.log; on rank 0 our own messages and all warnings to the terminal as well.

    Python's warnings go to the file only. Handlers with which libraries write to the terminal themselves are removed.
    """
    folder.logs.mkdir(parents=True, exist_ok=True)
    logging.captureWarnings(True)
    for library in [
        logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)
    ]:
        for handler in [handler for handler in library.handlers if type(handler) is logging.StreamHandler]:
            library.removeHandler(handler)
            library.propagate = True
    root = logging.getLogger()
    for earlier in [handler for handler in root.handlers if isinstance(handler, _RankLog | _Terminal)]:
        root.removeHandler(earlier)
        earlier.close()
    root.setLevel(logging.INFO)
    log_file = _RankLog(folder.rank_log(rank), encoding="utf-8")
    log_file.setFormatter(logging.Formatter(FILE_FORMAT))
    root.addHandler(log_file)
    if rank == 0:
        root.addHandler(_Terminal())


class _RankLog(logging.FileHandler):
    """A rank's log file."""


class _Terminal(logging.Handler):
    """Prints above the progress line."""

    def filter(self, record: logging.LogRecord) -> bool:
        ours = record.name.split(".")[0] in OUR_PACKAGES
        return ours or (record.levelno >= logging.WARNING and record.name != "py.warnings")

    def emit(self, record: logging.LogRecord) -> None:
        try:
            prefix = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
            terminal().print(Text(prefix + self.format(record), COLOURS.get(record.levelno, "")))
        except Exception:
            self.handleError(record)
