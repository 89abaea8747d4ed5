"""The config files of the commands, told apart by a section that each needs."""

from collections.abc import Mapping
from typing import Any

from experiment.errors import UserError

_KINDS = {
    "corpus": ("a pretraining", "pretrain"),
    "task": ("a task", "finetune"),
    "rows": ("a comparison", "compare"),
}
"""Section -> what a config with it is of, and the command that takes it."""


def check_kind(tree: Mapping[str, Any], section: str) -> None:
    """Raise UserError for the config of another command: without `section`, and with the section of another one."""
    other = next((kind for name, kind in _KINDS.items() if name in tree), None)
    if section not in tree and other is not None:
        what, command = other
        raise UserError(f"this is the config of {what}, for `deepcloze {command}`; expected one with '{section}'")
