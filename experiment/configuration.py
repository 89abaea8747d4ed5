"""YAML file + dotted overrides -> strict typed config.

A config is a tree of `Section`s. Values are checked strictly: text where a number belongs, or a key that no section has,
is refused with a message that names the key, the value and what was expected.
"""

import difflib
import json
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from experiment.errors import UserError


class Section(BaseModel):
    """One part of a config: frozen, strict, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


ConfigT = TypeVar("ConfigT", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML with numbers as people write them: `5e-4` is a float, `2024-01-01` is text, as is anything with an underscore."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.rsplit(":", 1)[1] not in ("timestamp", "float", "int", "bool")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.inf|\.nan)$"
    ),
    list("-+.0123456789"),
)


def read_yaml(text: str) -> Any:
    """The value of one YAML document. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader with fewer resolvers)


def load_config(config_type: type[ConfigT], path: Path | str, overrides: Mapping[str, str] | None = None) -> ConfigT:
    """Read `path` (YAML), apply `overrides` (dotted key -> raw text of the value), return the typed config.

    Raises UserError for a file that is missing or no mapping, an unknown key (naming the nearest known one), and a value
    of the wrong type (naming field, value and what was expected).
    """
    path = Path(path)
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections at the top level, found {_kind(tree)}")
    return build_config(config_type, tree, overrides, origin=str(path))


def build_config(
    config_type: type[ConfigT],
    tree: Mapping[str, Any],
    overrides: Mapping[str, str] | None = None,
    origin: str = "config",
) -> ConfigT:
    """Typed config from a tree of plain values and overrides. `origin` is named in messages. Raises UserError."""
    merged: dict[str, Any] = json.loads(json.dumps(tree))
    for key, raw in (overrides or {}).items():
        _set(merged, key, _parse_override(config_type, key, raw))
    try:
        return config_type.model_validate_json(json.dumps(merged))
    except ValidationError as error:
        raise UserError(
            "\n".join(f"{origin}: {_explain(config_type, problem)}" for problem in error.errors())
        ) from None


def dump_config(config: Section) -> str:
    """The config as YAML, every key written out; `load_config` of it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def flatten(config: Section | Mapping[str, Any]) -> dict[str, Any]:
    """{'section.key': value} of every leaf; lists are leaves."""
    tree = config.model_dump(mode="json") if isinstance(config, Section) else config
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves.update({f"{key}.{below}": leaf for below, leaf in flatten(value).items()})
        else:
            leaves[key] = value
    return leaves


def nearest(word: str, known: Mapping[str, Any] | list[str]) -> str:
    """' (did you mean …?)' for the known word that looks most like `word`, else the list of known ones."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(known))}"


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        below = tree.get(parent)
        if not isinstance(below, dict):
            below = tree[parent] = {}
        tree = below
    tree[last] = value


def _parse_override(config_type: type[Section], key: str, raw: str) -> Any:
    """The plain value that the raw text of an override stands for, read as the type its field has."""
    annotation = _annotation(config_type, key)
    kinds = _members(annotation)
    if raw in ("null", "None") and type(None) in kinds:
        return None
    wants_collection = any((get_origin(kind) or kind) in (list, tuple, dict) or _is_section(kind) for kind in kinds)
    if not wants_collection and any(kind is str or _is_text_literal(kind) for kind in kinds):
        return raw
    try:
        value = read_yaml(raw)
    except yaml.YAMLError:
        return raw
    if (
        isinstance(value, str)
        and any((get_origin(kind) or kind) in (list, tuple) for kind in kinds)
        and str not in kinds
    ):
        items = [item for item in value.split(",") if item]
        return [read_yaml(item) for item in items]
    return value


def _annotation(config_type: type[Section], key: str) -> Any:
    """The type annotation of a dotted key; Any below a free-form mapping. Raises UserError for a key nobody has."""
    current: Any = config_type
    walked: list[str] = []
    for part in key.split("."):
        section = next((kind for kind in _members(current) if _is_section(kind)), None)
        if section is not None:
            if part not in section.model_fields:
                where = ".".join(walked)
                known = {f"{where}.{name}" if where else name: None for name in section.model_fields}
                raise UserError(f"unknown config key '{key}'{nearest('.'.join([*walked, part]), known)}")
            current = section.model_fields[part].annotation
        else:
            mapping = next((kind for kind in _members(current) if (get_origin(kind) or kind) in (dict, Mapping)), None)
            if mapping is None and current is not Any:
                raise UserError(f"unknown config key '{key}': '{'.'.join(walked)}' is a single value")
            current = get_args(mapping)[1] if mapping is not None and get_args(mapping) else Any
        walked.append(part)
    return current


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _is_text_literal(kind: Any) -> bool:
    return "Literal" in str(get_origin(kind)) and all(isinstance(value, str) for value in get_args(kind))


def _kind(value: Any) -> str:
    names = {
        dict: "a mapping",
        list: "a list",
        str: "text",
        bool: "true/false",
        int: "a whole number",
        float: "a number",
    }
    return (
        "nothing"
        if value is None
        else f"{names.get(type(value), type(value).__name__)} ({json.dumps(value, default=str)[:80]})"
    )


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def _explain(config_type: type[Section], problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(part for part in location if not re.search(r"\[|^(?:str|int|float|bool|dict|list)$", part))
    kind = problem["type"]
    if kind == "extra_forbidden":
        try:
            _annotation(config_type, key)
        except UserError as error:
            return str(error)
        return f"unknown config key '{key}'"
    if kind == "missing":
        return f"'{key}' is missing: it has no default"
    if kind in _EXPECTED:
        return f"'{key}': expected {_EXPECTED[kind]}, found {_kind(problem['input'])}"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"'{key}': {message}" if key else message
    message = message[0].lower() + message[1:]
    return f"'{key}': {message}, found {_kind(problem['input'])}"
