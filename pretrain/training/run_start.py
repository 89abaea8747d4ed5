"""What rank 0 does when a run starts: write RUN/config.yaml and RUN/provenance.json, open the trackers."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiment.config import dump_config
from experiment.files import write_text
from experiment.provenance import ancestors_of, collect_provenance, read_provenance, write_provenance
from experiment.tracking import TrackedRun, Trackers, open_trackers
from pretrain.resolve import ResolvedRun
from pretrain.training_stream import TrainingStream

log = logging.getLogger(__name__)


def record_start(run: ResolvedRun, world_size: int, hosts: int) -> Mapping[str, Any]:
    """Write RUN/config.yaml, and this attempt to RUN/provenance.json. Returns the run's provenance."""
    write_provenance(run.folder, collect_provenance(sys.argv, world_size, hosts), _ancestors(run))
    write_text(run.folder.config, dump_config(run.config))
    provenance = read_provenance(run.folder)
    assert provenance is not None
    return provenance


def open_run_tracker(
    run: ResolvedRun, provenance: Mapping[str, Any], step: int, stream: TrainingStream, evaluates_first: bool
) -> Trackers:
    """Args:
    step: finished steps when this attempt starts.
    evaluates_first: whether this attempt starts with the evaluation of `step`.
    """
    total_steps, epochs = stream.steps, stream.epochs
    end = "until the time budget is used up" if total_steps is None else f"{total_steps:,} steps"
    in_epochs = "" if epochs is None else f", {epochs:,.3g} epochs"
    log.info("training: %s%s; %d finished", end, in_epochs, step)
    for warning in () if total_steps is None else run.config.schedule.warnings(total_steps):
        log.warning(warning)
    resumed = run.resume_plan.checkpoint is not None and not run.resume_plan.fork
    tracked = TrackedRun(
        run_id=provenance["run_id"],
        parameters=run.config.model_dump(mode="json"),
        total_steps=total_steps,
        resumed_step=step if resumed else -1,
        evaluates_again=evaluates_first,
    )
    return open_trackers(run.config.tracking, run.folder, tracked)


def _ancestors(run: ResolvedRun) -> list[dict[str, Any]] | None:
    """The models that the run's first weights came from; None for a resumed run, which has recorded them."""
    if run.resume_plan.checkpoint is not None:
        return ancestors_of(run.resume_plan.checkpoint / "hf", "fork") if run.resume_plan.fork else None
    init_from = run.config.model.init_from
    return ancestors_of(Path(init_from), "init_from") if init_from else []
