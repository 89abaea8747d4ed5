"""The checkpoints of one run: when to save, what a save contains, and loading one."""

import logging
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from experiment.checkpoints import newest_usable, read_state
from experiment.provenance import read_provenance, write_origin
from experiment.retention import Retention
from pretrain.engine.engine import Engine
from pretrain.export import write_hugging_face_folder
from pretrain.resolve import ResolvedRun
from pretrain.training.checkpoint_tensors import load_checkpoint, save_checkpoint
from pretrain.training.host_group import HostGroup
from pretrain.training.training_progress import TrainingProgress, fork_progress, progress_from_json, progress_to_json

log = logging.getLogger(__name__)


class Checkpointer:
    def __init__(self, run: ResolvedRun, engine: Engine, model: PreTrainedModel, hosts: HostGroup) -> None:
        """`model`: whose config and buffers go to the Hugging Face folder."""
        self._run = run
        self._engine = engine
        self._model = model
        self._hosts = hosts
        self.saved_step: int | None = None  # of the newest checkpoint of this run

    def load(self) -> TrainingProgress:
        """Load what the resume plan says and return its progress. Collective."""
        plan = self._run.resume
        if plan.checkpoint is None:
            return TrainingProgress()
        changes = "".join(f"\n  {line}" for line in plan.changes)
        log.info("%s %s%s", "forking" if plan.fork else "resuming from", plan.checkpoint, changes)
        if not plan.load_optimizer_state:
            log.warning("the checkpoint has another optimizer: optimizer states start at zero")
        load_checkpoint(self._engine, plan.checkpoint, plan.load_optimizer_state)
        progress = progress_from_json(read_state(plan.checkpoint)["progress"])
        if plan.fork:
            return fork_progress(progress, plan.same_stream)
        self.saved_step = progress.step
        return progress

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

    def _write_model(self, weights: dict[str, Tensor], folder: Path, step: int) -> None:
        own = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        write_hugging_face_folder(own, self._model, self._run.tokenizer, folder)
        record = read_provenance(self._run.folder)
        assert record is not None, "rank 0 writes provenance before it trains"
        write_origin(folder, self._run.folder, record, step)
