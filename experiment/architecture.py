"""What a model was made for, from the name of its class in config.json."""

from collections.abc import Sequence

_MASKED_LM = ("ForMaskedLM", "ForPreTraining", "LMHeadModel")


def has_masked_lm_head(architectures: Sequence[str] | None) -> bool:
    """architectures: as in the config of transformers."""
    return any(str(name).endswith(_MASKED_LM) for name in (architectures or ())[:1])
