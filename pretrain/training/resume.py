"""Which checkpoint a run begins with, its own or that of a run it forks, and what may have changed since then."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.checkpoints import checkpoint_candidates, complete_checkpoints, last_usable, read_state
from experiment.config import flatten
from experiment.errors import UserError
from experiment.provenance import origin_of, read_provenance
from experiment.run_folder import RunFolder
from pretrain.config import ModelConfig, PretrainConfig, RunConfig

# What determines which sequences are in a batch.
_STREAM = (
    "run.seed",
    "batch.sequences",
    "batch.max_seq_length",
    "corpus.train",
    "schedule.batch_warmup_steps",
    "schedule.stages",
)
# Whatever determines the stream of batches, the masks or the parameters.
_FIXED = ("model", "masking", "optimizer.name", *_STREAM)
# Unless it only says how the same is computed.
_LAYOUT = ("model.activation_checkpointing",)
# A masking rate that changes along the run depends on how long the run is.
_LENGTH = ("schedule.steps", "schedule.epochs", "schedule.tokens")
# Where a run lies and where it reads from may change; what is read is compared by fingerprint instead.
_BY_CONTENT = (
    "run.dir",
    "run.resume",
    "model.config",
    "model.init_from",
    "model.added_tokens",
    "model.max_positions",
    "corpus.train",
    "schedule.stages",
)
# How the model is trained, which a fork may change, as opposed to what it is.
_TRAINED = tuple(f"model.{field}" for field in ModelConfig.model_fields)


@dataclass(frozen=True)
class ResumePlan:
    """What a run starts from."""

    checkpoint: Path | None = None  # None: nothing, or the weights of model.init_from alone
    fork: bool = False  # it is another run's
    changes: tuple[str, ...] = ()  # what the config says now that it did not say there, a line each
    moments: bool = True  # whether the optimizer takes over its state
    same_stream: bool = True  # whether the batch of a step is the same, so that a bad one is bad still


def plan_resume(run: RunConfig, folder: RunFolder, now: Mapping[str, Any]) -> ResumePlan:
    """What `run.resume` means for a run folder. `now`: the identity of the run, see `identity`.

    A fork that has saved a checkpoint goes on from that; one that has not forks again. The checkpoint is read once to
    verify it. Raises UserError for a text that names no checkpoint, a run folder that is used but should not be, and a
    checkpoint of a run that this one cannot continue or fork.
    """
    own, parents = complete_checkpoints(folder.checkpoints), []
    if run.resume == "never" and (own or folder.metrics.exists()):
        raise UserError(f"run.resume is 'never', but {folder.path} holds a run already; name another run.dir")
    if run.parent is not None:
        parents = checkpoint_candidates(Path(run.parent))
        if own:
            _check_is_fork(run.parent, parents, folder)
        elif not parents:
            what = "holds no complete checkpoint" if Path(run.parent).exists() else "is not there"
            raise UserError(
                "'run.resume': expected auto, never, or a run or checkpoint to fork, such as "
                f"RUN/checkpoints/step-00001000; '{run.parent}' {what}"
            )
    if not (own or parents):
        return ResumePlan()
    fork = not own
    checkpoint = last_usable(own or parents)
    before = read_state(checkpoint)["identity"]
    lines = (check_fork if fork else check_resume)(before, now, str(checkpoint))
    changed = _changes(before, now)
    return ResumePlan(
        checkpoint,
        fork,
        tuple(lines),
        moments="optimizer.name" not in changed,
        same_stream=not any(_under(key, _STREAM) for key in changed),
    )


def _check_is_fork(named: str, parents: Sequence[Path], folder: RunFolder) -> None:
    """Raises UserError for a used folder whose run was not forked from the one that `named` means."""
    ancestors = (read_provenance(folder) or {}).get("ancestors", [])
    parent = ancestors[-1] if ancestors and ancestors[-1]["relation"] == "fork" else None
    origins = [origin_of(checkpoint / "hf") for checkpoint in parents]
    if parent is None or any(origin and origin["run_id"] != parent["run_id"] for origin in origins):
        raise UserError(f"run.dir: {folder.path} holds a run that was not forked from {named}; name another run.dir")


def check_resume(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> list[str]:
    """Compare identities (see `identity`). Returns one line for each harmless difference; raises UserError for one that
    would make it another run. `where`: the checkpoint, for the message."""
    changes = _changes(before, now)
    fixed = _FIXED if before["masking.schedule"] == "constant" else (*_FIXED, *_LENGTH)
    for key, (old, new) in changes.items():
        if _under(key, fixed) and key not in _LAYOUT:
            raise UserError(
                f"{where} cannot be continued with another {key}: it began with {old!r}, the config says {new!r}. "
                "Restore the value, or start a new run in another run.dir, which may be a fork of this one"
            )
    return _lines(changes)


def check_fork(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> list[str]:
    """As `check_resume`, for another run that takes over the state: all but the model may change."""
    changes = _changes(before, now)
    for key, (old, new) in changes.items():
        if _under(key, ("model",)) and key not in _TRAINED:
            raise UserError(
                f"run.resume: {where} cannot be forked with another {key}: its model has {old!r}, the config says "
                f"{new!r}. To begin with its weights alone, name it in model.init_from"
            )
    return _lines(changes)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    old, new = flatten(before), flatten(now)
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def _under(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _lines(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [f"{key}: {old!r} -> {new!r}" for key, (old, new) in changes.items()]


def identity(
    config: PretrainConfig, model_config: Mapping[str, Any], corpora: Sequence[tuple[str, float]]
) -> dict[str, Any]:
    """What a run is: its config, with model, training corpora and stages replaced by what they resolve to.

    `corpora`: the fingerprint and weight of each corpus that is trained on.
    """
    plain = {key: value for key, value in flatten(config).items() if not key.startswith(_BY_CONTENT)}
    ignored = ("transformers_version", "_name_or_path", "dtype", "architectures")
    model = {f"model.{key}": value for key, value in model_config.items() if key not in ignored}
    stages = [[stage.first_step, stage.max_seq_length, stage.sequences] for stage in config.stages]
    resolved = {
        "corpus.train": [list(corpus) for corpus in corpora] if len(corpora) > 1 else corpora[0][0],
        "schedule.stages": stages if config.schedule.stages else [],
        "schedule.steps": config.schedule.known_steps,
    }
    return plain | model | resolved
