"""The kinds of tasks: one file each, see `finetune.task_kind`."""

import pkgutil


def kind_names() -> list[str]:
    """Return the names of all kinds, found without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))
