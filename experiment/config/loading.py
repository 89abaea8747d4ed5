"""YAML file + dotted overrides -> strict typed config.

A config is a tree of `Section`s. Values are checked strictly: a value of the wrong type and an unknown key are rejected
with a message that names the line, the key, the value and the expected ones.
"""

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_jsonable_python

from experiment.config.field_types import (
    accepts,
    annotation_below,
    describe_type,
    is_section,
    parse_value,
    union_members,
)
from experiment.config.validation_errors import describe_value, explain_errors, explain_unknown_key
from experiment.config.yaml_dialect import KeyPath, explain_yaml, read_yaml, read_yaml_with_lines, write_yaml
from experiment.errors import UserError


class Section(BaseModel):
    """One part of a config, or the flags of a command: frozen, strict, without unknown keys.

    The string literal below each field documents it; `deepcloze config` and `--help` print it.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    @classmethod
    def specialize(cls, tree: Mapping[str, Any]) -> type[Self]:
        """Return the type to build from a tree of plain values: one of `variants`, if its fields depend on a value in
        it.

        Raises UserError if that value is not valid.
        """
        return cls

    @classmethod
    def variants(cls) -> Mapping[str, type[Self]]:
        """Return title -> type, of all types that `specialize` may give; empty if there is only this one."""
        return {}


_DATA_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".conll", ".gz", ".zst")

ConfigT = TypeVar("ConfigT", bound=Section)

FlatConfig = Mapping[str, object]
"""Dotted config key -> value."""


def load_config(config_type: type[ConfigT], path: Path | str, overrides: Mapping[str, str] | None = None) -> ConfigT:
    """Read `path` (YAML), apply `overrides` (dotted key -> raw text of the value) and return the typed config.

    Raw text is read as the type of its field: a text field takes it literally, a list takes `[a, b]` or `a,b`, and a
    section takes `{steps: 3}`, which replaces it. Raises UserError for a file that cannot be read or is not a mapping,
    an unknown key (suggesting a known one) and a value of the wrong type.
    """
    path = Path(path)
    if path.suffix.lower() in _DATA_SUFFIXES:
        raise UserError(f"{path} is not a config: expected a YAML file, which names the data; see `deepcloze recipes`")
    content = read_config_file(path)
    try:
        tree, lines = read_yaml_with_lines(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}{explain_yaml(error)}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections at the top level, found {describe_value(tree)}")
    return build_config(config_type, tree, overrides, str(path), lines)


def read_config_file(path: Path | str) -> bytes:
    """Read the content of a config file. Raises UserError."""
    try:
        if Path(path).is_fifo():
            raise UserError(f"{path} is a pipe; expected a file: the processes of a command each read the config")
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror or error}") from None


def build_config(
    config_type: type[ConfigT],
    tree: Mapping[str, Any],
    overrides: Mapping[str, str] | None = None,
    origin: str = "config",
    lines: Mapping[KeyPath, int] = MappingProxyType({}),
) -> ConfigT:
    """Build a typed config from a tree of plain values and overrides. Messages name `origin`, and the line of a key if
    it is in `lines`. Raises UserError."""
    overrides = overrides or {}
    try:
        merged: dict[str, Any] = json.loads(json.dumps(tree, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError):
        raise UserError(f"{origin}: expected only mappings, lists, text, numbers, true, false and null") from None
    # Whole sections first, in any order of the flags: overrides of single keys refine them.
    by_depth = sorted(overrides, key=lambda dotted: dotted.count("."))
    plain = copy.deepcopy(merged)
    for dotted in by_depth:
        _set_key(plain, dotted, parse_value(Any, overrides[dotted]))
    try:
        _check_kind(merged, config_type)
        config_type = config_type.specialize(plain)
    except UserError as error:
        raise UserError(_with_place(str(error), (), origin, lines, overrides)) from None
    for dotted in by_depth:
        _set_key(merged, dotted, parse_value(_annotation_of_override(config_type, dotted), overrides[dotted]))
    try:
        return config_type.model_validate_json(json.dumps(merged))
    except ValidationError as error:
        found = explain_errors(config_type, error)
        messages = [_with_place(message, key, origin, lines, overrides) for key, message in found]
        raise UserError("\n".join(dict.fromkeys(messages))) from None


def dump_config(config: Section) -> str:
    """Return the config as YAML, with all keys; `load_config` of it gives an equal config."""
    return write_yaml(config.model_dump(mode="json"))


def flatten(config: Section | Mapping[str, Any]) -> dict[str, Any]:
    """{'section.key': value} for every leaf; lists are leaves."""
    tree = config.model_dump(mode="json") if isinstance(config, Section) else config
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves.update({f"{key}.{below}": leaf for below, leaf in flatten(value).items()})
        else:
            leaves[key] = value
    return leaves


def read_recorded(path: Path) -> dict[str, Any]:
    """Return the nested values of the config.yaml that a run has written; empty if it cannot be read."""
    try:
        config = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def with_defaults(flat: Mapping[str, Any], config_type: type[BaseModel], above: str = "") -> dict[str, Any]:
    """Fill in the defaults of keys that a flat config lacks, such as one that an earlier version has recorded.

    above: the beginning of the keys of `config_type`, such as `task.`
    """
    filled = dict(flat)
    for name, field in config_type.model_fields.items():
        key = above + name
        if any(known.startswith(f"{key}.") for known in flat):
            for section in filter(is_section, union_members(field.annotation)):
                filled = with_defaults(filled, section, f"{key}.")
        elif key not in flat and not field.is_required():
            filled |= flatten({key: to_jsonable_python(field.get_default(call_default_factory=True))})
    return filled


def _set_key(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[last] = value


def _annotation_of_override(config_type: type[Section], dotted: str) -> Any:
    """Return the annotation of an overridden key. Raises UserError for an unknown key."""
    annotation: Any = config_type
    parts = dotted.split(".")
    for depth, part in enumerate(parts):
        if not accepts(annotation, dict):
            above = ".".join(parts[:depth])
            raise UserError(f"command line: unknown config key '{dotted}': '{above}' is {describe_type(annotation)}")
        sections = list(filter(is_section, union_members(annotation)))
        if sections and not any(part in section.model_fields for section in sections):
            raise UserError(f"command line: {explain_unknown_key(config_type, dotted)}")
        annotation = annotation_below(annotation, part)
    return annotation


def _with_place(
    message: str, key: KeyPath, origin: str, lines: Mapping[KeyPath, int], overrides: Mapping[str, str]
) -> str:
    """Put the origin of the value of `key` before a message: a line of the file, or the command line. The key of a
    message about the whole config is the one that it begins with."""
    if not key and (quoted := re.match(r"'([\w.]+)': ", message)):
        key = tuple(quoted[1].split("."))
    dotted = ".".join(key)
    if any(f"{dotted}.".startswith(f"{override}.") for override in overrides):
        return f"command line: {message}"
    line = next((lines[key[:depth]] for depth in range(len(key), 0, -1) if key[:depth] in lines), None)
    refined = [f"--{override}" for override in overrides if override.startswith(f"{dotted}.")]
    place = origin + (f", line {line}" if line else "") + (f", with {' and '.join(refined)}" if refined else "")
    return f"{place}: {message}"


_KINDS = {
    "task": ("a task", "finetune"),
    "rows": ("a comparison", "compare"),
    "steps": ("a cleaning", "clean"),
    "source": ("a cleaning", "clean"),
    "output": ("a cleaning", "clean"),
    "corpus": ("a pretraining run", "pretrain"),
}
"""Section -> the subject of a config with it, and the command that takes it."""


def _check_kind(tree: Mapping[str, Any], config_type: type[Section]) -> None:
    """Raise UserError for the config of another command: with its section, and without the first one of this type."""
    fields = config_type.model_fields
    own = next((section for section in _KINDS if section in fields), None)
    other = next((kind for section, kind in _KINDS.items() if section in tree and section not in fields), None)
    if own is not None and own not in tree and other is not None:
        what, command = other
        raise UserError(f"this is the config of {what}, for `deepcloze {command}`; expected one with '{own}'")
