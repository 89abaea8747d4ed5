"""Parse the command line into typed options, and print the help.

A command is a function of one argument, a `Section` whose fields are the command's flags: name, type, default, checks
and help text (the string literal below the field). Fire, which dispatches the commands, would call a function first and
report an unknown flag afterwards, and would read values as Python literals; so the line is parsed and checked here.

- `--flag value`, `--flag=value`; `-` and `_` are the same in names of flags. A `bool` field is a switch.
- A required field `config` is also accepted by position.
- A field annotated with `Positional` is also accepted by position; one whose type is a tuple, once or more often.
- A field `overrides` collects `--section.key=value`: dotted key -> raw text. A `Metavar` of it says which keys.
"""

import inspect
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from experiment.config import Metavar, Positional, Section, did_you_mean
from experiment.config.field_types import describe_field, is_section, known_keys, union_members
from experiment.config.validation_errors import keys_by_name
from experiment.errors import UserError

_OVERRIDES = "overrides"

ABOUT_FLAGS = (
    "Where `--config` is required, the file alone will do: `deepcloze pretrain my-run.yaml`. With `-q` or `--quiet`, "
    "every command prints results, warnings and errors only. `deepcloze --version` prints the version."
)

_fill = partial(textwrap.fill, break_on_hyphens=False, break_long_words=False)  # names stay whole

_SYNONYMS = {
    "checkpoint": "model",
    "config": "file",
    "gpu": "device",
    "input": "source",
    "model": "checkpoint",
    "num_nodes": "include",
}
"""Flag of another program, or of another command -> ours, where the name of a wrong one is more similar."""

Command = Callable[[Any], None]
"""A function of its options, a subclass of `Section`."""


@dataclass(frozen=True)
class Flag:
    """One flag of a command."""

    name: str
    types: tuple[Any, ...]  # of its values
    positional: bool
    required: bool
    default: Any
    metavar: str  # empty for a switch
    separator: str  # see `Metavar`
    meaning: str
    expected: str  # 'a whole number > 0'

    @property
    def is_switch(self) -> bool:
        return self.types == (bool,)

    @property
    def is_repeated(self) -> bool:
        return len(self.types) == 1 and get_origin(self.types[0]) is tuple

    @property
    def label(self) -> str:
        """The name in messages."""
        return self.metavar if self.positional else f"--{self.name}"


@dataclass(frozen=True)
class CommandDescription:
    """The help of a command."""

    usage: str
    text: str  # paragraphs
    flags: tuple[tuple[str, str], ...]  # as written, meaning
    example: str


def is_help_request(argv: Sequence[str]) -> bool:
    """Return whether the command line is empty or asks for help."""
    return not argv or "--help" in argv or "-h" in argv


def parse_command_line(argv: Sequence[str], commands: Mapping[str, Command]) -> tuple[str, Section]:
    """Return the command's name and its options.

    Raises UserError for an unknown command or flag (suggesting a known one), a stray argument, a flag without its
    value, a missing required flag, and a value of the wrong type or out of range.
    """
    name, command = _find_command(argv, commands)
    options_type = options_of(command)
    try:
        texts, overrides = _split(name, argv[1:], options_type)
        return name, _build_options(options_type, texts, overrides)
    except UserError as error:
        raise UserError(f"{error} (deepcloze {name} --help)") from None


def _find_command(argv: Sequence[str], commands: Mapping[str, Command]) -> tuple[str, Command]:
    """Return the command that a command line begins with. Raises UserError for an unknown one."""
    if (name := argv[0].replace("-", "_")) not in commands:
        raise UserError(f"unknown command '{argv[0]}'{did_you_mean(name, list(commands))} (deepcloze --help)")
    return name, commands[name]


def options_of(command: Command) -> type[Section]:
    """Return the type of a command's only argument."""
    (parameter,) = inspect.signature(command).parameters.values()
    options_type: type[Section] = parameter.annotation
    return options_type


def flags_of(options_type: type[Section]) -> dict[str, Flag]:
    """Return the flags by name, in the order of the fields."""
    flags = {}
    for field_name, field in options_type.model_fields.items():
        name = field.alias or field_name
        types = tuple(kind for kind in union_members(field.annotation) if kind is not type(None))
        metavar = next((entry for entry in field.metadata if isinstance(entry, Metavar)), None)
        if name != _OVERRIDES:
            flags[name] = Flag(
                name=name,
                types=types,
                positional=isinstance(metavar, Positional),
                required=field.is_required(),
                default=field.default,
                metavar=metavar.name if metavar else _default_metavar(types),
                separator=metavar.separator if metavar else "",
                meaning=_one_line(field.description),
                expected=describe_field(field).removesuffix(" or null"),
            )
    return flags


def terminal_width() -> int:
    """Return the number of columns that help and descriptions may take."""
    return min(100, shutil.get_terminal_size().columns)


def help_text(argv: Sequence[str], commands: Mapping[str, Command], about: str, width: int) -> str:
    """Return the overview of all commands, or the help of the command that `argv` begins with. Raises UserError."""
    if not argv or argv[0].startswith("-"):
        return _overview(commands, about, width)
    return _command_help(*_find_command(argv, commands), width)


def _split(
    command: str, arguments: Sequence[str], options_type: type[Section]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return (raw texts by flag, raw text by config key). Of a flag that was given several times, the last text counts,
    unless all do. Raises UserError for a second config."""
    flags = flags_of(options_type)
    # Without --config, its file may come alone. Beside it, an argument is a mistake, such as a grid without quotes.
    alone = "config" if all(argument.partition("=")[0] != "--config" for argument in arguments) else None
    positional = [flag.name for flag in flags.values() if flag.positional or (flag.required and flag.name == alone)]
    texts: dict[str, list[str]] = {}
    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        if not (argument := rest.pop(0)).startswith("--"):
            if not positional or argument.startswith("-"):
                raise UserError(
                    f"unexpected argument '{argument}'; flags are written --name=value, with quotes around a value "
                    "that has spaces or *"
                )
            texts.setdefault(positional[0], []).append(argument)
            if not flags[positional[0]].is_repeated:
                positional.pop(0)
            continue
        written, equals, value = argument[2:].partition("=")
        name = written.replace("-", "_")
        is_plain = name in _plain_keys(command)
        is_override = is_plain or ("." in written and _OVERRIDES in options_type.model_fields)
        if not is_override and name not in flags:
            raise UserError(f"unknown flag '--{written}'{_similar_flags(name, flags, command, options_type)}")
        if not equals and not is_override and flags[name].is_switch:
            value = "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{written} needs a value: --{written}=…")
            value = rest.pop(0)
        if is_override:
            overrides[name if is_plain else written] = value
        elif name in ("config", "file") and name in texts:
            raise UserError(
                f"expected one config, found {texts[name][0]} and {value}; set further keys on the command line"
            )
        else:
            all_count = flags[name].is_repeated or flags[name].separator
            texts[name] = [*texts.get(name, []), value] if all_count else [value]
            positional = [other for other in positional if other != name or flags[other].is_repeated]
    return texts, overrides


def _plain_keys(command: str) -> list[str]:
    """Return the keys without a section in the config of the command, such as `seeds` of a comparison."""
    commands = [name for name in ("compare", "clean") if command in (name, "validate")]
    if not commands:
        return []
    from launcher.configs import CONFIGS  # takes a while to import

    fields = {name: field for one in commands for name, field in CONFIGS[one].model_fields.items()}
    return [name for name, field in fields.items() if not is_section(field.annotation)]


def _similar_flags(name: str, flags: Mapping[str, Flag], command: str, options_type: type[Section]) -> str:
    """Return the config keys that may be meant if the dot is missing, as in --run-dir, or the section, as in --steps;
    else the most similar flag, and how keys are written."""
    synonym = _SYNONYMS.get(name)
    known = did_you_mean(name, [*flags, *_plain_keys(command)], prefix="--")
    suggestion = f"; did you mean '--{synonym}'?" if synonym in flags else known
    if _OVERRIDES not in options_type.model_fields:
        return suggestion
    from launcher.configs import CONFIGS, config_of_command  # takes a while to import

    config = config_of_command(command)
    kinds = [kind for kind, one in CONFIGS.items() if config in (one, None)]
    keys = [key for kind in kinds for key in known_keys(CONFIGS[kind]) if "." in key]
    meant = [key for key in keys if key.replace(".", "_") == name] or keys_by_name(name, keys)
    if meant:
        return "; did you mean " + " or ".join(f"'--{key}'" for key in dict.fromkeys(meant)) + "?"
    lists = f"; `deepcloze config {kinds[0]}` lists them" if len(kinds) == 1 else ""
    about = " Config" if suggestion.endswith("?") else "; config"
    return f"{suggestion}{about} keys are written --section.key=value{lists}"


def _build_options(
    options_type: type[Section], texts: Mapping[str, Sequence[str]], overrides: Mapping[str, str]
) -> Section:
    flags = flags_of(options_type)
    if missing := [_usage(flag) for flag in flags.values() if flag.required and flag.name not in texts]:
        raise UserError(f"missing: {', '.join(missing)}")
    values: dict[str, Any] = {name: _value(flags[name], given) for name, given in texts.items()}
    if _OVERRIDES in options_type.model_fields:
        values[_OVERRIDES] = dict(overrides)
    try:
        return options_type(**values)
    except ValidationError as error:
        messages = [_explain(details, flags, texts) for details in error.errors()]
        raise UserError("\n".join(dict.fromkeys(messages))) from None


def _value(flag: Flag, texts: Sequence[str]) -> Any:
    """Return the value that raw texts stand for; one text itself where it fits none of the flag's types."""
    if flag.is_repeated:
        return tuple(texts)
    if len(texts) > 1 and any(get_origin(kind) is tuple for kind in flag.types):
        return tuple(
            part
            for text in texts  # a file may have the separator in its name
            for part in ([text] if os.path.exists(text) else text.split(flag.separator))  # noqa: PTH110
        )
    text = flag.separator.join(texts)
    for kind in flag.types:
        if kind is int and re.fullmatch(r"-?[0-9]+", text):
            return int(text)
        if kind is float and re.fullmatch(r"[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?", text, re.IGNORECASE):
            return float(text)
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if get_origin(kind) is Literal:
            return next((choice for choice in get_args(kind) if str(choice) == text), text)
    return text


def _explain(details: ErrorDetails, flags: Mapping[str, Flag], texts: Mapping[str, Sequence[str]]) -> str:
    """Return an error that pydantic reports, as a message about a flag."""
    if not details["loc"]:
        return str(details["ctx"]["error"])
    flag = flags[str(details["loc"][0])]
    if details["type"] == "value_error":
        return f"{flag.label}: {details['ctx']['error']}"
    expected = f"nothing, {flag.expected}" if flag.is_switch else flag.expected
    choices = [str(choice) for kind in flag.types if get_origin(kind) is Literal for choice in get_args(kind)]
    found = (flag.separator or " ").join(texts[flag.name])
    close = did_you_mean(found, choices) if choices else ""
    return f"{flag.label}: expected {expected}, found '{found}'{close if 'did you mean' in close else ''}"


def _default_metavar(types: Sequence[Any]) -> str:
    if types == (bool,):
        return ""
    if get_origin(types[0]) is Literal:
        return "|".join(str(choice) for choice in get_args(types[0]))
    return "N" if types[0] in (int, float) else "VALUE"


def _overview(commands: Mapping[str, Command], about: str, width: int) -> str:
    rows = [(name, inspect.cleandoc(command.__doc__ or "").partition("\n")[0]) for name, command in commands.items()]
    return "\n".join(
        [
            *("usage: deepcloze COMMAND [--flag=value …]", "", _filled(about, width), "", "commands:"),
            *table(rows, width),
            *("", _filled("Run `deepcloze COMMAND --help` for the flags of a command and an example.", width)),
            *("", _filled(ABOUT_FLAGS, width)),
        ]
    )


def describe_command(name: str, command: Command) -> CommandDescription:
    """Describe a command, for its help and for the documentation."""
    options_type = options_of(command)
    flags = flags_of(options_type).values()
    usage = [_usage(flag) for flag in flags if flag.required]
    usage += [f"[{_usage(flag)}]" for flag in flags if flag.positional and not flag.required]
    usage += ["[flags]"] if any(not flag.required and not flag.positional for flag in flags) else []
    rows = [(_usage(flag), _meaning(flag)) for flag in sorted(flags, key=lambda flag: not flag.required)]
    if (field := options_type.model_fields.get(_OVERRIDES)) is not None:
        form = f"--{next((entry.name for entry in field.metadata if isinstance(entry, Metavar)), 'section.key=value')}"
        usage.append(f"[{form} …]")
        rows.append((form, _one_line(field.description)))
    text, _, example = inspect.cleandoc(command.__doc__ or "").partition("\n\nExample:\n")
    return CommandDescription(
        " ".join(["deepcloze", name, *usage]), text, tuple(rows), textwrap.dedent(example).strip()
    )


def _command_help(name: str, command: Command, width: int) -> str:
    description = describe_command(name, command)
    return "\n".join(
        [
            *(f"usage: {description.usage}", "", _filled(description.text, width), "", "flags:"),
            *table(description.flags, width),
            *("", "example:", textwrap.indent(description.example, "  ")),
        ]
    )


def _one_line(docstring: str | None) -> str:
    return " ".join((docstring or "").split()).removesuffix(".")


def _usage(flag: Flag) -> str:
    return flag.metavar if flag.positional else f"--{flag.name} {flag.metavar}".strip()


def _meaning(flag: Flag) -> str:
    if flag.required:
        return f"{flag.meaning} (required)"
    if flag.default is None or flag.is_switch:
        return flag.meaning
    default = " ".join(map(str, flag.default)) if isinstance(flag.default, tuple) else flag.default
    return f"{flag.meaning} (default: {default})"


def _filled(text: str, width: int) -> str:
    return "\n\n".join(_fill(" ".join(paragraph.split()), width) for paragraph in text.split("\n\n"))


def table(rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Format two columns; the second one is wrapped."""
    column = max(len(left) for left, _ in rows) + 4
    return [
        _fill(right, max(width, column + 30), initial_indent=f"  {left}".ljust(column), subsequent_indent=" " * column)
        for left, right in rows
    ]
