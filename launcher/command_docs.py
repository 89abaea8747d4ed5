"""docs/commands.md, the reference of all commands: `python -m launcher.command_docs > docs/commands.md`."""

import textwrap

from launcher.cli import COMMANDS
from launcher.command_line import describe_command

_HEAD = """\
<!-- Generated from the docstrings of the commands: python -m launcher.command_docs > docs/commands.md -->

# Commands

All commands, in the order of their use. `deepcloze COMMAND --help` prints the same in the terminal.

Flags are written `--flag value` or `--flag=value`; in their names, `-` and `_` are the same. Commands that take a
config also take any of its keys as `--section.key=value`, see [config.md](config.md).
"""


def commands_page() -> str:
    """The Markdown of docs/commands.md."""
    return "\n".join([_HEAD, *(_section(name) for name in COMMANDS)])


def _section(name: str) -> str:
    found = describe_command(name, COMMANDS[name])
    rows = "".join(f"| {_cell(f'`{flag}`')} | {_cell(meaning)} |\n" for flag, meaning in found.flags)
    usage, example = (textwrap.indent(text, "    ") for text in (found.usage, found.example))
    return f"## deepcloze {name}\n\n{usage}\n\n{found.text}\n\n| flag | |\n|---|---|\n{rows}\nExample:\n\n{example}\n"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    print(commands_page(), end="")
