"""Types of config fields: the keys below a key, the value of raw text, and descriptions of types."""

import os
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, Strict
from pydantic.fields import FieldInfo

from experiment.config.yaml_dialect import Loader, read_yaml


@dataclass(frozen=True)
class Metavar:
    """The placeholder for the value of a flag in the help, such as FILE: `config: Annotated[str, Metavar("FILE")]`."""

    name: str
    separator: str = ""  # of several values in one text; the values of a flag that is given again are added with it


@dataclass(frozen=True)
class Positional(Metavar):
    """A flag that is also accepted by position: `deepcloze report RUN`."""


def union_members(annotation: Any) -> list[Any]:
    """Return the members of a union, without constraints; a single type is a union of one."""
    if get_origin(annotation) is Annotated:
        return union_members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in union_members(part)]
    return [annotation]


def is_section(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def accepts(annotation: Any, plain: type) -> bool:
    """Return whether the annotation accepts a value of the YAML type `plain` (str, int, float, bool, list or dict)."""
    return any(kind is Any or _yaml_type(kind) is plain for kind in union_members(annotation))


def annotation_below(annotation: Any, part: str) -> Any:
    """Return the annotation of the field, list item or mapping value called `part`; Any if unknown."""
    for kind in union_members(annotation):
        arguments = get_args(kind)
        if is_section(kind) and part in kind.model_fields:
            return kind.model_fields[part].annotation
        if _yaml_type(kind) is dict and len(arguments) == 2:
            return arguments[1]
        if _yaml_type(kind) is list and arguments and part.isdecimal():
            return arguments[min(int(part), len(arguments) - 1)] if _is_fixed_tuple(kind) else arguments[0]
    return Any


def known_keys(annotation: Any, above: str = "") -> Iterator[str]:
    """Yield the dotted keys of all fields of a section, nested sections included."""
    for section in filter(is_section, union_members(annotation)):
        for name, field in section.model_fields.items():
            yield above + name
            yield from known_keys(field.annotation, f"{above}{name}.")


def parse_value(annotation: Any, raw: str) -> Any:
    """Return the plain value that raw text from a command line stands for, given the type of its field."""
    kinds = union_members(annotation)
    if type(None) in kinds and raw in ("null", "None", ""):
        return None
    try:
        node, value = yaml.compose(raw, Loader=Loader), read_yaml(raw)
        if value is None and str in map(_yaml_type, kinds):  # such as a comment
            return raw
        if isinstance(node, yaml.SequenceNode | yaml.MappingNode):
            if accepts(annotation, type(value)):
                return _value_of_node(node, annotation)
            value = raw
    except (yaml.YAMLError, RecursionError):
        return raw
    if (
        accepts(annotation, list)
        and not accepts(annotation, str)
        and ("," in raw or not _accepts_single_value(annotation))
    ):
        items = raw.split(",") if raw.strip() else []
        return [parse_value(annotation_below(annotation, str(index)), item.strip()) for index, item in enumerate(items)]
    return _value_of_scalar(raw, value, annotation)


def _accepts_single_value(annotation: Any) -> bool:
    """Return whether the annotation accepts a single value as well as a list."""
    return any(_yaml_type(kind) not in (list, dict, type(None)) for kind in union_members(annotation))


def _value_of_node(node: yaml.Node, annotation: Any) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value_of_node(item, annotation_below(annotation, str(index))) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return {
            str(key.value): _value_of_node(value, annotation_below(annotation, str(key.value)))
            for key, value in node.value
        }
    assert isinstance(node, yaml.ScalarNode)
    quoted = node.style in ("'", '"')
    return _value_of_scalar(node.value, node.value if quoted else read_yaml(node.value), annotation)


def _value_of_scalar(text: str, value: Any, annotation: Any) -> Any:
    """Return `text` if the annotation accepts only text, otherwise `value`, which YAML reads it as."""
    fits = any(
        kind is Any
        or (type(value) is kind and kind is not str)
        or (get_origin(kind) is Literal and (type(value), value) in [(type(known), known) for known in get_args(kind)])
        for kind in union_members(annotation)
    )
    return text if not fits and accepts(annotation, str) else value


def _yaml_type(kind: Any) -> Any:
    """Return the YAML type of an annotation: str, int, float, bool, list or dict."""
    origin = get_origin(kind) or kind
    if origin is tuple:
        return list
    if origin is Literal:
        return type(get_args(kind)[0])
    return dict if isinstance(origin, type) and issubclass(origin, Mapping | BaseModel) else origin


def _is_fixed_tuple(kind: Any) -> bool:
    return get_origin(kind) is tuple and Ellipsis not in get_args(kind)


TYPE_NAMES: Mapping[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
}


def describe_type(annotation: Any) -> str:
    """Return the accepted values in words: 'text or a list', "'online', 'offline' or 'disabled'"."""
    names: list[str] = []
    for kind in union_members(annotation):
        if get_origin(kind) is Literal:
            names += [f"'{value}'" if isinstance(value, str) else str(value) for value in get_args(kind)]
        elif _is_fixed_tuple(kind):
            names.append(f"a list of {len(get_args(kind))}")
        elif kind is type(None):
            names.append("null")
        else:
            names.append(TYPE_NAMES.get(_yaml_type(kind), str(kind)))
    return _joined(names)


def _joined(names: list[str]) -> str:
    """Join names: 'a, b or c'."""
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def describe_field(field: FieldInfo) -> str:
    """Describe the type of a field with its limits: 'a whole number > 0 or null'."""
    return _describe_with_limits(field.annotation, field.metadata)


def _describe_with_limits(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    if get_origin(annotation) is Annotated:
        annotation, *inner = get_args(annotation)
        return _describe_with_limits(annotation, [*inner, *metadata])
    if get_origin(annotation) in (Union, types.UnionType):
        return _joined([_describe_with_limits(part) for part in get_args(annotation)])
    if get_origin(annotation) in (list, tuple):
        items = dict.fromkeys(_describe_with_limits(part) for part in get_args(annotation) if part is not Ellipsis)
        count = f"{len(get_args(annotation))} " if _is_fixed_tuple(annotation) else ""
        plural = re.sub("^a (.*?)(number|mapping|list)", r"\1\2s", _joined(list(items)))  # such as 'numbers > 0'
        return f"a list of {count}{plural}"
    return " ".join(filter(None, [describe_type(annotation), _limits(metadata)]))


_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}  # by attribute of pydantic's metadata


def _limits(metadata: Iterable[Any]) -> str:
    """Return the numeric limits in the metadata of a field, such as '>= 0 and < 1'."""
    limits: list[str] = []
    for entry in metadata:
        if isinstance(entry, FieldInfo):
            limits.append(_limits(entry.metadata))
        limits += [f"{sign} {getattr(entry, name):.10g}" for name, sign in _SIGNS.items() if hasattr(entry, name)]
    return " and ".join(filter(None, limits))


def expand_home(path: str) -> str:
    """`path` with ~ as the home folder, which shells do not expand in `--run.dir=~/run` or quotes. Never raises."""
    return os.path.expanduser(path)  # noqa: PTH111


def _check_path(path: str) -> str:
    if "\0" in path:
        raise ValueError("a path cannot contain a NUL character")
    if not path:
        raise ValueError("expected a path, found an empty text; '.' is the working directory")
    variable = None if "://" in path else re.search(r"(?:^|/)(\$(?:\w+|\{\w+\}))[^/]*", path)
    # A Path raises if it is too long.
    if variable is not None and not os.path.exists(expand_home(path[: variable.end()])):  # noqa: PTH110
        raise ValueError(
            f"only a shell replaces {variable[1]} by its value: write the path, or give it on the command line without "
            f"single quotes; found {path}"
        )
    return expand_home(path)


def _check_local(path: str | Path) -> str | Path:
    if "://" in str(path):
        raise ValueError(f"expected a path on a disk, found the URL {path}")
    return path


def _read_separator(value: object) -> object:
    separator = "\t" if value in (r"\t", "tab") else value
    if isinstance(separator, str) and (len(separator) != 1 or separator in '\r\n"'):
        raise ValueError(f"expected one character (\\t is a tab), found {value!r}")
    return separator


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFraction = Annotated[float, Field(gt=0.0, le=1.0)]
SequenceLength = Annotated[int, Field(ge=8)]  # tokens, special tokens included
Count = Annotated[int, Field(gt=0, le=10**9)]  # so that products of two fit in 64 bits
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # torch takes no larger ones
Separator = Annotated[str, BeforeValidator(_read_separator)]  # of CSV files
PathText = Annotated[str, AfterValidator(_check_path)]  # ~ becomes the home folder
PathName = Annotated[  # text will do
    Path,
    Strict(False),
    BeforeValidator(lambda path: _check_path(str(path)) if isinstance(path, str | Path) else path),
    BeforeValidator(_check_local),
]
LocalPath = Annotated[PathText, AfterValidator(_check_local)]
PathOrUrl = Annotated[PathText, BeforeValidator(lambda name: str(name) if isinstance(name, Path) else name)]
