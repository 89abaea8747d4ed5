"""Start one rank on its host: add the variables that depend on the host, then become `python -m pretrain.run`.

DeepSpeed's launcher runs this module once for each rank. The devices and cores of the host may differ from those of the
machine that the launch was started on. glibc reads its settings when a program starts, hence the exec, which keeps
process id, exit code and signals. Imports no torch, so that a start takes no longer.
"""

import os
import sys
from collections.abc import Sequence

from launcher.environment import host_environment
from launcher.machine import cpu_cores, guess_device


def main(argv: Sequence[str], module: str = "pretrain.run") -> None:
    ranks = int(os.environ.get("LOCAL_SIZE", "1"))
    added = host_environment(os.environ, cpu_cores(), ranks, guess_device(os.environ))
    command = [sys.executable, "-u", "-m", module, *argv]
    os.execve(sys.executable, command, os.environ | added)


if __name__ == "__main__":
    main(sys.argv[1:])
