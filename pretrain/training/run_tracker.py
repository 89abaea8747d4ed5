"""Open the trackers of a run, and write RUN/config.yaml and RUN/provenance.json. Rank 0 only."""

import sys
from pathlib import Path
from typing import Any

from experiment.config import dump_config
from experiment.files import write_text
from experiment.provenance import ancestors_of, collect_provenance, write_provenance
from experiment.tracking import Tracker, open_trackers
from pretrain.resolve import ResolvedRun


def open_run_tracker(run: ResolvedRun, world_size: int, step: int, total_steps: int | None) -> Tracker:
    """`step`: that the run starts or resumes at. `total_steps`: None under a time budget."""
    run_id = write_provenance(run.folder, collect_provenance(sys.argv, world_size), _ancestors(run))
    write_text(run.folder.config, dump_config(run.config))
    resumed = run.resume.checkpoint is not None and not run.resume.fork
    return open_trackers(
        run.config.tracking,
        run.folder,
        total_steps=total_steps,
        resumed_step=step if resumed else -1,
        run_id=run_id,
        parameters=run.config.model_dump(mode="json"),
    )


def _ancestors(run: ResolvedRun) -> list[dict[str, Any]] | None:
    """The models that the run's first weights came from; None for a resumed run, which has recorded them."""
    if run.resume.checkpoint is not None:
        return ancestors_of(run.resume.checkpoint / "hf", "fork") if run.resume.fork else None
    init_from = run.config.model.init_from
    return ancestors_of(Path(init_from), "init_from") if init_from else []
