import pytest
from model_examples import TINY
from transformers import PreTrainedTokenizerFast

from pretrain.config import ModelConfig
from pretrain.modeling.build import build_model
from pretrain.modeling.model_config import resolve_model_config


@pytest.mark.parametrize(("token_dropout", "packed"), [(False, True), (True, False)])
def test_a_model_that_uses_the_share_of_masked_tokens_is_not_packed(
    tokenizer: PreTrainedTokenizerFast, token_dropout: bool, packed: bool
) -> None:
    """Catches a trial without masked tokens, which ESM-2 passes although its packed sequences mix."""
    settings = ModelConfig(
        config={"model_type": "esm", **TINY, "mask_token_id": tokenizer.mask_token_id, "token_dropout": token_dropout}
    )
    assert build_model(settings, resolve_model_config(settings, tokenizer), seed=1).packed == packed
