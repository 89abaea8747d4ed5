import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from experiment.errors import UserError
from experiment.models.transformers_models import check_freeze, has_masked_lm_head, is_in_module


def bert() -> BertForMaskedLM:
    """Of 2 layers, on the meta device: names and shapes only."""
    with torch.device("meta"):
        return BertForMaskedLM(BertConfig(num_hidden_layers=2))


def test_modules_are_whole_consecutive_parts_of_a_name() -> None:
    """Catches `layer.1` that also freezes layer.10 to layer.19."""
    assert is_in_module("bert.encoder.layer.1.output.dense.weight", "layer.1")
    assert not is_in_module("bert.encoder.layer.11.output.dense.weight", "layer.1")
    assert is_in_module("bert.encoder.layer.1.output.dense.weight", "encoder")
    assert not is_in_module("bert.embeddings.word_embeddings.weight", "embedding")


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (("embeddings", "layers.0"), "'layers.0'; did you mean 'layer.0'?"),
        (("layer.7",), "'layer.7'"),
        (("bert", "cls"), "whole model"),
    ],
)
def test_unknown_modules_and_the_whole_model_are_rejected(freeze: tuple[str, ...], message: str) -> None:
    """Catches a typo that silently freezes nothing, and a run that trains nothing."""
    model = bert()
    with pytest.raises(UserError, match=r"^model\.freeze: ") as error:
        check_freeze(freeze, model)
    assert message in str(error.value)
    check_freeze(("embeddings", "layer.0", "bert.encoder.layer.1.output"), model)


def test_a_discriminator_has_no_masked_lm_head() -> None:
    """Catches ELECTRA's head for replaced tokens that is taken for one that predicts tokens."""
    heads = {
        "ElectraForPreTraining": False,
        "FunnelForPreTraining": False,
        "BertForPreTraining": True,
        "BertModel": False,
    }
    assert {name: has_masked_lm_head([name]) for name in heads} == heads
    assert not has_masked_lm_head(None)
    assert not has_masked_lm_head([])
