import pytest
from transformers import AutoConfig, AutoModelForMaskedLM

from pretrain.modeling.packability import ignores_padding
from tiny_models import tiny_fields


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        *[(model_type, True) for model_type in ("bert", "deberta-v2", "mpnet", "perceiver")],
        *[(model_type, False) for model_type in ("convbert", "fnet", "mobilebert")],
    ],
)
def test_models_that_see_padding(model_type: str, expected: bool) -> None:
    """Catches losses that depend on the layout without a warning, and a warning for rounding."""
    fields = tiny_fields(model_type)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **fields, vocab_size=60, pad_token_id=0))
    training = model.training
    assert ignores_padding(model) == expected
    assert model.training == training
