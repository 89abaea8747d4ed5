"""The command line, checked against the commands' signatures before anything runs, and the help they teach it with.

Fire finds a function and calls it, but it reports an unknown flag only after the call, and reads values as Python
literals. So its arguments are put in order here first: every flag known, every value attached to its flag as raw text.
"""

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NewType, TypeVar

import fire.decorators

from experiment.config import nearest
from experiment.errors import UserError

Overrides = NewType("Overrides", dict[str, str])
"""What `--section.key=value` flags said: dotted config key -> raw text. The type of a command's parameter for them."""

Command = Callable[..., None]
CommandT = TypeVar("CommandT", bound=Command)


@dataclass(frozen=True)
class Flag:
    """One parameter of a command, as the command line and its help see it."""

    name: str
    kind: type  # str, int, or bool: a switch
    positional: bool
    required: bool
    default: Any
    placeholder: str
    meaning: str


def command(function: CommandT) -> CommandT:
    """Have Fire hand the function raw text, whole numbers where it says int, and no more."""
    function = fire.decorators.SetParseFn(str)(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.annotation is Overrides:
            function = fire.decorators.SetParseFn(json.loads, name)(function)
        elif _kind(parameter) is not str:
            function = fire.decorators.SetParseFn({int: int, bool: _truth}[_kind(parameter)], name)(function)
    return function


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the command line asks for an explanation rather than for work."""
    return not argv or "--help" in argv or "-h" in argv


def arrange(argv: Sequence[str], commands: Mapping[str, Command]) -> list[str]:
    """The command line as Fire gets it: the command, then a `--flag=value` for each argument.

    Raises UserError for an unknown command or flag (naming the nearest known one), an argument that belongs to no flag,
    a flag without its value, a required one that is missing, and text where a whole number belongs.
    """
    name, function = find_command(argv, commands)
    flags = {flag.name: flag for flag in flags_of(function)}
    free = [flag.name for flag in flags.values() if flag.positional]
    given: dict[str, str] = {}
    overrides: dict[str, str] = {}
    rest = list(argv[1:])
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            if not free or argument.startswith("-"):
                raise UserError(f"unexpected argument '{argument}'; flags are written --name=value{_see_help(name)}")
            given[free.pop(0)] = argument
            continue
        written, equals, value = argument[2:].partition("=")
        key = written.replace("-", "_")
        override = "." in written and _overridable(function)
        if not override and key not in flags:
            raise UserError(f"unknown flag '--{written}'{_nearest_flag(key, flags)}{_see_help(name)}")
        if not override and flags[key].kind is bool:
            given[key] = str(_switch(key, value) if equals else True)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{written} needs a value: --{written}=…{_see_help(name)}")
            value = rest.pop(0)
        if override:
            overrides[written] = value
        else:
            given[key] = _checked(flags[key], value)
            free = [other for other in free if other != key]
    missing = [flag for flag in flags.values() if flag.required and flag.name not in given]
    if missing:
        raise UserError(f"missing: {', '.join(_usage(flag) for flag in missing)}{_see_help(name)}")
    if _overridable(function):
        given[_override_parameter(function)] = json.dumps(overrides)
    return [name, *(f"--{key}={value}" for key, value in given.items())]


def find_command(argv: Sequence[str], commands: Mapping[str, Command]) -> tuple[str, Command]:
    """The command that a command line begins with. Raises UserError where there is no such command."""
    name = argv[0].replace("-", "_")
    if name not in commands:
        raise UserError(f"unknown command '{argv[0]}'{nearest(name, list(commands))}; `deepcloze --help` explains them")
    return name, commands[name]


def flags_of(function: Command) -> list[Flag]:
    """The flags of a command, from its signature and the `Args:` of its docstring."""
    explained = _explained(function)
    return [
        Flag(
            name=name,
            kind=_kind(parameter),
            positional=parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD,
            required=parameter.default is inspect.Parameter.empty,
            default=None if parameter.default is inspect.Parameter.empty else parameter.default,
            placeholder=explained[name][0],
            meaning=explained[name][1],
        )
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation is not Overrides
    ]


def help_text(argv: Sequence[str], commands: Mapping[str, Command], about: str, width: int) -> str:
    """What `--help` prints: the overview, or the page of the command that `argv` begins with. Raises UserError."""
    if not argv or argv[0].startswith("-"):
        return _overview(commands, about, width)
    return _page(*find_command(argv, commands), width)


def _overview(commands: Mapping[str, Command], about: str, width: int) -> str:
    rows = [(name, _description(function).partition("\n")[0]) for name, function in commands.items()]
    return "\n".join(
        [
            *("usage: deepcloze COMMAND [--flag=value …]", "", _filled(about, width), "", "commands:"),
            *_table(rows, width),
            *("", _filled("`deepcloze COMMAND --help` explains one of them, with an example.", width)),
        ]
    )


def _page(name: str, function: Command, width: int) -> str:
    flags = flags_of(function)
    usage = [_usage(flag) for flag in flags if flag.required]
    usage += ["[flags]"] if any(not flag.required for flag in flags) else []
    usage += ["[--section.key=value …]"] if _overridable(function) else []
    rows = [(_usage(flag), _meaning(flag)) for flag in flags]
    if _overridable(function):
        rows.append(("--section.key=value", _explained(function)[_override_parameter(function)][1]))
    return "\n".join(
        [
            *(f"usage: deepcloze {' '.join([name, *usage])}", "", _filled(_description(function), width), "", "flags:"),
            *_table(rows, width),
            *("", "example:", textwrap.indent(_section(function, "Example"), "  ")),
        ]
    )


def _kind(parameter: inspect.Parameter) -> type:
    return next((kind for kind in (bool, int) if parameter.annotation in (kind, kind | None)), str)


def _truth(text: str) -> bool:
    return text == "True"


def _switch(key: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise UserError(f"--{key}: expected nothing, true or false, found '{value}'")
    return value.lower() == "true"


def _checked(flag: Flag, value: str) -> str:
    if flag.kind is int and not re.fullmatch(r"-?[0-9]+", value):
        raise UserError(f"--{flag.name}: expected a whole number, found '{value}'")
    return value


def _override_parameter(function: Command) -> str:
    return next(
        name for name, parameter in inspect.signature(function).parameters.items() if parameter.annotation is Overrides
    )


def _overridable(function: Command) -> bool:
    return any(parameter.annotation is Overrides for parameter in inspect.signature(function).parameters.values())


def _nearest_flag(key: str, flags: Mapping[str, Flag]) -> str:
    return nearest(f"--{key}", [f"--{name}" for name in flags])


def _see_help(name: str) -> str:
    return f" (deepcloze {name} --help)"


def _usage(flag: Flag) -> str:
    if flag.positional:
        return flag.placeholder
    return f"--{flag.name}" if flag.kind is bool else f"--{flag.name} {flag.placeholder}"


def _meaning(flag: Flag) -> str:
    if flag.required:
        return f"{flag.meaning} (required)"
    return flag.meaning if flag.default in (None, False) else f"{flag.meaning} (default: {flag.default})"


def _description(function: Command) -> str:
    return inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:\n")[0]


def _section(function: Command, title: str) -> str:
    """The dedented text below a `Title:` line of the docstring."""
    match = re.search(rf"^{title}:\n((?:    .*\n?|\n)+)", inspect.cleandoc(function.__doc__ or ""), re.MULTILINE)
    assert match is not None, f"{function.__name__}: no '{title}:' in its docstring"
    return textwrap.dedent(match[1]).strip()


def _explained(function: Command) -> dict[str, tuple[str, str]]:
    """{parameter: (placeholder, meaning)} from docstring lines such as `config (FILE): the run`."""
    entries = re.findall(r"^(\w+)(?: \(([^)]*)\))?: (.+(?:\n +.+)*)", _section(function, "Args"), re.MULTILINE)
    return {name: (placeholder, " ".join(meaning.split())) for name, placeholder, meaning in entries}


def _filled(text: str, width: int) -> str:
    return "\n\n".join(textwrap.fill(" ".join(paragraph.split()), width) for paragraph in text.split("\n\n"))


def _table(rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Two columns; the second one wraps below itself."""
    column = max(len(left) for left, _ in rows) + 4
    return [
        textwrap.fill(
            right, max(width, column + 30), initial_indent=f"  {left}".ljust(column), subsequent_indent=" " * column
        )
        for left, right in rows
    ]
