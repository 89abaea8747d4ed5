import pytest
from transformers import AutoConfig, AutoModelForMaskedLM

from pretrain.modeling.packability import ignores_padding
from tiny_models import tiny_fields


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [("bert", True), ("deberta-v2", True), ("mpnet", True), ("perceiver", True), ("convbert", False), ("fnet", False)],
)
def test_models_that_see_padding(model_type: str, expected: bool) -> None:
    """Catches losses that depend on the layout without a warning, and a warning for rounding."""
    fields = tiny_fields(model_type)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **fields, vocab_size=60, pad_token_id=0))
    training = model.training
    assert ignores_padding(model) == expected
    assert model.training == training
