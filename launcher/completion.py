"""Scripts with which shells complete commands, flags, config keys and the names of recipes."""

from collections.abc import Mapping
from typing import Literal

from experiment.config.recipes import all_recipes
from experiment.config.reference import config_reference
from launcher.command_line import Command, flags_of, options_of
from launcher.configs import CONFIGS, config_of_command

_BASH = """\
# deepcloze, bash: deepcloze completion bash > ~/.deepcloze.bash, and in ~/.bashrc: . ~/.deepcloze.bash
_deepcloze() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
    local command="" words="" recipes="" IFS=$'\\n'
    for command in "${{COMP_WORDS[@]:1:$((COMP_CWORD-1))}}"; do [[ $command = -* ]] || break; done
    case "$command" in
        "" | -*) words="{commands} --help --version --quiet" ;;
{cases}
    esac
    # The = in --config=NAME is a word.
    if [ "$word" = "=" ]; then word=""; elif [ "$before" = "=" ]; then before="${{COMP_WORDS[COMP_CWORD-2]}}"; fi
    if [ "$before" = --config ]; then
        COMPREPLY=($(IFS=" "; compgen -W "$recipes" -- "$word"; compgen -f -- "$word"))
        compopt -o filenames 2>/dev/null  # zsh has no compopt
    elif [[ $command != [a-z]* || $word = -* ]]; then
        COMPREPLY=($(IFS=" "; compgen -W "$words" -- "$word"))
        case "${{COMPREPLY[0]}}" in *=) compopt -o nospace 2>/dev/null ;; esac
    fi
}}
complete -o default -F _deepcloze deepcloze
"""

_ZSH = """\
# deepcloze, zsh: deepcloze completion zsh > ~/.deepcloze.zsh, and in ~/.zshrc: . ~/.deepcloze.zsh
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
"""


def completion_script(shell: Literal["bash", "zsh", "fish"], commands: Mapping[str, Command]) -> str:
    return _fish(commands) if shell == "fish" else (_ZSH if shell == "zsh" else "") + _bash(commands)


def _bash(commands: Mapping[str, Command]) -> str:
    cases = [
        f'        {name}) words="{" ".join(_flags(name, command))}" recipes="{" ".join(_recipe_names(name))}" ;;'
        for name, command in commands.items()
    ]
    return _BASH.format(commands=" ".join(commands), cases="\n".join(cases))


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
    """Return the flags of a command, and the config keys that it takes."""
    options = options_of(command)
    flags = [f"--{flag.name}" for flag in flags_of(options).values() if not flag.positional]
    config = config_of_command(name)
    if config is not None and "overrides" in options.model_fields:
        names = dict.fromkeys(key.name for section in config_reference(config) for key in section.keys)
        flags += [f"--{key}=" for key in names if "[" not in key and ".NAME." not in key]
    return [*flags, "--quiet", "--help"]


def _recipe_names(name: str) -> list[str]:
    config = config_of_command(name)
    return [recipe.name for recipe in all_recipes() if name == "sweep" or CONFIGS[recipe.kind] is config]
