"""The checkpoints of one run: what a save contains, and loading one."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from experiment.checkpoints import checkpoint_path, checkpoint_step, newest_usable, read_state
from experiment.provenance import write_origin
from experiment.retention import Retention
from pretrain.corpus.reader import Corpus
from pretrain.engine.engine import Engine
from pretrain.export import write_hugging_face_folder
from pretrain.resolve import ResolvedRun
from pretrain.resume import ResumePlan
from pretrain.training.checkpoint_tensors import load_checkpoint, save_checkpoint, update_progress
from pretrain.training.host_group import HostGroup
from pretrain.training.training_progress import TrainingProgress, fork_progress, progress_from_json, progress_to_json

log = logging.getLogger(__name__)


def load_resumed(plan: ResumePlan, engine: Engine) -> TrainingProgress:
    """Load the checkpoint of the resume plan, if any, and return the progress to start at. Collective."""
    if plan.checkpoint is None:
        return TrainingProgress()
    changes = "".join(f"\n  {line}" for line in plan.changes)
    log.info("%s %s%s", "forking" if plan.fork else "resuming from", plan.checkpoint, changes)
    if not plan.load_optimizer_state:
        log.warning("the checkpoint has another optimizer: optimizer states start at zero")
    load_checkpoint(engine, plan.checkpoint, plan.load_optimizer_state)
    progress = progress_from_json(read_state(plan.checkpoint)["progress"])
    return fork_progress(progress, plan.same_stream) if plan.fork else progress


class Checkpointer:
    def __init__(
        self,
        run: ResolvedRun,
        engine: Engine,
        model: PreTrainedModel,
        hosts: HostGroup,
        provenance: Mapping[str, Any],
    ) -> None:
        """Args:
        model: whose config and buffers go to the Hugging Face folder.
        provenance: of the run.
        """
        self._run = run
        self._engine = engine
        self._model = model
        self._hosts = hosts
        self._provenance = provenance
        plan = run.resume_plan
        resumed = plan.checkpoint is not None and not plan.fork
        # Step of the newest checkpoint of this run, None if it has none.
        self.saved_step = checkpoint_step(plan.checkpoint) if plan.checkpoint is not None and resumed else None

    def load_newest(self) -> TrainingProgress:
        """Load this run's newest checkpoint, to rewind. Collective."""
        newest = self._hosts.from_rank0(lambda: newest_usable(self._run.folder.checkpoints))
        assert newest is not None, "the trainer saves a checkpoint before it may rewind"
        load_checkpoint(self._engine, newest)
        progress = progress_from_json(read_state(newest)["progress"])
        self.saved_step = progress.step
        return progress

    def save(self, progress: TrainingProgress) -> bool:
        """Save the checkpoint of this step unless it exists; returns whether it was saved. Collective.

        Raises UnwritableError on all ranks if one cannot write.
        """
        if self.saved_step == progress.step:
            return False
        state = {
            "progress": progress_to_json(progress),
            "config": self._run.config.model_dump(mode="json"),
            "identity": self._run.identity,
            "precision": self._engine.precision,
            "corpora": _describe_corpora(self._run),
            "provenance": dict(self._provenance),
        }
        options = self._run.config.checkpoint
        keep = Retention(options.keep_last, options.keep_every, progress.evaluations.best_step)
        save_checkpoint(
            self._engine,
            self._run.folder.checkpoints,
            progress.step,
            state,
            lambda weights, folder: self._write_model(weights, folder, progress.step),
            keep,
        )
        self.saved_step = progress.step
        return True

    def update(self, progress: TrainingProgress) -> None:
        """Replace the progress in the saved checkpoint of this step, and name the best one. Collective.

        Raises UnwritableError on all ranks if rank 0 cannot write.
        """
        checkpoint = checkpoint_path(self._run.folder.checkpoints, progress.step)
        best = progress.evaluations.best_step
        update_progress(self._engine.world, checkpoint, progress_to_json(progress), best)

    def _write_model(self, weights: dict[str, Tensor], folder: Path, step: int) -> None:
        own = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        write_hugging_face_folder(own, self._model, self._run.tokenizer, folder)
        write_origin(folder, self._run.folder, self._provenance, step)


def _describe_corpora(run: ResolvedRun) -> dict[str, list[dict[str, Any]]]:
    """What model cards say about the data: the corpora may be gone when a checkpoint is exported."""
    train = [{"name": given.name, "weight": given.weight, **_describe(given.corpus)} for given in run.corpora]
    return {"train": train, "held_out": [{"name": name, **_describe(corpus)} for name, corpus in run.held_out.items()]}


def _describe(corpus: Corpus) -> dict[str, Any]:
    return {
        "fingerprint": corpus.fingerprint,
        "documents": corpus.documents,
        "tokens": corpus.tokens,
        "source": corpus.manifest.recipe.source,
    }
