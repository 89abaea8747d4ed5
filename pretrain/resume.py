"""Find the checkpoint that a run resumes or forks, and plan how it continues from there.

The checkpoint contains all that the run needs besides the corpora: the files of `model.init_from`, `model.added_tokens`
and `run.resume` may be deleted once it is there.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiment.errors import UserError, user_errors_in
from experiment.models.hub_names import HubName, meant_name
from experiment.models.model_names import record_model
from experiment.run_files.checkpoints import (
    Verify,
    checkpoint_candidates,
    checkpoint_step,
    checkpoints_to_resume,
    deleted_meanwhile,
    incomplete_checkpoints,
    last_usable,
    names_model_folder,
    read_state,
)
from experiment.run_files.provenance import forked_from, read_origin, read_provenance
from experiment.run_files.run_folder import RunFolder, check_run_folder
from experiment.storage import is_url
from experiment.tracking.config import RUN_SET
from pretrain.config import ModelConfig, RunConfig
from pretrain.run_identity import PRECISION, check_fork, check_resume, describe_changes, keeps_stream, shown
from pretrain.training_progress import progress_from_json

log = logging.getLogger(__name__)

# Keys of lengths that count from step 0, in a fork too.
_FROM_STEP_0 = ("model.freeze_steps", "schedule.warmup_steps", "schedule.batch_warmup_steps")

# Keys that a run of a sweep or comparison may not change when it resumes: its results would be those of two configs.
_OF_SET = ("optimizer.", "schedule.", "evaluation.", "health.policy", "health.spike_factor", *PRECISION)


@dataclass(frozen=True)
class ResumePoint:
    checkpoint: Path  # verified
    fork: bool  # it is another run's

    @cached_property
    def state(self) -> Mapping[str, Any]:
        """The content of its state.json. Raises UserError if it was deleted meanwhile."""
        with deleted_meanwhile(self.checkpoint):
            return read_state(self.checkpoint)


@dataclass(frozen=True)
class ResumePlan:
    checkpoint: Path | None = None  # None: new weights, or weights of model.init_from
    step: int = 0  # finished steps
    fork: bool = False  # the checkpoint is another run's
    changes: tuple[str, ...] = ()  # keys whose value differs from the checkpoint's, a line each
    load_optimizer_state: bool = True  # False: the checkpoint was written with another optimizer
    same_stream: bool = True  # each step has the same batch as before, so known bad batches are still bad
    forked_at: int = 0  # step that the run began with, also if it has resumed since; 0 if it is no fork
    forked_tokens: int | None = None  # tokens that it began with; None if it is no fork, or one of an older version

    @property
    def resumes(self) -> bool:
        """Whether the run continues from a checkpoint of its own."""
        return self.checkpoint is not None and not self.fork


@dataclass(frozen=True)
class ResumeCandidates:
    """Complete checkpoints that a run may continue from, some of which may be damaged."""

    checkpoints: Sequence[Path]  # oldest first; empty: the run starts at step 0
    fork: bool  # they are another run's
    mirror: str | None = None  # of the run

    def choose(self, verify: Verify) -> ResumePoint | None:
        """Return the newest undamaged one. Raises UserError if all are damaged."""
        advice = "" if self.fork else f". {_advice(self.mirror)}"
        return ResumePoint(last_usable(self.checkpoints, verify, advice), self.fork) if self.checkpoints else None


def find_resume_candidates(run: RunConfig, folder: RunFolder, mirror: str | None = None) -> ResumeCandidates:
    """Return the checkpoints that `run.resume` means for a run folder.

    A fork that has saved a checkpoint resumes from it; one that has not forks again. `mirror`: of the run, from which
    `restore_run` may copy checkpoints later.

    Raises UserError for a `run.resume` that names no checkpoint, a run folder that should be unused, one whose
    checkpoints are gone, and one that holds anything but a pretraining run.
    """
    check_run_folder(folder, "pretraining run")
    own = checkpoints_to_resume(folder.checkpoints)
    _check_incomplete(folder.checkpoints, own, mirror)
    if run.resume == "never" and (own or folder.metrics.exists()):
        raise UserError(f"run.resume is 'never', but {folder.path} already holds a run; choose another run.dir")
    if not own and mirror is None:
        check_none_saved(folder)
    parents = [] if run.parent is None else _parent_checkpoints(run.parent, folder, has_own=bool(own))
    return ResumeCandidates(own or parents, fork=not own, mirror=mirror)


def check_none_saved(folder: RunFolder) -> None:
    """Raise UserError if a run without checkpoints has saved some: starting over would delete its metrics."""
    if folder.saved.exists():
        raise UserError(
            f"there is no checkpoint in {folder.checkpoints}, but this run has saved some. Mount their disk, or move "
            f"them back, to resume; to start over, choose another run.dir, or delete {folder.path}"
        )


def _check_incomplete(checkpoints: Path, complete: Sequence[Path], mirror: str | None) -> None:
    """Warn of newer checkpoints than the complete ones; raise UserError instead of starting over without any."""
    found = incomplete_checkpoints(checkpoints)
    if found and not complete:
        raise UserError(
            f"no checkpoint in {checkpoints} has a COMPLETE file: all are damaged, or their copy is incomplete. "
            f"{_advice(mirror)}"
        )
    for path in found:
        if checkpoint_step(path) > checkpoint_step(complete[-1]):
            log.warning("skipping damaged checkpoint %s: it has no COMPLETE file", path)


def _advice(mirror: str | None) -> str:
    delete = "Delete damaged checkpoints to resume from checkpoint.mirror"
    return f"{delete if mirror else 'Restore checkpoints from a copy'}, or choose another run.dir to start over"


def locate_model(
    model: ModelConfig, point: ResumePoint | None, mirror: str | None = None
) -> tuple[ModelConfig, ModelConfig]:
    """Return the section `model` with the model that `init_from` refers to, and the section to build the model from.

    They are the same, unless the checkpoint was written with the same options: then the model is built from its copy in
    the checkpoint, and `init_from` stays the folder that the run began with. Raises UserError for an `init_from` that
    names no model, and for another one than the run began with, whose weights would not be used. A fork may also name
    the checkpoint itself, or none. mirror: of the run, for the message.
    """
    if point is not None:
        saved = point.state["config"]["model"]
        is_same_name = _is_same_name(model.init_from, saved["init_from"])
        if not is_same_name:
            _check_other_model(model.init_from, saved["init_from"], point)
        if model.init_from is not None and is_same_name and _has_same_options(model, saved):
            options = dict.fromkeys(("config", "added_tokens", "max_positions"))
            copy = {**options, "init_from": str(point.checkpoint / "hf")}
            return model.model_copy(update={"init_from": saved["init_from"]}), model.model_copy(update=copy)
    if model.init_from is None:
        return model, model
    if is_url(model.init_from) and meant_name(model.init_from) is None:
        raise UserError(
            f"model.init_from: {model.init_from} is a URL: copy it to a disk that the hosts share, with "
            f"`deepcloze export --checkpoint {model.init_from} --output FOLDER`"
        )
    try:
        located = model.model_copy(update={"init_from": record_model(model.init_from)})
    except UserError as error:
        may_be_mirrored = mirror is not None and point is None and not Path(model.init_from).exists()
        hint = f"\nif {mirror} holds this run, `deepcloze pretrain` first copies it, with its model"
        raise type(error)(f"model.init_from: {error}{hint if may_be_mirrored else ''}") from None
    return located, located


def _check_other_model(init_from: str | None, saved: str | None, point: ResumePoint) -> None:
    """Raise UserError for an `init_from` whose weights would not be used. saved: the one that the run began with."""
    if point.fork and (init_from is None or _is_same_name(init_from, str(point.checkpoint / "hf"))):
        return
    what, instead = "resumed", "start a new run in another run.dir"
    if point.fork:
        what, instead = "forked", "remove run.resume to start from the weights of model.init_from"
    raise UserError(
        f"{point.checkpoint} cannot be {what} with another model.init_from: the run was started with {shown(saved)}, "
        f"the config says {shown(init_from)}. Restore the value, even if the model was moved or deleted, or {instead}"
    )


def _is_same_name(init_from: str | None, saved: str | None) -> bool:
    """Return whether `model.init_from` names the model that a checkpoint was initialized from, which may be gone."""
    if init_from is None or saved is None:
        return init_from is saved
    hub = HubName.of_model(init_from)
    return names_model_folder(Path(init_from), Path(saved), any_best=True) or (hub is not None and hub.may_mean(saved))


def _has_same_options(model: ModelConfig, saved: Mapping[str, Any]) -> bool:
    now = model.model_dump(mode="json")
    return all(now[key] == saved[key] for key in ("config", "added_tokens", "max_positions"))


def plan_resume(point: ResumePoint | None, identity: Mapping[str, Any]) -> ResumePlan:
    """Plan how the run continues from there. Raises UserError for a checkpoint that it can neither resume nor fork."""
    if point is None:
        return ResumePlan()
    state = point.state
    before = state["identity"]
    where = str(point.checkpoint)
    with user_errors_in(where):
        progress = progress_from_json(state["progress"])
    step, origin = progress.step, forked_from(state.get("provenance", {}).get("ancestors", ())) or {}
    if point.fork:
        changed = check_fork(before, identity, where)
    else:
        changed = check_resume(before, identity, where, f" ({state['config']['corpus']['train']})")
        edited, mirror = [key for key in changed if key.startswith(_OF_SET)], identity["checkpoint.mirror"]
        if edited and mirror is not None and RUN_SET in os.environ:
            old, new = map(shown, changed[edited[0]])
            raise UserError(
                f"{where} was trained with another {edited[0]}: {old}, now {new}. To train this run again, remove its "
                f"folder, and {mirror} too or set another checkpoint.mirror: a new folder resumes from the mirror"
            )
    for key in _FROM_STEP_0 if point.fork else ():
        ends_freeze = key == "model.freeze_steps" and key in changed and identity[key] < changed[key][0]
        if key in changed and 0 < identity[key] <= step and not ends_freeze:
            log.warning(f"{key}: {identity[key]}: is over: it counts from step 0, and the fork begins at step {step}")
        elif key in changed and "warmup" in key and changed[key][0] <= step < identity[key]:
            log.warning(
                f"{key}: {identity[key]}: does not warm up again: it counts from step 0, so {step / identity[key]:.1%} "
                f"of it are done when the fork begins at step {step}; to warm up again, start a new run with "
                "model.init_from in place of run.resume"
            )
    return ResumePlan(
        point.checkpoint,
        step=step,
        fork=point.fork,
        changes=tuple(describe_changes(changed)),
        load_optimizer_state="optimizer.name" not in changed,
        same_stream=keeps_stream(changed),
        forked_at=step if point.fork else int(origin.get("step", 0)),
        forked_tokens=progress.tokens if point.fork else origin.get("tokens"),
    )


def _parent_checkpoints(parent: str, folder: RunFolder, has_own: bool) -> Sequence[Path]:
    """Return the complete checkpoints that a run to fork has. `has_own`: the fork itself has some."""
    found = checkpoint_candidates(Path(parent))
    if has_own:
        ancestors = (read_provenance(folder) or {}).get("ancestors", [])
        if not is_fork_of(ancestors, parent):
            problem = f"holds a run that is not a fork of {parent}; choose another run.dir"
            raise UserError(f"run.dir: {folder.path} {problem}")
    elif not any((checkpoint / "state.json").is_file() for checkpoint in found):  # as in a seed of fine-tuning
        problem = "has no complete checkpoint of a run" if Path(parent).exists() else "does not exist"
        raise UserError(
            "'run.resume': expected auto, never, or a run or checkpoint to fork, such as "
            f"RUN/checkpoints/step-00001000; '{parent}' {problem}"
        )
    return found


def is_fork_of(ancestors: Sequence[Mapping[str, Any]], parent: str) -> bool:
    """Return whether a run with these ancestors began as a fork of `parent`, a run or a checkpoint, which may be
    gone."""
    origin, checkpoints = forked_from(ancestors), checkpoint_candidates(Path(parent))
    if origin is None:
        return False
    found = [each for checkpoint in checkpoints if (each := read_origin(checkpoint / "hf")) is not None]
    known = ("run_id", "step") if checkpoints == [Path(parent)] else ("run_id",)
    # Checkpoints that a copied run has not saved itself have the id of the first one.
    return not found or any(all(each[key] == origin.get(key) for key in known) for each in found)


def check_fork_length(plan: ResumePlan, steps: int | None) -> None:
    """Raise UserError for a fork that has nothing left to train. `steps`: in the whole run; None if unknown."""
    if plan.fork and steps is not None and plan.step >= steps:
        raise UserError(
            f"the run has {steps} steps, but a fork continues its parent's step count, and {plan.checkpoint} is at "
            f"step {plan.step} already"
        )
