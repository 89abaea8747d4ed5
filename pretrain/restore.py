"""Copy a run from `checkpoint.mirror` to a run folder without checkpoints, or with older ones.

Imports no torch: the launcher calls it, too.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from experiment.errors import UserError
from experiment.process.daemon_thread import in_daemon_thread
from experiment.run_files.checkpoints import checkpoints_to_resume, complete_checkpoints
from experiment.run_files.mirror import Mirror
from experiment.run_files.run_folder import RunFolder
from experiment.storage import StorageError
from pretrain.config import PretrainConfig
from pretrain.resume import check_none_saved, is_fork_of

log = logging.getLogger(__name__)

_OWNER_SECONDS = 60.0  # for the storage to say to which run a mirror belongs


def restore_run(config: PretrainConfig, on_progress: Callable[[], None]) -> None:
    """Copy the run in `checkpoint.mirror`, which is set, if the run folder has no checkpoints, or if the run was
    continued in another folder since. Raises UserError, also if the mirror belongs to another run than the folder, or
    if the run was continued in both, or if neither has the checkpoints that the folder has had."""
    folder, url = RunFolder(Path(config.run.dir).absolute()), config.checkpoint.mirror
    assert url is not None
    mirror = Mirror(url)
    if checkpoints_to_resume(folder.checkpoints):
        # A used folder is refused with "never", and stays as it is.
        if config.run.resume != "never" and _is_ahead_in_time(mirror, folder):
            log.warning("the run in %s was continued in another folder: copying its newer checkpoints", url)
            mirror.restore(folder, on_progress, is_ahead=True)
        return
    # Without provenance, the folder takes over the mirror's run.
    is_ahead = folder.provenance.exists() and mirror.check_owner(folder)
    parent, found = config.run.parent, mirror.provenance()
    if config.run.resume == "never" and (found is not None or mirror.complete()):
        raise UserError(f"run.resume is 'never', but {url} already holds a run; choose another checkpoint.mirror")
    if parent is not None and found is not None and not is_fork_of(found["ancestors"], parent):
        raise UserError(f"{url} holds a run that is not a fork of {parent}; choose another checkpoint.mirror")
    mirror.restore(folder, on_progress, is_ahead)
    if not complete_checkpoints(folder.checkpoints):
        check_none_saved(folder)


def _is_ahead_in_time(mirror: Mirror, folder: RunFolder) -> bool:
    """Like `Mirror.check_owner`. A storage that does not answer only gives a warning: a run with checkpoints trains
    without it, and is checked again before each upload."""
    checking = in_daemon_thread(lambda: mirror.check_owner(folder), "owner of the mirror")
    try:
        return checking.result(_OWNER_SECONDS)
    except (StorageError, TimeoutError) as error:
        problem = str(error) or f"no answer in {_OWNER_SECONDS:.0f} s"
        log.warning("not checked whether the mirror %s belongs to this run: %s", mirror.url, problem)
        return False


def repair_checkpoint(url: str, checkpoint: Path, problem: str, on_progress: Callable[[], None]) -> bool:
    """Replace a damaged checkpoint by its copy in a mirror. Returns False if there is none, or it cannot be copied."""
    try:
        is_repaired = Mirror(url).repair(checkpoint, on_progress)
    except (StorageError, OSError) as error:
        log.warning("the damaged checkpoint %s cannot be copied again from %s: %s", checkpoint, url, error)
        return False
    if is_repaired:
        log.warning("the checkpoint %s was damaged: %s; copied it again from %s", checkpoint, problem, url)
    return is_repaired
