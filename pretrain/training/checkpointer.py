"""The checkpoints of one run: when to save one, its content, verifying and loading one."""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from experiment.files import fsync
from experiment.models.transformers_models import parameters_in
from experiment.process.daemon_thread import in_daemon_thread
from experiment.run_files.checkpoints import (
    checkpoint_path,
    complete_checkpoints,
    last_usable,
    list_state,
    read_state,
    replace_state,
    verify,
    write_best,
)
from experiment.run_files.goodput import CHECKPOINTING, ActivityTimer
from experiment.run_files.mirror import Mirror
from experiment.run_files.provenance import write_origin
from experiment.run_files.retention import Retention
from experiment.tracking.alerts import Alert
from pretrain.corpus.reader import Corpus
from pretrain.engine.engine import Engine
from pretrain.modeling.build import BuiltModel
from pretrain.resolve import ResolvedRun
from pretrain.training.background_save import BackgroundSave, Snapshot, UnwritableError, on_all_ranks
from pretrain.training.checkpoint_tensors import (
    HostMemory,
    check_step_counts,
    load_checkpoint,
    persistent_buffers,
    write_hugging_face_folder,
)
from pretrain.training.cpu_group import CpuGroup
from pretrain.training.log_interval import LogInterval
from pretrain.training.mirror_uploads import MirrorUploads
from pretrain.training.step_agreement import TrainingClock
from pretrain.training_progress import (
    TrainingProgress,
    fork_progress,
    progress_from_json,
    progress_to_json,
    rename_corpora,
)
from pretrain.training_stream import TrainingStream

log = logging.getLogger(__name__)


def load_resumed(run: ResolvedRun, model: BuiltModel, engine: Engine, group: CpuGroup) -> TrainingProgress:
    """Load the checkpoint that the run resumes or forks, if any, and return the progress to start at. Collective.
    Raises AgreedError."""
    plan = run.resume_plan
    if plan.checkpoint is None:
        return TrainingProgress()
    changes = "".join(f"\n  {line}" for line in plan.changes)
    log.info("%s %s%s", "forking" if plan.fork else "resuming from", plan.checkpoint, changes)
    if not plan.load_optimizer_state:
        log.warning("the checkpoint has another optimizer: optimizer states start at zero")
    elif run.config.model.freeze and engine.zero_stage > 0:
        frozen = parameters_in(run.config.model.freeze, model.model)
        group.from_rank0(partial(check_step_counts, plan.checkpoint, frozen, model.unused))
    load_checkpoint(engine, plan.checkpoint, plan.load_optimizer_state)
    progress = _read_progress(plan.checkpoint, run)
    return fork_progress(progress, plan.same_stream) if plan.fork else progress


def _read_progress(checkpoint: Path, run: ResolvedRun) -> TrainingProgress:
    """Read the progress, with the tokens of each corpus under the name that it has in this run."""
    state = read_state(checkpoint)
    progress, now = progress_from_json(state["progress"]), _describe_corpora(run)
    before = state.get("corpora", now)  # older checkpoints have none
    return replace(progress, tokens_by_corpus=rename_corpora(progress.tokens_by_corpus, before["train"], now["train"]))


def verify_together(group: CpuGroup, checkpoint: Path) -> str | None:
    """Like `experiment.run_files.checkpoints.verify`, but each rank reads its share of the files. Collective.

    All ranks pass the same checkpoint, and get the same result. A rank's share contains the tensors that it saved, and
    will load if the layout is the same. They are then loaded from memory, where the operating system keeps them.
    """

    def share(names: list[str]) -> list[str]:
        first = (group.world.rank + 1) % group.world.size  # before the tensors of rank 0 comes engine/index.json
        return names[first :: group.world.size]

    problems = group.from_all_ranks_slowly(lambda on_progress: verify(checkpoint, share, on_progress))
    return next((problem for problem in problems if problem is not None), None)


@dataclass
class Checkpointer:
    """Saves a run every `checkpoint.every_steps` steps, on request, at its best step and when it ends or stops.

    Building it is collective.
    """

    run: ResolvedRun
    engine: Engine
    model: PreTrainedModel  # whose config and buffers go to the Hugging Face folder
    stream: TrainingStream
    group: CpuGroup
    interval: LogInterval  # its losses are a part of the progress
    clock: TrainingClock
    times: ActivityTimer
    provenance: Mapping[str, Any]  # of the run
    alert: Callable[[Alert], None]

    def __post_init__(self) -> None:
        folder, plan = self.run.folder, self.run.resume_plan
        saved_step = plan.step if plan.resumes else None
        url = self.run.config.checkpoint.mirror
        if saved_step is not None and self.group.world.rank == 0:
            with suppress(OSError):  # the disk may be full
                list_state(checkpoint_path(folder.checkpoints, saved_step))
        self._uploads = MirrorUploads(Mirror(url), folder, self.alert) if url and self.group.world.rank == 0 else None
        if self._uploads is not None:
            self._uploads.begin()
        self.saves = BackgroundSave(folder.checkpoints, self.group, self.times, saved_step, self._uploads)
        self._memory = HostMemory()

    @property
    def host_tensors(self) -> list[Tensor]:
        """The memory that is kept for the next save."""
        return list(self._memory.tensors.values())

    def load_newest(self) -> TrainingProgress:
        """Load this run's newest checkpoint, to rewind. Collective; no save may be in flight."""
        candidates = self.group.from_rank0(lambda: complete_checkpoints(self.run.folder.checkpoints))
        assert candidates, "the trainer saves a checkpoint before it may rewind"
        verify_candidate = partial(verify_together, self.group)
        newest = self.group.call(lambda: last_usable(candidates, verify_candidate))
        load_checkpoint(self.engine, newest)
        progress = _read_progress(newest, self.run)
        self.saves.saved_step = progress.step
        return progress

    def save_if_due(self, progress: TrainingProgress, finished: bool, stopping: bool, requested: bool) -> None:
        """Save the checkpoint of this step if it is due; wait for it if the run ends here. Collective.

        Args:
            finished: this was the last step of the run.
            stopping: this is the last step of the attempt, which was asked to stop.
            requested: a checkpoint is due by the clock.

        Raises UnwritableError like `advance_if_done`, or if the run ends and a rank cannot write.
        """
        every_steps = self.run.config.checkpoint.every_steps
        if not (finished or stopping or requested or progress.is_best_step or progress.is_multiple_of(every_steps)):
            return
        progress = replace(progress, seconds=self.clock.seconds)
        if finished or stopping:
            self.save_now(progress)
        else:
            self.save(progress)
        self.clock.restart_save_timer()

    def save_at_start(self, progress: TrainingProgress, finished: bool, evaluated: bool) -> None:
        """Save if it is due before the next step: a checkpoint to rewind to, the best step, the end. Before, delete
        what is not kept, unless the run has finished. Collective.

        `evaluated`: an evaluation that was left to this attempt was just made; it is added to the checkpoint of its
        step. Raises UnwritableError like `save_if_due`.
        """
        if not finished:
            self.saves.delete_superseded(self._retention(progress))
        if evaluated and self.saves.saved_step == progress.step:
            self.update(progress)  # uploads it, once it is written
            if finished:  # no save follows that would delete the best one before
                self.saves.delete_superseded(self._retention(progress))
            return
        if self.saves.saved_step is not None:
            self._upload(progress)
        needs_rewind_target = self.saves.saved_step is None and self.run.config.health.policy == "rewind"
        if needs_rewind_target or finished:
            self.save_now(progress)
        elif progress.is_best_step:
            self.save(progress)

    def save(self, progress: TrainingProgress) -> None:
        """Begin to save the checkpoint of this step unless it exists; waits for the save before. Collective;
        raises like `advance_if_done`.
        """
        with self.times.during(CHECKPOINTING):
            self.saves.wait()
            if self.saves.saved_step != progress.step:
                self.saves.begin(self._snapshot(self.interval.include_in(progress)))
            else:  # an attempt that failed after it was saved may not have named the best
                self._on_rank0(lambda: _name_best(self.run.folder.checkpoints, progress))
                self._upload(progress)

    def save_now(self, progress: TrainingProgress) -> None:
        """Save the checkpoint of this step unless it exists, and wait for it. Collective.

        Raises UnwritableError on all ranks if one cannot write.
        """
        with self.times.during(CHECKPOINTING):
            self.save(progress)
            self.saves.wait()
        if self.saves.saved_step != progress.step:
            raise UnwritableError(self.saves.problem)
        if self.saves.problem:
            self.save(progress)  # it exists, but its name may be lost, or not be named the best

    def update(self, progress: TrainingProgress) -> None:
        """Replace the progress in the saved checkpoint of this step, and name the best one. Collective.

        Raises UnwritableError on all ranks if rank 0 cannot write; the checkpoint stays usable.
        """
        checkpoints = self.run.folder.checkpoints
        checkpoint = checkpoint_path(checkpoints, progress.step)
        saved = progress_to_json(self.interval.include_in(progress))

        def replace_progress() -> None:
            replace_state(checkpoint, read_state(checkpoint) | {"progress": saved})
            _name_best(checkpoints, progress)

        self._on_rank0(replace_progress)
        self._upload(progress)

    def close(self) -> None:
        """Wait until the newest checkpoint is in the mirror, for at most `mirror_uploads.CLOSE_SECONDS`. Collective."""
        if self.run.config.checkpoint.mirror is None:
            return
        close = self._uploads.close if self._uploads is not None else lambda: None
        closing = in_daemon_thread(close, "end of the uploads")
        self.group.wait_for_all(closing, lambda: True)  # the time is limited
        closing.result()

    def _upload(self, progress: TrainingProgress) -> None:
        """Let the mirror have the checkpoints that are there."""
        if self._uploads is not None:
            assert self.saves.saved_step is not None
            self._uploads.update(self._retention(progress), self.saves.saved_step, is_new=False)

    def _retention(self, progress: TrainingProgress) -> Retention:
        options = self.run.config.checkpoint
        return Retention(options.keep_last, options.keep_every, progress.evaluations.best_step)

    def _on_rank0(self, write: Callable[[], None]) -> None:
        on_all_ranks(self.group, write if self.group.world.rank == 0 else lambda: None)

    def _snapshot(self, progress: TrainingProgress) -> Snapshot:
        """Return everything that the checkpoint of this step contains, copied."""
        step = progress.step
        buffers = persistent_buffers(self.model) if self.group.world.rank == 0 else {}
        state = {
            "progress": progress_to_json(progress),
            "config": self.run.config.model_dump(mode="json"),
            "identity": self.run.identity,
            "precision": self.engine.precision,
            "corpora": _describe_corpora(self.run),
            "tokens_per_epoch": self.stream.tokens_per_epoch(step),
            "provenance": dict(self.provenance),
            "step": step,
            "loss_scaler": self.engine.loss_scaler_state(),
        }
        write_model = partial(self._write_model, buffers, step)
        return Snapshot(step, self._memory.copy(self.engine), state, write_model, self._retention(progress))

    def _write_model(self, buffers: dict[str, Tensor], step: int, weights: dict[str, Tensor], folder: Path) -> None:
        own = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        write_hugging_face_folder(own | buffers, self.model, self.run.tokenizer, folder)
        write_origin(folder, self.run.folder, self.provenance, step)


def _name_best(checkpoints: Path, progress: TrainingProgress) -> None:
    """Name the best of these checkpoints, and make sure that their names stay."""
    fsync(checkpoints)
    if progress.evaluations.best_step is not None:
        write_best(checkpoints, progress.evaluations.best_step)


def _describe_corpora(run: ResolvedRun) -> dict[str, list[dict[str, Any]]]:
    """Facts about the data for model cards: the corpora may be gone when a checkpoint is exported."""
    train = [{"name": given.name, "weight": given.weight, **_describe(given.corpus)} for given in run.corpora]
    return {"train": train, "held_out": [{"name": name, **_describe(corpus)} for name, corpus in run.held_out.items()]}


def _describe(corpus: Corpus) -> dict[str, Any]:
    return {
        "fingerprint": corpus.fingerprint,
        "documents": corpus.documents,
        "tokens": corpus.tokens,
        "source": corpus.manifest.recipe.source,
    }
