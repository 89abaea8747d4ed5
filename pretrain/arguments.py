"""The command line of `pretrain/run.py`: --config FILE --section.key=value …

Fire, which dispatches the `deepcloze` commands, would not do: it reads values as Python literals and turns `-` into `_`
inside config keys.
"""

from collections.abc import Sequence

from experiment.config import load_config
from experiment.errors import UserError
from pretrain.config import PretrainConfig


def read_arguments(argv: Sequence[str]) -> PretrainConfig:
    """Load the config that the arguments name, with overrides. Ignores the --local_rank that DeepSpeed's launcher adds.

    Raises UserError.
    """
    arguments: dict[str, str] = {}
    rest = list(argv)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not key.startswith("--"):
            raise UserError(f"unexpected argument '{key}'; write --section.key=value")
        if not equals:
            if not rest:
                raise UserError(f"{key} needs a value: {key}=…")
            value = rest.pop(0)
        arguments[key.removeprefix("--")] = value
    arguments.pop("local_rank", None)  # LOCAL_RANK in the environment is the same
    if "config" not in arguments:
        raise UserError("--config FILE is missing")
    return load_config(PretrainConfig, arguments.pop("config"), arguments)
