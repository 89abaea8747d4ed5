"""`deepcloze pretrain --detach`: the same command in the background, which prints to RUN/logs/launch.log.

It has a session of its own: a terminal that closes sends no signal there.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from experiment.config import load_config
from experiment.errors import notify
from experiment.process.own_process import deepcloze_command, own_environment
from experiment.run_files.outcome_file import RankRecord, read_rank_record
from experiment.run_files.run_folder import RunFolder, check_not_moved, open_run_folder
from experiment.run_files.run_lock import check_unlocked
from launcher.options import PretrainOptions
from launcher.supervision.stop_signals import is_training
from pretrain.config import PretrainConfig

_POLL_SECONDS = 0.2


def launch_detached(options: PretrainOptions) -> None:
    """Start the launch, show its output until rank 0 trains, and leave it to itself.

    Raises UserError for a config that is not valid and a run that is active, SystemExit with the exit code of a launch
    that ends before, or 1 for one that is killed.
    """
    folder = RunFolder(Path(load_config(PretrainConfig, options.config, options.overrides).run.dir).absolute())
    check_not_moved(options.config, options.overrides, folder)
    check_unlocked(folder)
    is_new = not folder.path.exists()
    before = read_rank_record(folder, 0)  # of an earlier attempt
    open_run_folder(folder.path)
    with folder.launch_output.open("ab") as output, folder.launch_output.open("rb") as printed:
        printed.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            background_command(options),
            env=own_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            while process.poll() is None and not _trains(folder, before):
                _show(printed)
                time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            notify("no longer waiting for the run to start")
        _show(printed)
    if process.poll() is None:
        _announce(folder, process.pid)
    elif process.returncode != 0:
        if is_new:
            _remove_unused(folder)
        if process.returncode < 0:
            notify(f"the launch was killed by {signal.Signals(-process.returncode).name}")
        sys.exit(max(1, process.returncode))


def background_command(options: PretrainOptions) -> Sequence[str]:
    """Return the command without `--detach`."""
    flags = options.model_dump(exclude={"config", "detach", "overrides"}, exclude_defaults=True)
    return deepcloze_command("pretrain", options.config, flags | options.overrides)


def _trains(folder: RunFolder, before: RankRecord | None) -> bool:
    """Return whether rank 0 trains. before: its record before the launch."""
    record = read_rank_record(folder, 0)
    return record is not None and record != before and is_training(folder, record)


def _show(printed: IO[bytes]) -> None:
    with suppress(OSError):  # the terminal may be closed
        sys.stderr.buffer.write(printed.read())
        sys.stderr.flush()


def _announce(folder: RunFolder, pid: int) -> None:
    path = shlex.quote(str(folder.path))
    print(f"{folder.path}: runs in the background as process {pid}")
    print(f"  follow it: deepcloze logs {path} --follow")
    print(f"  stop it:   touch {path}/STOP")


def _remove_unused(folder: RunFolder) -> None:
    """Remove the folder of a launch that has started nothing."""
    with suppress(OSError):  # there is more in it
        if [path.name for path in folder.logs.iterdir()] == [folder.launch_output.name]:
            folder.launch_output.unlink()
            folder.logs.rmdir()
            folder.path.rmdir()
