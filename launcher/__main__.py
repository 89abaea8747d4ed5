"""`python -m launcher` is `deepcloze`."""

import atexit
import logging
import os
import signal
import sys
from io import TextIOWrapper
from typing import NoReturn

from experiment.process.signals import HANDLED_SIGNALS


def run() -> NoReturn:
    """Run the command line and end the process with its exit code. Skip Python's teardown, which takes a second after
    torch is imported."""
    _open_closed_streams()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a pipe and the log of a job too: lines appear at once
        if sys.stdout.encoding.lower() != "utf-8":  # may lack … and ×
            sys.stdout.reconfigure(errors="replace")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # warns if it cannot write to the home, which it need not
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the numbers of nvidia-smi, here and in child processes
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)  # until `main` handles them, after the imports
    from launcher.cli import main

    try:
        code = main()
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or 120  # as Python
    os._exit(code)


def _open_closed_streams() -> None:
    """Open /dev/null for each standard stream that the shell has closed, as with `>&-`. Otherwise the next file that is
    opened, here or in a process that this one starts, would take its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number: this one
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


if __name__ == "__main__":
    run()
