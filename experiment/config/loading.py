"""YAML file + dotted overrides -> strict typed config.

A config is a tree of `Section`s. Values are checked strictly: text where a number belongs, or a key that no section
has, is refused with a message that names the line, the key, the value and what was expected.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from experiment.config.fields import NAMES, accepts, below, describe, is_section, known_keys, members, parse_text
from experiment.config.yaml_dialect import Key, explain_yaml, read_yaml, read_yaml_with_lines, write_yaml
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


ConfigT = TypeVar("ConfigT", bound=Section)


def load_config(config_type: type[ConfigT], path: Path | str, overrides: Mapping[str, str] | None = None) -> ConfigT:
    """Read `path` (YAML), apply `overrides` (dotted key -> raw text of the value), return the typed config.

    The raw text is read as the type of its field: a text field takes it as it is, a list takes `[a, b]` and `a,b`, a
    section `{steps: 3}`, which replaces the section. Raises UserError for a file that cannot be read or is no mapping,
    an unknown key (naming the nearest known one), and a value of the wrong type.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        tree, lines = read_yaml_with_lines(text)
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text: {error.reason}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}{explain_yaml(error)}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections at the top level, found {_kind(tree)}")
    return _build(config_type, tree, overrides or {}, str(path), lines)


def build_config(
    config_type: type[ConfigT],
    tree: Mapping[str, Any],
    overrides: Mapping[str, str] | None = None,
    origin: str = "config",
) -> ConfigT:
    """Typed config from a tree of plain values and overrides. `origin` is named in messages. Raises UserError."""
    return _build(config_type, tree, overrides or {}, origin, {})


def dump_config(config: Section) -> str:
    """The config as YAML, every key written out; `load_config` of it gives an equal config."""
    return write_yaml(config.model_dump(mode="json"))


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


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean …?' for the known word that looks most like `word`, else '; known: …' with all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def _build(
    config_type: type[ConfigT],
    tree: Mapping[str, Any],
    overrides: Mapping[str, str],
    origin: str,
    lines: Mapping[Key, int],
) -> ConfigT:
    try:
        merged: dict[str, Any] = json.loads(json.dumps(tree, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError):
        raise UserError(
            f"{origin}: holds something else than mappings, lists, text, numbers, true/false, null"
        ) from None
    # A section as a whole first, whatever the order: a key given besides refines it.
    for dotted in sorted(overrides, key=lambda dotted: dotted.count(".")):
        _set(merged, dotted, parse_text(_annotation(config_type, dotted), overrides[dotted]))
    try:
        return config_type.model_validate_json(json.dumps(merged))
    except ValidationError as error:
        messages = [
            f"{_where(key, origin, lines, overrides)}: {_explain(config_type, key, problem)}"
            for key, problem in _meant_branches(config_type, error.errors())
        ]
        raise UserError("\n".join(dict.fromkeys(messages))) from None


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[last] = value


def _annotation(config_type: type[Section], dotted: str) -> Any:
    """The type annotation of the key of an override. Raises UserError for a key nobody has."""
    annotation: Any = config_type
    parts = dotted.split(".")
    for depth, part in enumerate(parts):
        if not accepts(annotation, dict):
            above = ".".join(parts[:depth])
            raise UserError(f"command line: unknown config key '{dotted}': '{above}' is {describe(annotation)}")
        sections = list(filter(is_section, members(annotation)))
        if sections and not any(part in section.model_fields for section in sections):
            raise UserError(f"command line: {explain_unknown_key(config_type, dotted)}")
        annotation = below(annotation, part)
    return annotation


def _where(key: Key, origin: str, lines: Mapping[Key, int], overrides: Mapping[str, str]) -> str:
    """The place that a message about `key` is about: a line of the file, or the command line."""
    dotted = ".".join(key)
    if any(f"{dotted}.".startswith(f"{override}.") for override in overrides):
        return "command line"
    line = next((lines[key[:depth]] for depth in range(len(key), 0, -1) if key[:depth] in lines), None)
    refined = [f"--{override}" for override in overrides if key and override.startswith(f"{dotted}.")]
    return origin + (f", line {line}" if line else "") + (f", with {' and '.join(refined)}" if refined else "")


def _meant_branches(config_type: type[Section], problems: Sequence[Any]) -> list[tuple[Key, Any]]:
    """(key, problem) of what pydantic reports, without the branches of a union that were not meant.

    Of a list with one bad item it reports for `str | list[Source]` that it is no text as well.
    """
    located = [(*_locate(config_type, problem), problem) for problem in problems]
    unmeant = [_is_mismatch(problem) and unions[-1:] == [key] for key, unions, problem in located]
    meant = {union for (_, unions, _), skip in zip(located, unmeant, strict=True) if not skip for union in unions}
    return [
        (key, problem) for (key, _, problem), skip in zip(located, unmeant, strict=True) if not (skip and key in meant)
    ]


def _locate(config_type: type[Section], problem: Any) -> tuple[Key, list[Key]]:
    """The key that a problem is about, and the keys above it, and itself, whose type is a union."""
    location = [str(part) for part in problem["loc"][: -1 if _is_short_tuple(problem) else None]]
    annotation: Any = config_type
    key: Key = ()
    unions: list[Key] = []
    while location:
        if len([kind for kind in members(annotation) if kind is not type(None)]) > 1:
            unions.append(key)
            location.pop(0)  # pydantic names the branch here
            if not location:
                break
        part = location.pop(0)
        key, annotation = (*key, part), below(annotation, part)
    return key, unions


def _is_mismatch(problem: Any) -> bool:
    """Whether the value is of another type than its field."""
    kind: str = problem["type"]
    return kind.endswith("_type") or kind == "literal_error" or _is_wrong_length(problem)


def _is_wrong_length(problem: Any) -> bool:
    too_long = problem["type"] == "too_long" and problem["ctx"]["field_type"] == "Tuple"
    return too_long or _is_short_tuple(problem)


def _is_short_tuple(problem: Any) -> bool:
    return problem["type"] == "missing" and isinstance(problem["loc"][-1], int)


def _explain(config_type: type[Section], key: Key, problem: Any) -> str:
    dotted = ".".join(key)
    if problem["type"] == "extra_forbidden":
        return explain_unknown_key(config_type, dotted)
    if _is_mismatch(problem):
        annotation: Any = config_type
        for part in key:
            annotation = below(annotation, part)
        quote = str in members(annotation) and isinstance(problem["input"], int | float)
        hint = ": write it in quotes" if quote else _why_no_yaml(problem["input"])
        return f"'{dotted}': expected {describe(annotation)}, found {_kind(problem['input'])}{hint}"
    if problem["type"] == "missing":
        return f"'{dotted}' is missing: it has no default"
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        return f"'{dotted}': {message}" if key else message
    message = problem["msg"].removeprefix("Input ")
    return f"'{dotted}': {message[0].lower()}{message[1:]}, found {_kind(problem['input'])}"


def _why_no_yaml(value: Any) -> str:
    """What keeps text that was meant as a list or mapping from being one."""
    if isinstance(value, str) and value.startswith(("[", "{")):
        try:
            read_yaml(value)
        except yaml.YAMLError as error:
            return explain_yaml(error)
    return ""


def explain_unknown_key(config_type: type[Section], dotted: str) -> str:
    """Message about an unknown key, suggesting one of the same name in another section or with a similar spelling."""
    known = list(known_keys(config_type))
    above, _, last = dotted.rpartition(".")
    namesakes = [name for name in known if name.rpartition(".")[2] == last]
    peers = [name for name in known if name.count(".") == dotted.count(".")]
    close = difflib.get_close_matches(dotted, namesakes, n=1, cutoff=0.0)
    close = close or difflib.get_close_matches(dotted, peers, n=1, cutoff=0.8)
    if close:
        return f"unknown config key '{dotted}'; did you mean '{close[0]}'?"
    annotation: Any = config_type
    for part in above.split(".") if above else ():
        annotation = below(annotation, part)
    siblings = [name for name in known_keys(annotation) if "." not in name]
    return f"unknown config key '{dotted}'{nearest(last, siblings or list(config_type.model_fields))}"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    name = "true/false" if isinstance(value, bool) else NAMES.get(type(value), type(value).__name__)
    return f"{name} ({json.dumps(value, default=str, ensure_ascii=False)[:80]})"
