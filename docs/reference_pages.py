"""Writes docs/config.md and docs/commands.md from the docstrings of config fields, commands and flags.

python docs/reference_pages.py config > docs/config.md
python docs/reference_pages.py commands > docs/commands.md
"""

import itertools
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import PurePath

from experiment.config.reference import REQUIRED, ConfigKey, ConfigSection, config_reference
from experiment.formatting import markdown_table
from launcher.command_line import ABOUT_FLAGS, Command, describe_command
from launcher.commands import COMMANDS
from launcher.configs import CONFIGS

_CONFIG_HEAD = """\
<!-- Generated from the docstrings of the config fields: python docs/reference_pages.py config > docs/config.md -->

# Config reference

Every key of a config file, with its type and default. Override any key on the command line as `--section.key=value`.
`deepcloze config pretrain [KEY]`, and the same with `finetune`, `compare` or `clean`, shows all keys, one section or
one key. Keys of list items are written `list[].key`. Relative paths begin at the working directory, not at
the folder of the config.
"""

_COMMANDS_HEAD = f"""\
<!-- Generated from the docstrings of the commands: python docs/reference_pages.py commands > docs/commands.md -->

# Commands

All commands, in the order of their use. `deepcloze COMMAND --help` prints the same in the terminal.

Flags are written `--flag value` or `--flag=value`; in their names, `-` and `_` are the same. Commands that take a
config also take any of its keys as `--section.key=value`, see [config.md](config.md). {ABOUT_FLAGS}
"""


def config_page() -> str:
    """Return the Markdown of docs/config.md."""
    titles = {"pretrain": "Pretraining", "finetune": "Fine-tuning", "compare": "Comparisons", "clean": "Cleaning"}
    parts = [_CONFIG_HEAD]
    shown: list[ConfigSection] = []
    for kind, config in CONFIGS.items():
        parts.append(f"## {titles[kind]}\n")
        for are_keys, group in itertools.groupby(config_reference(config), key=_is_key):
            sections = list(group)
            if are_keys:
                keys = [key for section in sections for key in section.keys]
                parts.append(f"### Keys without a section\n\n{_table(keys)}")
            else:
                parts += [_section(section, section in shown) for section in sections]
            shown += sections
    return "\n".join(parts)


def _is_key(section: ConfigSection) -> bool:
    """Whether it is a key without a section, such as `seeds`."""
    return [key.name for key in section.keys] == [section.name]


def _section(section: ConfigSection, is_shown: bool) -> str:
    """Return a heading and a table. is_shown: an earlier config has the same section."""
    title = f"`{section.name}`, {section.variant}" if section.variant else f"`{section.name}`"
    if is_shown:
        return f"### {title}\n\nThe same keys as [above](#{section.name}).\n"
    return "\n\n".join(filter(None, [f"### {title}", _linked(section.meaning), _table(section.keys)]))


def _table(keys: Sequence[ConfigKey]) -> str:
    rows = [
        [f"`{key.name}`", key.type, f"`{key.default}`" if key.default != REQUIRED else REQUIRED, _linked(key.meaning)]
        for key in keys
    ]
    return markdown_table(["key", "type", "default", "meaning"], rows)


def _linked(text: str) -> str:
    """Paths of pages as links from docs/config.md."""

    def link(match: re.Match[str]) -> str:
        path = PurePath(match[0])
        return f"[{path.name}]({path.name})" if path.parts[0] == "docs" else f"[{path}](../{path})"

    return re.sub(r"\b[\w/]+\.md\b", link, text)


def commands_page() -> str:
    """Return the Markdown of docs/commands.md."""
    return "\n".join([_COMMANDS_HEAD, *(_command_section(name, command) for name, command in COMMANDS.items())])


def _command_section(name: str, command: Command) -> str:
    found = describe_command(name, command)
    in_pretrain = describe_command("pretrain", COMMANDS["pretrain"]).flags if name != "pretrain" else ()
    own = [[_cell(f"`{flag}`"), _cell(meaning)] for flag, meaning in found.flags if (flag, meaning) not in in_pretrain]
    shared = ", ".join(f"`{flag.split()[0]}`" for flag, meaning in found.flags if (flag, meaning) in in_pretrain)
    table = markdown_table(["flag", "meaning"], own)
    if shared:
        table += f"\nAlso, as in [deepcloze pretrain](#deepcloze-pretrain): {shared}.\n"
    usage, example = (textwrap.indent(text, "    ") for text in (found.usage, found.example))
    return f"## deepcloze {name}\n\n{usage}\n\n{found.text}\n\n{table}\nExample:\n\n{example}\n"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


PAGES = {"config": config_page, "commands": commands_page}

if __name__ == "__main__":
    print(PAGES[sys.argv[1]](), end="")
