"""Which parameters a model does not use."""

import pytest
from transformers import AutoConfig, AutoModelForMaskedLM

from pretrain.modeling.build import unused_parameters
from pretrain.modeling.packability import why_not_packed
from tiny_models import tiny_fields


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("bert", ()),
        ("modernbert", ()),
        ("longformer", ("query_global", "key_global", "value_global")),
        ("layoutlm", ("pooler",)),
        ("roformer", ("embed_positions",)),
        ("xmod", ("adapter_modules.en_GB.", "adapter_modules.fr_FR.")),
    ],
)
def test_unused_parameters(model_type: str, expected: tuple[str, ...]) -> None:
    """Catches weights that decay though no gradient reaches them, and the reverse."""
    own = {
        "longformer": {"attention_window": 8},
        "xmod": {"languages": ["en_GB", "en", "fr_FR"], "default_language": "en"},
    }
    fields = tiny_fields(model_type) | own.get(model_type, {})
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **fields, vocab_size=40, pad_token_id=0))
    if why_not_packed(model) is not None:
        model.set_attn_implementation("eager")
    found = unused_parameters(model)
    names = {name for name, _ in model.named_parameters()}
    assert found == {name for name in names if any(part in name for part in expected)}
