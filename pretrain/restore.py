"""Copy a run from `checkpoint.mirror` to a run folder without checkpoints.

Imports no torch: the launcher calls it, too.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from experiment.errors import UserError
from experiment.process.daemon_thread import in_daemon_thread
from experiment.run_files.checkpoints import checkpoints_to_resume
from experiment.run_files.mirror import Mirror
from experiment.run_files.run_folder import RunFolder
from experiment.storage import StorageError
from pretrain.config import PretrainConfig
from pretrain.resume import is_fork_of

log = logging.getLogger(__name__)

_OWNER_SECONDS = 60.0  # for the storage to say to which run a mirror belongs


def restore_run(config: PretrainConfig, on_progress: Callable[[], None]) -> None:
    """Copy the run in `checkpoint.mirror`, which is set, unless the run folder has checkpoints. Raises UserError, also
    if the mirror belongs to another run than the folder."""
    folder, url = RunFolder(Path(config.run.dir).absolute()), config.checkpoint.mirror
    assert url is not None
    mirror = Mirror(url)
    if checkpoints_to_resume(folder.checkpoints):
        _check_owner_in_time(mirror, folder)
        return
    if folder.provenance.exists():  # else the folder takes over the mirror's run
        mirror.check_owner(folder)
    parent, found = config.run.parent, mirror.provenance()
    if config.run.resume == "never" and (found is not None or mirror.complete()):
        raise UserError(f"run.resume is 'never', but {url} already holds a run; choose another checkpoint.mirror")
    if parent is not None and found is not None and not is_fork_of(found["ancestors"], parent):
        raise UserError(f"{url} holds a run that is not a fork of {parent}; choose another checkpoint.mirror")
    mirror.restore(folder, on_progress)


def _check_owner_in_time(mirror: Mirror, folder: RunFolder) -> None:
    """Raise UserError if the mirror belongs to another run. A storage that does not answer only gives a warning: a run
    with checkpoints trains without it, and is checked again before each upload."""
    checking = in_daemon_thread(lambda: mirror.check_owner(folder), "owner of the mirror")
    try:
        checking.result(_OWNER_SECONDS)
    except (StorageError, TimeoutError) as error:
        problem = str(error) or f"no answer in {_OWNER_SECONDS:.0f} s"
        log.warning("not checked whether the mirror %s belongs to this run: %s", mirror.url, problem)
