"""What a model is, from the files in its Hugging Face folder."""

import math
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

_MASKED_LM = ("ForMaskedLM", "ForPreTraining", "LMHeadModel")


def has_masked_lm_head(architectures: Sequence[str] | None) -> bool:
    """Whether the model predicts masked tokens. architectures: as in the config of transformers."""
    return any(str(name).endswith(_MASKED_LM) for name in (architectures or ())[:1])


def count_parameters(folder: Path) -> int | None:
    """Elements of the tensors in the folder, where tied ones are once; None without safetensors."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total or None
