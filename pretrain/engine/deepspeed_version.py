"""The check of DeepSpeed's version: before modules that import its internals, which other releases may lack."""

import deepspeed
from packaging.specifiers import SpecifierSet

from experiment.errors import UserError

TESTED = ">=0.19.7,<0.20"  # the releases of DeepSpeed that the tests pass with; as in pyproject.toml


def check_version() -> None:
    """Raise UserError unless the installed DeepSpeed is one of the tested releases."""
    if not SpecifierSet(TESTED).contains(deepspeed.__version__, prereleases=True):
        raise UserError(
            f"DeepSpeed {deepspeed.__version__} is installed, but deepcloze uses internals that other releases may "
            f"lack; run pip install 'deepspeed{TESTED}', the releases that it is tested with"
        )
