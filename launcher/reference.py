"""Commands and config keys, described for a shell and the docs.

`python -m launcher.reference config > docs/config.md` and `python -m launcher.reference commands > docs/commands.md`
write the pages of the docs.
"""

import sys
import textwrap
from collections.abc import Mapping
from typing import Literal

from experiment.config.reference import as_markdown, config_reference
from experiment.formatting import markdown_table
from experiment.recipes import all_recipes
from launcher.command_line import ABOUT_QUIET, Command, describe_command, flags_of, options_of
from launcher.configs import CONFIGS

Shell = Literal["bash", "zsh", "fish"]

_KEYS_OF = {"plan": "pretrain", "preflight": "pretrain"}  # commands that take the config of another one

_BASH = """\
# deepcloze, bash: deepcloze completion bash > ~/.deepcloze.bash, and in ~/.bashrc: . ~/.deepcloze.bash
_deepcloze() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands} --help --version --quiet"
    elif [ "$before" = --config ]; then
        case "${{COMP_WORDS[1]}}" in
{recipes}
        esac
        COMPREPLY=($(compgen -W "$words" -- "$word") $(compgen -f -- "$word"))
        return
    else
        case "${{COMP_WORDS[1]}}" in
{flags}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    case "${{COMPREPLY[0]}}" in *=) compopt -o nospace ;; esac
}}
complete -o default -F _deepcloze deepcloze
"""

_ZSH = """\
# deepcloze, zsh: deepcloze completion zsh > ~/.deepcloze.zsh, and in ~/.zshrc: . ~/.deepcloze.zsh
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
"""

_CONFIG_HEAD = """\
<!-- Generated from the docstrings of the config fields: python -m launcher.reference config > docs/config.md -->

# Config reference

Every key of a config file, with its type and default. Override any key on the command line as `--section.key=value`.
`deepcloze config pretrain [KEY]`, and the same with `finetune`, `compare` or `clean`, shows all keys, one section or
one key. Keys of list items are written `list[].key`.
"""

_COMMANDS_HEAD = f"""\
<!-- Generated from the docstrings of the commands: python -m launcher.reference commands > docs/commands.md -->

# Commands

All commands, in the order of their use. `deepcloze COMMAND --help` prints the same in the terminal.

Flags are written `--flag value` or `--flag=value`; in their names, `-` and `_` are the same. Commands that take a
config also take any of its keys as `--section.key=value`, see [config.md](config.md). {ABOUT_QUIET}
"""


def completion_script(shell: Shell, commands: Mapping[str, Command]) -> str:
    return _fish(commands) if shell == "fish" else (_ZSH if shell == "zsh" else "") + _bash(commands)


def _bash(commands: Mapping[str, Command]) -> str:
    flags = [f'            {name}) words="{" ".join(_flags(name, command))}" ;;' for name, command in commands.items()]
    recipes = [f'            {name}) words="{" ".join(_recipe_names(name))}" ;;' for name in ("pretrain", "finetune")]
    return _BASH.format(commands=" ".join(commands), flags="\n".join(flags), recipes="\n".join(recipes))


def _fish(commands: Mapping[str, Command]) -> str:
    lines = ["# deepcloze, fish: deepcloze completion fish > ~/.config/fish/completions/deepcloze.fish"]
    for name, command in commands.items():
        summary = (command.__doc__ or "").partition("\n")[0].replace("'", "\\'")
        lines.append(f"complete -c deepcloze -n __fish_use_subcommand -a {name} -d '{summary}'")
        on_command = f"complete -c deepcloze -n '__fish_seen_subcommand_from {name}'"
        lines += [f"{on_command} -a '{flag}'" for flag in _flags(name, command)]
        lines += [f"{on_command} -l config -a '{recipe}'" for recipe in _recipe_names(name)]
    return "\n".join(lines) + "\n"


def _flags(name: str, command: Command) -> list[str]:
    """The flags of a command, and the config keys that it takes."""
    options = options_of(command)
    flags = [f"--{flag.name}" for flag in flags_of(options).values() if not flag.positional]
    keys = CONFIGS.get(_KEYS_OF.get(name, name))
    if keys is not None and "overrides" in options.model_fields:
        names = dict.fromkeys(key.name for section in config_reference(keys) for key in section.keys)
        flags += [f"--{key}=" for key in names if "[" not in key and "<" not in key]
    return [*flags, "--quiet", "--help"]


def _recipe_names(name: str) -> list[str]:
    return [recipe.name for recipe in all_recipes() if recipe.kind == name]


def config_page() -> str:
    """The Markdown of docs/config.md."""
    titles = {"pretrain": "Pretraining", "finetune": "Fine-tuning", "compare": "Comparisons", "clean": "Cleaning"}
    sections = [f"## {titles[kind]}\n\n{as_markdown(config_reference(config))}" for kind, config in CONFIGS.items()]
    return "\n".join([_CONFIG_HEAD, *sections])


def commands_page(commands: Mapping[str, Command]) -> str:
    """The Markdown of docs/commands.md."""
    return "\n".join([_COMMANDS_HEAD, *(_command_section(name, command) for name, command in commands.items())])


def _command_section(name: str, command: Command) -> str:
    found = describe_command(name, command)
    table = markdown_table(["flag", "meaning"], [[_cell(f"`{flag}`"), _cell(meaning)] for flag, meaning in found.flags])
    usage, example = (textwrap.indent(text, "    ") for text in (found.usage, found.example))
    return f"## deepcloze {name}\n\n{usage}\n\n{found.text}\n\n{table}\nExample:\n\n{example}\n"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    from launcher.cli import COMMANDS

    print(config_page() if sys.argv[1] == "config" else commands_page(COMMANDS), end="")
