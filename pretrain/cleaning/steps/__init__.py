"""The steps of a cleaning: one file each, see `pretrain.cleaning.step`."""

import pkgutil


def step_names() -> list[str]:
    """Return the names of all steps, found without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))
