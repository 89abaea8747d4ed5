import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from experiment.errors import UserError
from experiment.models.transformers_models import check_freeze, has_masked_lm_head, parameters_in


def meta_model(model_type: str = "bert", layers: int = 2) -> PreTrainedModel:
    """Names and shapes only."""
    with torch.device("meta"):
        return AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, num_hidden_layers=layers))


def test_modules_are_whole_consecutive_parts_of_a_name() -> None:
    """Catches `layer.1` that also freezes layer.10 to layer.19."""
    model = meta_model(layers=12)
    names = [name for name, _ in model.named_parameters()]
    assert parameters_in(["layer.1"], model) == {name for name in names if name.startswith("bert.encoder.layer.1.")}
    assert parameters_in(["encoder"], model) == {name for name in names if name.startswith("bert.encoder.")}
    assert not parameters_in(["embedding"], model)


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "camembert", "jina_embeddings_v3"])
def test_a_tied_decoder_is_in_the_embeddings(model_type: str) -> None:
    """Catches word embeddings that are trained despite model.freeze, in types that name them after the decoder."""
    model = meta_model(model_type)
    table = model.get_input_embeddings().weight
    for modules, expected in ((["embeddings"], True), (["roberta"], True), (["lm_head"], False)):
        found = parameters_in(modules, model)
        assert any(model.get_parameter(name) is table for name in found) == expected
    check_freeze(("word_embeddings",), model)
    with pytest.raises(UserError, match="did you mean 'word_embeddings'"):
        check_freeze(("word_embedding",), model)
    with pytest.raises(UserError, match="whole model"):
        check_freeze(("roberta", "lm_head"), model)


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
    model = meta_model()
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
