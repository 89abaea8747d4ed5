"""The command line: runs one command, and turns errors into messages and exit codes."""

import importlib.metadata
import select
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import fire

from experiment.errors import StoppedError, UserError, describe_disk_error, describe_lack_of_memory, notify
from experiment.files import check_name
from experiment.process.signals import HANDLED_SIGNALS, handle_stop_signals, ignore_stop_signals, interrupt
from launcher.command_line import help_text, is_help_request, parse_command_line, terminal_width
from launcher.commands import COMMANDS

ABOUT = (
    "deepcloze pretrains masked language models with DeepSpeed: from raw text to a pretrained encoder to measured "
    "downstream tasks. The commands are listed in the order of their use."
)

_QUIET = ("-q", "--quiet")
RESUMABLE = ("clean", "corpus", "pretrain", "finetune", "sweep", "compare", "watch")
_WRITING = ("predict", "export")  # stopped by a signal, they remove what they have written


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name) and return the exit code: 0, 1, 2, 75, 130 or 141."""
    given = sys.argv[1:] if argv is None else list(argv)
    argv = [argument for argument in given if argument not in _QUIET]
    if argv == given:
        return _run(argv)
    from experiment.progress import quiet

    with quiet():
        return _run(argv)


def _run(argv: Sequence[str]) -> int:
    is_resumable = bool(argv) and argv[0] in RESUMABLE
    try:
        with handle_stop_signals(interrupt, HANDLED_SIGNALS if is_resumable else _interrupts(argv)):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)  # which the start of the process has blocked
            _run_command(argv)
    except UserError as error:
        return _fail(str(error), 2)
    except StoppedError as stopped:
        ignore_stop_signals()
        return _fail(str(stopped) or "stopped; run the same command again to resume", 75)
    except KeyboardInterrupt:
        ignore_stop_signals()
        if is_resumable:
            return _fail("interrupted; run the same command again to resume", 75)
        return _fail("interrupted", 130)
    except BrokenPipeError:
        if not _reader_has_ended():
            raise
        return 141  # as a shell reports a program that ends by SIGPIPE
    except Exception as error:
        if (message := describe_lack_of_memory(error)) is not None:
            return _fail(message, 1)
        if (message := describe_disk_error(error)) is None:
            raise
        return _fail(message, 2)
    return 0


def _interrupts(argv: Sequence[str]) -> list[signal.Signals]:
    """Return SIGINT, and other signals that end the command in the same way; none that is ignored, as SIGINT is by
    shells in a script for commands in the background."""
    more = (signal.SIGTERM, signal.SIGHUP) if argv and argv[0] in _WRITING else ()
    return [number for number in (signal.SIGINT, *more) if signal.getsignal(number) is not signal.SIG_IGN]


def _run_command(argv: Sequence[str]) -> None:
    if list(argv) == ["--version"]:
        print(f"deepcloze {_version()}")
    elif is_help_request(argv):
        print(help_text(argv, COMMANDS, ABOUT, width=terminal_width()))
    else:
        try:
            names = (str(Path.cwd()), *argv)
        except FileNotFoundError:
            raise UserError("the working directory no longer exists; change to another one") from None
        for each in names:
            check_name(each)
        name, options = parse_command_line(argv, COMMANDS)
        fire.Fire({name: partial(COMMANDS[name], options)}, command=[name], name="deepcloze")


def _version() -> str:
    try:
        return importlib.metadata.version("deepcloze")
    except importlib.metadata.PackageNotFoundError:  # `python -m launcher` in a clone
        return "(not installed)"


def _reader_has_ended() -> bool:
    """Return whether nothing reads stdout any more, as in `deepcloze --help | head -1`."""
    stdout = select.poll()
    stdout.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in stdout.poll(0))


def _fail(message: str, code: int) -> int:
    notify(message)
    return code
