"""What may change between the attempts of one run, and what may not."""

from collections.abc import Mapping
from typing import Any

from experiment.configuration import flatten
from experiment.errors import UserError

# Whatever determines the stream of batches, the masks or the parameters.
_FIXED = (
    "run.seed",
    "model",
    "batch.sequences",
    "batch.max_seq_length",
    "masking",
    "optimizer.name",
    "corpus.train",
)
# Where a run lies and where it reads from may change; what is read is compared by fingerprint instead.
_BY_CONTENT = ("run.dir", "run.resume", "model.config", "model.init_from", "corpus.train")


def check_resume(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> list[str]:
    """Compare identities (see `identity`). Returns one line for each harmless difference; raises UserError for one that
    would make it another run. `where`: the checkpoint, for the message."""
    old, new = flatten(before), flatten(now)
    harmless = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) == new.get(key):
            continue
        line = f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED):
            raise UserError(
                f"{where} cannot be continued with another {key}: it began with {old.get(key)!r}, the config says "
                f"{new.get(key)!r}. Restore the value, or start a new run in another run.dir"
            )
        harmless.append(line)
    return harmless


def identity(config: Mapping[str, Any], model_config: Mapping[str, Any], corpus_fingerprint: str) -> dict[str, Any]:
    """What a run is: its config, with the model and the training corpus replaced by what they resolve to."""
    plain = {key: value for key, value in flatten(config).items() if not key.startswith(_BY_CONTENT)}
    ignored = ("transformers_version", "_name_or_path", "dtype")
    model = {f"model.{key}": value for key, value in model_config.items() if key not in ignored}
    return plain | model | {"corpus.train": corpus_fingerprint}
