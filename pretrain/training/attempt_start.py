"""Record the start of an attempt, and open its trackers."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiment.config import dump_config
from experiment.files import write_text
from experiment.formatting import counted, format_epochs
from experiment.run_files.goodput import ActivityTimer
from experiment.run_files.provenance import (
    ancestors_of,
    collect_provenance,
    has_logged_with_other_config,
    wandb_id,
    write_provenance,
)
from experiment.run_files.retention import drop_scores
from experiment.tracking.tracker import TrackedRun, Trackers, open_trackers
from pretrain.config import CHANGE_ROUNDING_ONLY
from pretrain.resolve import ResolvedRun
from pretrain.training_progress import TrainingProgress
from pretrain.training_stream import TrainingStream

log = logging.getLogger(__name__)

# Beginnings of the keys of a config that do not change the curves of a run.
_SAME_RESULT = (*CHANGE_ROUNDING_ONLY, "health.", "run.dir", "run.resume", "run.log_every", "run.profile")


def record_start(run: ResolvedRun, world_size: int, hosts: int) -> Mapping[str, Any]:
    """Write RUN/config.yaml, and this attempt to RUN/provenance.json. Returns the run's provenance."""
    tasks = {given.name: given.corpus.manifest.decontaminated for given in run.corpora}
    known = {name: sorted(found.values()) for name, found in tasks.items() if found is not None}
    config, ancestors = dump_config(run.config), _ancestors(run)
    changes = {
        "step": run.resume_plan.step,
        "starts_over": ancestors is not None and has_logged_with_other_config(run.folder, run.config, _SAME_RESULT),
        "changes": list(run.resume_plan.changes),
        "folder": str(run.folder.path),
    }
    attempt = collect_provenance(sys.argv, world_size, hosts) | changes
    provenance = write_provenance(run.folder, attempt, ancestors, known)
    write_text(run.folder.config, config)
    if run.resume_plan.resumes:
        run.folder.saved.touch()
    return provenance


def open_run_tracker(
    run: ResolvedRun,
    provenance: Mapping[str, Any],
    progress: TrainingProgress,
    stream: TrainingStream,
    evaluates_first: bool,
    times: ActivityTimer,
) -> Trackers:
    """Log the length of the run, delete scores of checkpoints after `progress`, and open the run's trackers.

    Args:
        progress: when this attempt starts.
        evaluates_first: whether this attempt starts with the evaluation of that step.
    """
    total_steps, epochs, step = stream.steps, stream.epochs, progress.step
    end = "until the time budget is used up" if total_steps is None else counted(total_steps, "step")
    since = f" since step {stream.begin}" if stream.begin else ""
    in_epochs = "" if epochs is None else f", {format_epochs(epochs)}{since}"
    log.info("training: %s%s; %d finished", end, in_epochs, step)
    for warning in run.config.warnings(total_steps):
        log.warning(warning)
    resumed_step = step if run.resume_plan.resumes else -1
    drop_scores(run.folder, resumed_step)
    tracked = TrackedRun(
        wandb_id=wandb_id(provenance),
        parameters=run.config.model_dump(mode="json"),
        total_steps=total_steps,
        resumed_step=resumed_step,
        evaluates_again=evaluates_first,
        seconds_left=run.config.schedule.seconds_left(progress.seconds),
        paused=times.paused,
    )
    return open_trackers(run.config.tracking, run.folder, tracked)


def _ancestors(run: ResolvedRun) -> list[dict[str, Any]] | None:
    """Return the models that the run's first weights came from; None for a resumed run, which has recorded them."""
    plan = run.resume_plan
    if plan.resumes:
        return None
    if plan.checkpoint is not None:
        *others, parent = ancestors_of(plan.checkpoint / "hf", "fork")
        return [*others, {**parent, "tokens": plan.forked_tokens}]
    init_from = run.model_source.init_from
    return ancestors_of(Path(init_from), "init_from") if init_from else []
