"""Messages about invalid configs: the errors of pydantic, in terms of keys, values and expected values."""

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from experiment.config.field_types import (
    TYPE_NAMES,
    accepts,
    annotation_below,
    describe_type,
    known_keys,
    union_members,
)
from experiment.config.yaml_dialect import KeyPath, explain_yaml, full_width_hint, read_yaml


def explain_errors(config_type: type[BaseModel], error: ValidationError) -> Iterator[tuple[KeyPath, str]]:
    """Yield (key, message) for each problem that the user has to solve."""
    found = _without_other_branches(config_type, error.errors())
    missing = [key for key, details in found if _is_missing(details)]
    for key, details in found:
        if details["type"] == "too_short" and details["input"]:
            continue  # mistakes in its items are errors too
        siblings = [other for other in missing if other[:-1] == key[:-1]] if _is_missing(details) else [key]
        if len(siblings) == 1:
            yield key, _explain(config_type, key, details)
        elif key == siblings[0]:
            names = [f"'{'.'.join(sibling)}'" for sibling in siblings]
            yield key, f"{', '.join(names[:-1])} and {names[-1]} are missing: they have no default"


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return the end of a message about an unknown word: '; did you mean …?', or '; known: …' if none is similar.

    prefix: of the word and all known ones, in the message only.
    """
    known = sorted(set(known))
    if close := difflib.get_close_matches(word, known, n=1, cutoff=0.54):
        return f"; did you mean '{prefix}{close[0]}'?"
    return f"; known: {', '.join(f'{prefix}{name}' for name in known)}"


def keys_by_name(name: str, known: Iterable[str]) -> list[str]:
    """Return the known keys that a key without its section, or in another one, may mean: of the same name."""
    return [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]


def explain_unknown_key(config_type: type[BaseModel], dotted: str, in_lists: Iterable[str] = ()) -> str:
    """Return the message about an unknown key, suggesting one by `keys_by_name`, or with a similar spelling.

    in_lists: names of keys of list items, to suggest too.
    """
    if hint := full_width_hint(dotted.rpartition(".")[2]):
        return f"unknown config key '{dotted}'{hint}"
    known = [*known_keys(config_type), *in_lists]
    above, dot, last = dotted.rpartition(".")
    annotation = reduce(annotation_below, above.split(".") if above else (), config_type)
    siblings = [name for name in known_keys(annotation) if "." not in name]
    peers = [name for name in known if name.count(".") == dotted.count(".")]
    close = (
        difflib.get_close_matches(dotted, keys_by_name(dotted, known), n=1, cutoff=0.0)
        or difflib.get_close_matches(dotted, peers, n=1, cutoff=0.9)
        or [f"{above}{dot}{name}" for name in difflib.get_close_matches(last, siblings, n=1, cutoff=0.7)]
    )
    if close:
        return f"unknown config key '{dotted}'; did you mean '{close[0]}'?"
    return f"unknown config key '{dotted}'; known: {', '.join(sorted(siblings or config_type.model_fields))}"


def describe_value(value: Any) -> str:
    """Return type and value in words: 'a number (1.5)'."""
    if value is None:
        return "null"
    name = "true/false" if isinstance(value, bool) else TYPE_NAMES.get(type(value), type(value).__name__)
    return f"{name} ({json.dumps(value, default=str, ensure_ascii=False)[:80]})"


def _explain(config_type: type[BaseModel], key: KeyPath, details: ErrorDetails) -> str:
    dotted = ".".join(key)
    if details["type"] == "extra_forbidden":
        return explain_unknown_key(config_type, dotted)
    if _is_mismatch(details):
        annotation = reduce(annotation_below, key, config_type)
        quote = str in union_members(annotation) and type(details["input"]) in (int, float)
        hint = ": write it in quotes" if quote else _yaml_problem(details["input"], accepts(annotation, dict))
        return f"'{dotted}': expected {describe_type(annotation)}, found {describe_value(details['input'])}{hint}"
    if _is_missing(details):
        return f"'{dotted}' is missing: it has no default"
    if details["type"] == "json_invalid":  # we have written it: pydantic reads 200 levels, and Unicode only
        is_name = "surrogate" in str(details["ctx"]["error"])
        return "a name is not UTF-8; rename the file or folder" if is_name else "nested too deeply"
    if details["type"] == "value_error":
        message = str(details["ctx"]["error"])
        return f"'{dotted}': {message}" if key else message
    message = details["msg"].removeprefix("Input ")
    return f"'{dotted}': {message[0].lower()}{message[1:]}, found {describe_value(details['input'])}"


def _without_other_branches(
    config_type: type[BaseModel], errors: Sequence[ErrorDetails]
) -> list[tuple[KeyPath, ErrorDetails]]:
    """Return (key, error) for each error of pydantic, except in union branches that the user did not mean.

    For a list with a bad item in `str | list[Source]`, pydantic also reports that the list is not text.
    """
    located = [(*_locate(config_type, details), details) for details in errors]
    unmeant = [_is_mismatch(details) and unions[-1:] == [key] for key, unions, details in located]
    meant = {union for (_, unions, _), skip in zip(located, unmeant, strict=True) if not skip for union in unions}
    return [
        (key, details) for (key, _, details), skip in zip(located, unmeant, strict=True) if not (skip and key in meant)
    ]


def _locate(config_type: type[BaseModel], details: ErrorDetails) -> tuple[KeyPath, list[KeyPath]]:
    """Return the key that an error is about, and those keys on the path to it whose type is a union."""
    location = [str(part) for part in details["loc"][: -1 if _is_short_tuple(details) else None]]
    annotation: Any = config_type
    key: KeyPath = ()
    unions: list[KeyPath] = []
    while location:
        if len([kind for kind in union_members(annotation) if kind is not type(None)]) > 1:
            unions.append(key)
            location.pop(0)  # here pydantic names the branch of the union
            if not location:
                break
        if (part := location.pop(0)) == "[key]" and not location:
            break  # of a mapping: pydantic says that its last key is wrong
        key, annotation = (*key, part), annotation_below(annotation, part)
    return key, unions


def _is_missing(details: ErrorDetails) -> bool:
    return details["type"] == "missing" and not _is_short_tuple(details)


def _is_mismatch(details: ErrorDetails) -> bool:
    """Return whether the value has the wrong type, or number of items, for its field."""
    kind = details["type"]
    is_long_tuple = kind == "too_long" and details["ctx"]["field_type"] == "Tuple"
    return kind.endswith("_type") or kind == "literal_error" or is_long_tuple or _is_short_tuple(details)


def _is_short_tuple(details: ErrorDetails) -> bool:
    return details["type"] == "missing" and isinstance(details["loc"][-1], int)


def _yaml_problem(value: Any, to_mapping: bool) -> str:
    """Return the YAML error, if the value is text that looks like a list or mapping; otherwise how to write it, if that
    is known."""
    if isinstance(value, str) and value.startswith(("[", "{")):
        try:
            read_yaml(value)
        except yaml.YAMLError as error:
            return explain_yaml(error)
    if to_mapping and isinstance(value, str) and ":" in value:  # a shell has removed the braces
        return "; write '{key: value}', with the quotes and a space after the colon"
    return full_width_hint(value) if isinstance(value, str) else ""
