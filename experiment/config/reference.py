"""The reference of config keys, from the docstrings of the fields: `deepcloze config` shows it, and docs/config.md."""

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from experiment.config.field_types import describe_field, is_section, union_members
from experiment.config.loading import Section
from experiment.config.validation_errors import explain_unknown_key
from experiment.errors import UserError

REQUIRED = "required"


@dataclass(frozen=True)
class ConfigKey:
    name: str  # dotted; keys of list items as `schedule.stages[].steps`
    type: str
    default: str  # as YAML, or REQUIRED
    meaning: str


@dataclass(frozen=True)
class ConfigSection:
    """A section and its keys, including the keys of sections in it."""

    name: str
    meaning: str
    keys: tuple[ConfigKey, ...]
    variant: str = ""  # if it has the keys of one variant of the config only


def config_reference(config_type: type[Section]) -> tuple[ConfigSection, ...]:
    """Return all sections of a config, in the order of the fields.

    If the config has variants, a section is followed by the additions and changes of each variant.
    """
    variants = {name: _sections(kind) for name, kind in config_type.variants().items()}
    found: list[ConfigSection] = []
    for place, section in enumerate(_sections(config_type)):
        own = {name: _difference(sections[place], section) for name, sections in variants.items()}
        changed = [{key.name for key in keys} for keys in own.values()]
        shared = tuple(key for key in section.keys if not changed or any(key.name not in names for names in changed))
        found.append(replace(section, keys=shared))
        found += [ConfigSection(section.name, variants[v][place].meaning, keys, v) for v, keys in own.items() if keys]
    return tuple(found)


def _sections(config_type: type[Section]) -> list[ConfigSection]:
    found = []
    for name, field in config_type.model_fields.items():
        if sections := _sections_in(field.annotation):
            found += [ConfigSection(name, _one_line(kind.__doc__), tuple(_keys(kind, f"{name}."))) for kind in sections]
        else:
            found.append(ConfigSection(name, "", tuple(_keys_of_field(config_type, name, ""))))
    return found


def _difference(variant: ConfigSection, section: ConfigSection) -> tuple[ConfigKey, ...]:
    """Return the keys of a variant's section that another section has not, but for the key that names the variant."""
    return tuple(key for key in variant.keys if key not in section.keys and not key.name.endswith(".kind"))


def find_keys(config_type: type[Section], name: str) -> tuple[ConfigSection, ...]:
    """Return the sections called `name`, or the key of that name and those below it; the `[]` of list items may be
    omitted. Raises UserError for an unknown one."""
    reference = config_reference(config_type)
    if named := tuple(section for section in reference if section.name == name):
        return named
    plain = name.replace("[]", "")
    found = []
    for section in reference:
        keys = tuple(key for key in section.keys if f"{key.name}.".replace("[]", "").startswith(f"{plain}."))
        if keys:
            found.append(replace(section, meaning="", keys=keys))
    if not found:
        in_lists = [key.name.replace("[]", "") for section in reference for key in section.keys if "[]" in key.name]
        raise UserError(explain_unknown_key(config_type, name, in_lists))
    return tuple(found)


def as_text(section: ConfigSection, width: int) -> str:
    """Format the keys for a terminal, with meaning, type and default wrapped in a second column."""
    column = max(len(key.name) for key in section.keys) + 2
    title = ", ".join(filter(None, [section.name, section.variant]))
    heading = f"{title}: {section.meaning}" if section.meaning else section.variant and title
    paragraphs = [textwrap.fill(heading, width)] if heading else []
    for key in section.keys:
        default = key.default if key.default == REQUIRED else f"default: {key.default}"
        lines = [
            *textwrap.wrap(key.meaning, max(width - column, 30), break_on_hyphens=False),
            *textwrap.wrap(f"({key.type}; {default})", max(width - column, 30), break_on_hyphens=False),
        ]
        paragraphs.append("\n".join([key.name.ljust(column) + lines[0], *(" " * column + line for line in lines[1:])]))
    return "\n\n".join(paragraphs)


def _keys(section: type[BaseModel], prefix: str) -> Iterator[ConfigKey]:
    for name in section.model_fields:
        yield from _keys_of_field(section, name, prefix)


def _keys_of_field(section: type[BaseModel], name: str, prefix: str) -> Iterator[ConfigKey]:
    """Yield a field and the keys below it; keys of a mapping's values as `rows.NAME.init_from`."""
    field = section.model_fields[name]
    if is_section(field.annotation):
        yield from _keys(field.annotation, f"{prefix}{name}.")
        return
    yield ConfigKey(prefix + name, describe_field(field), _default(field), find_meaning(section, name))
    for optional in _sections_in(field.annotation):
        yield from _keys(optional, f"{prefix}{name}.")
    for container in union_members(field.annotation):
        below = f"{name}[]." if get_origin(container) in (list, tuple) else f"{name}.NAME."
        for item in [section for part in get_args(container) for section in _sections_in(part)]:
            yield from _keys(item, prefix + below)


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    return [kind for kind in union_members(annotation) if is_section(kind)]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return REQUIRED
    value = field.get_default(call_default_factory=True)
    return value if isinstance(value, str) else json.dumps(value)


def find_meaning(section: type[BaseModel], name: str) -> str:
    """Return the docstring of a field, perhaps of a base class, or of the section that it holds."""
    fields = [kind.model_fields[name] for kind in section.__mro__ if is_section(kind) and name in kind.model_fields]
    found = next((_one_line(field.description) for field in fields if field.description), "")
    annotation = section.model_fields[name].annotation
    return found or (_one_line(annotation.__doc__) if is_section(annotation) else "")


def _one_line(docstring: str | None) -> str:
    return " ".join((docstring or "").split())
