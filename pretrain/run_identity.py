"""The identity of a run: its config, with model, corpora and stages as they resolve. A resume or a fork compares it
with that of the checkpoint.

An identity is saved in each checkpoint, so the functions know those of earlier versions.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment.config import flatten, with_defaults
from experiment.errors import UserError
from pretrain.config import ModelConfig, PretrainConfig

Changes = Mapping[str, tuple[Any, Any]]
"""Key -> its values in a checkpoint and now, where they differ."""

_SPECIAL_TOKENS = "corpus.special_tokens"
_DS_CONFIG = "engine.ds_config."
PRECISION = tuple(_DS_CONFIG + key for key in ("bf16.", "fp16.", "data_types.", "communication_data_type"))
"""Beginnings of keys. Others of the DeepSpeed JSON change the results by rounding at most."""
# Keys that determine which sequences are in a batch.
_STREAM = (
    *("run.seed", "batch.sequences", "batch.max_seq_length", "corpus.train", _SPECIAL_TOKENS),
    *("schedule.batch_warmup_steps", "schedule.stages"),
)
# Keys that determine the stream of batches, the masks or the parameters.
_FIXED = ("model", "masking", "optimizer.name", *_STREAM)
# Keys below these that only change how the same result is computed.
_LAYOUT = ("model.activation_checkpointing",)
# Keys that change nothing in training. Older identities have `use_cache` as activation checkpointing sets it, the
# `auto_map` and the outputs of a folder, and a default without newer events.
_NO_EFFECT = (
    *("model.use_cache", "model.auto_map", "model.output_attentions", "model.output_hidden_states"),
    "tracking.alerts.events",
)
# Keys that determine masks if the masking rate is a function of the run's length.
_LENGTH = ("schedule.steps", "schedule.epochs", "schedule.tokens")
# Keys that name paths, or that `run_identity` resolves.
_BY_CONTENT = (
    *("run.dir", "run.resume", "corpus.train", "schedule.stages"),
    *("model.config", "model.init_from", "model.added_tokens", "model.max_positions"),
)
# Keys about the training of a model, not its architecture: a fork may change them.
_MODEL_TRAINING = tuple(f"model.{field}" for field in ModelConfig.model_fields)


def run_identity(
    config: PretrainConfig,
    model_config: Mapping[str, Any],
    corpora: Sequence[tuple[str, float]],
    special_tokens: tuple[Sequence[int], Sequence[int]],
    ds_config: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the identity of a run: its config, with model, corpora and stages as they resolve.

    Args:
        corpora: fingerprint and weight of each training corpus.
        special_tokens: token ids before and after the text of each sequence.
        ds_config: the DeepSpeed JSON.
    """
    plain = {key: value for key, value in flatten(config).items() if not key.startswith(_BY_CONTENT)}
    ignored = ("transformers_version", "_name_or_path", "dtype", "architectures")
    model = {f"model.{key}": value for key, value in model_config.items() if key not in ignored}
    stages: list[list[int | str]] = []
    for stage in config.stages:
        # Stages of earlier versions started new epochs.
        is_continued = bool(stages) and stages[-1][1] == stage.max_seq_length
        found = [stage.first_step, stage.max_seq_length, stage.sequences]
        stages.append([*found, *(["continued"] if is_continued else [])])
    resolved = {
        "corpus.train": [list(corpus) for corpus in corpora] if len(corpora) > 1 else corpora[0][0],
        _SPECIAL_TOKENS: [list(ids) for ids in special_tokens],
        "schedule.stages": stages if config.schedule.stages else [],
        "schedule.steps": config.schedule.known_steps,
    }
    engine = {_DS_CONFIG + key: value for key, value in flatten(ds_config).items()}
    return plain | model | engine | resolved


def check_resume(before: Mapping[str, Any], now: Mapping[str, Any], where: str, trained_on: str = "") -> Changes:
    """Compare identities (see `run_identity`). Returns the changes; raises UserError for one that is not allowed.

    For messages: `where`: the checkpoint; `trained_on`: its corpora."""
    changes = _changes(before, now)
    fixed = _FIXED if before["masking.schedule"] == "constant" else (*_FIXED, *_LENGTH)
    if _SPECIAL_TOKENS in changes:
        old, new = map(shown, changes[_SPECIAL_TOKENS])
        raise UserError(
            f"{where} cannot be resumed with another tokenizer: it put the special tokens {old} before and after the "
            f"text of a sequence, now it puts {new}. Restore the tokenizer of the corpus, or start a new run"
        )
    for key, (old, new) in changes.items():
        if _is_below(key, fixed) and key not in _LAYOUT and not _is_of_other_version(key, before, now):
            what, which = ("a corpus with the fingerprint ", trained_on) if key == "corpus.train" else ("", "")
            mirror = now.get("checkpoint.mirror")
            other = f" and with another checkpoint.mirror: a new run.dir resumes from {mirror}" if mirror else ""
            fork = " with model.init_from" if _is_architecture(key) else ", or a fork of this one,"
            older = key == "schedule.stages" and old == [stage[:3] for stage in new]
            advice = "Earlier versions began new epochs where the length stays:" if older else "Restore the value, or"
            raise UserError(
                f"{where} cannot be resumed with another {key}: the run was started with {what}{shown(old)}{which}, "
                f"the config says {what}{shown(new)}. {advice} start a new run{fork} in another run.dir{other}"
            )
    return changes


def check_fork(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> Changes:
    """Like `check_resume`, for a fork: everything but the model, and what it froze, may change."""
    changes = _changes(before, now)
    frozen, _ = changes.get("model.freeze", ((), ()))
    if frozen and "optimizer.name" not in changes:  # one flat tensor has one step count
        raise UserError(
            f"run.resume: {where} cannot be forked with another model.freeze than {shown(frozen)}: the optimizer has "
            "updated those parameters less often than the others. Keep it: they train from step model.freeze_steps on, "
            "which may change"
        )
    for key, (old, new) in changes.items():
        if _is_architecture(key) and not _is_of_other_version(key, before, now):
            raise UserError(
                f"run.resume: {where} cannot be forked with another {key}: its model has {shown(old)}, the config "
                f"says {shown(new)}. To use its weights only, set model.init_from"
            )
    return changes


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    old, new = with_defaults(flatten(before), PretrainConfig), with_defaults(flatten(now), PretrainConfig)
    for identity in (old, new):  # the path of a preset depends on the installation
        identity["engine.ds_config"] = Path(identity["engine.ds_config"]).stem
    # Older identities do not have these.
    unknown = tuple(part for part in (_SPECIAL_TOKENS, _DS_CONFIG) if not any(key.startswith(part) for key in old))
    if new.get("model.model_type") == "big_bird":  # older ones have it as it is in the folder, without effect
        unknown += ("model.attention_type",)
    keys = sorted(key for key in old.keys() | new.keys() if not key.startswith(unknown))
    changed = [key for key in keys if old.get(key) != new.get(key) and not _is_below(key, _NO_EFFECT)]
    return {key: (old.get(key), new.get(key)) for key in changed}


def _is_architecture(key: str) -> bool:
    return _is_below(key, ("model",)) and key not in _MODEL_TRAINING


def _is_of_other_version(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether it is a field of the model's config that one version of transformers has, and the other has not.
    Keys in other mappings, such as `rope_parameters`, may be left out by the user."""
    classes = key.split(".")[1:-1]
    is_field = _is_architecture(key) and all(name.endswith("_config") for name in classes)
    return is_field and (key in flatten(before)) != (key in flatten(now))


def _is_below(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def describe_changes(changes: Changes) -> list[str]:
    """Return a line for each."""
    return [f"{key}: {shown(old)} -> {shown(new)}" for key, (old, new) in changes.items()]


def keeps_stream(changes: Changes) -> bool:
    """Return whether each step has the same batch as before."""
    return not any(_is_below(key, _STREAM) for key in changes)


def shown(value: Any) -> str:
    """Return a value as in YAML, text in quotes."""
    return repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
