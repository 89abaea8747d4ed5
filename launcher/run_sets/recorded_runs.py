"""The configs in the record of a set of runs: what runs began with, and how that differs from a plan."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment.config import FlatConfig, with_defaults
from experiment.errors import UserError, reason, user_errors_in
from experiment.files import read_json
from experiment.hub_data import PREFIX
from experiment.models.hub_names import HubName
from experiment.models.model_names import mention_state, record_model
from experiment.run_files.checkpoints import (
    checkpoint_candidates,
    last_usable,
    mention_newer,
    names_model_folder,
    verify,
)
from experiment.run_files.run_folder import RunFolder
from finetune.config import CHANGE_ROUNDING_ONLY, FinetuneConfig, config_of_kind
from pretrain.config import CHANGE_ROUNDING_ONLY as PRETRAINING_ROUNDING_ONLY
from pretrain.config import PretrainConfig

SEEDS = "training.seeds"  # may change: finished seeds are not trained again
_PRECISION = "training.precision"
_RESUME = ("run.resume", "pretrain.run.resume")  # `auto` for `never` once the run has begun
_IRRELEVANT = (  # beginnings of keys
    "run.keep",
    *PRETRAINING_ROUNDING_ONLY,
    *(f"pretrain.{key}" for key in ("run.dir", "run.log_every", *PRETRAINING_ROUNDING_ONLY)),
    *(f"training.{key}" for key in CHANGE_ROUNDING_ONLY),
)
_PRETRAIN_ORIGINS = ("corpus.fingerprint", "corpus.eval_fingerprints", "encoder.", "engine.ds_config.")
_ORIGINS = ("data.", *_PRETRAIN_ORIGINS, *(f"pretrain.{key}" for key in _PRETRAIN_ORIGINS))
"""Beginnings of keys that records of earlier versions may lack."""


def read_record(record: Path, option: str) -> dict[str, Any]:
    """Return the content of the record of a set, {} if it is missing. Raises UserError if it is damaged. option: of the
    set's folder."""
    try:
        content: dict[str, Any] = read_json(record)
        if not all(isinstance(run["config"], dict) for run in content.get("runs", content).values()):
            raise ValueError("expected a config for each run")
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{option}: {record} is damaged: {reason(error)}. If no config has changed since, delete this file and run "
            "the same command again: finished runs are kept, pretrainings if they have their checkpoints"
        ) from None
    return content


def recorded_configs(record: Path, option: str) -> dict[str, FlatConfig]:
    """Return the config of each run in the record of a set that has a folder: others have not started, or were removed
    to run again. Raises UserError as `read_record`."""
    content = read_record(record, option)
    configs = {name: run["config"] for name, run in content.get("runs", content).items()}
    return {name: config for name, config in configs.items() if (record.parent / name).exists()}


def resume_overrides(resume: str, name: str, folder: Path, configs: Mapping[str, FlatConfig]) -> dict[str, str]:
    """Return the overrides with which a pretraining run of the set in `folder` resumes although its config has
    `run.resume: never`, which is for its first start; {} until it has begun with its recorded config. Until it has
    written its provenance, it may be rejected because its folder or mirror holds another one. configs:
    `recorded_configs` of the set."""
    begun = name in configs and RunFolder(folder / name).provenance.exists()
    return {"run.resume": "auto"} if begun and resume == "never" else {}


def record_model_of_set(init_from: str, configs: Mapping[str, FlatConfig], same: Iterable[FlatConfig]) -> str:
    """Return the model that runs of a set start from, as `record_model` gives it: the one that they began with. Someone
    may have pushed to the Hub since, or a run may have saved newer checkpoints.

    configs: `recorded_configs` of the set. same: those of the runs that start from `init_from`, as all do that name the
    same model of the Hub. Raises UserError.
    """
    name = HubName.of_model(init_from)
    began = dict.fromkeys(str(config.get("model.init_from")) for config in (same if name is None else configs.values()))
    if name is not None:
        return record_model(init_from, next(filter(name.may_mean, began), None))
    kept = [model for model in began if names_model_folder(Path(init_from), Path(model), any_best=True)]
    if len(kept) != 1:
        model = record_model(init_from)
        mention_state(init_from, model)
        return model
    with user_errors_in("recorded by earlier runs"):
        if not Path(kept[0]).exists():
            advice = "restore it, or remove the folders of these runs to run them again from another model"
            raise UserError(f"{kept[0]} does not exist; {advice}")
        mention_newer(Path(init_from), Path(kept[0]))
        return record_model(kept[0])


def record_parent_of_set(resume: str, parent: str, same: Iterable[FlatConfig]) -> str:
    """Return the checkpoint that `run.resume` referred to when runs of a set began; relative if that is, so that the
    project may be moved. A value that is recorded, as by version 0.2.0, or that names no checkpoint, which is rejected,
    is returned as it is.

    parent: `RunConfig.parent`. same: the recorded configs of the runs with this value. Raises UserError.
    """
    began, path = [str(config.get("run.resume")) for config in same], Path(parent)
    if resume in began:
        return resume
    for checkpoint in began:
        if names_model_folder(path, model := Path(checkpoint) / "hf", any_best=True):
            mention_newer(path, model)
            return checkpoint
    if not (candidates := checkpoint_candidates(path)):
        return resume
    newest = last_usable(candidates, verify)
    checkpoint = str(newest) if path.is_absolute() else os.path.relpath(newest)
    mention_state(parent, f"{checkpoint}/hf")
    return checkpoint


def recorded_data(configs: Mapping[str, FlatConfig]) -> list[str]:
    """Return the data sets of the Hub, with the commits that runs of a set began with. configs: `recorded_configs` of
    it."""
    texts = dict.fromkeys(str(value) for config in configs.values() for value in config.values())
    return [text for text in texts if text.startswith(PREFIX)]


def with_new_keys(before: FlatConfig, now: FlatConfig) -> FlatConfig:
    """Return a recorded config with the keys of `now` that an earlier version did not have, at their defaults. Such a
    version recorded the precision `auto`, not what it stood for."""
    kind = config_of_kind(str(now["task.kind"])) if "task.kind" in now else FinetuneConfig
    known = with_defaults(with_defaults(with_defaults(before, kind), PretrainConfig), PretrainConfig, "pretrain.")
    missing = tuple(part for part in _ORIGINS if not any(key.startswith(part) for key in before))
    origins = {key: value for key, value in now.items() if key.startswith(missing)}
    full = origins | {key: known[key] for key in now if key in known} | dict(before)
    full |= {key: now[key] for key in _RESUME if {full.get(key), now.get(key)} == {"auto", "never"}}
    return full if full.get(_PRECISION) != "auto" else full | {_PRECISION: now.get(_PRECISION)}


def find_change(before: FlatConfig, now: FlatConfig, ignored: Sequence[str]) -> str | None:
    """Return what a run was started with, if it is another config: the first key with another value, of a checksum only
    if there is no other."""
    keys = (key for key in {*before, *now} - {SEEDS, *ignored} if not key.startswith(_IRRELEVANT))
    changed = [key for key in keys if before.get(key) != now.get(key)]
    if not changed:
        return None
    return _describe_change(min(changed, key=lambda key: (key.startswith(_ORIGINS), key)), before, now)


def _describe_change(key: str, before: FlatConfig, now: FlatConfig) -> str:
    """Return what a run was started with: the value of a key, or other content of the file that a checksum is of."""
    section, _, name = key.partition(".")
    paths = {
        "data": (f"task.{name}", f"task.test.{name}"),
        "encoder": ("pretrain.model.init_from", "model.init_from"),  # of a chain, the model that its pretraining had
    }
    path = next((path for path in paths.get(section, ()) if path in now), key)
    if path == key or before.get(path) != now[path]:
        advice = f" (set {key}: {before.get(key)} to resume)" if key == _PRECISION else ""  # of `auto`, elsewhere
        return f"another {path}: {before.get(path)!r}, now {now.get(path)!r}{advice}"
    return f"other content of {now[path]}" + (f"/{name}" if section == "encoder" else "")
