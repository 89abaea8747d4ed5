from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_examples import LOCAL_WINDOW, Example
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from pretrain.config import ModelConfig
from pretrain.modeling.build import build_model
from pretrain.modeling.random_model import meta_model
from pretrain.modeling.structure import FlopsModel, flops_model, hidden_matrices, layer_ids
from pretrain.plan.memory import count_parameters
from tiny_models import tiny_fields

HIDDEN, INNER, VOCABULARY = 24, 40, 200
LAYER = 4 * (HIDDEN * HIDDEN + HIDDEN) + 2 * HIDDEN * INNER + INNER + HIDDEN + 4 * HIDDEN  # attention, MLP, two norms
NARROW = 16  # embeddings and decoder of ELECTRA


def known_flops(example: Example) -> FlopsModel:
    return flops_model(example.built.model)


@pytest.mark.parametrize(
    ("model_type", "encoder", "decoder_width"),
    [
        ("bert", 3 * LAYER, HIDDEN),
        ("distilbert", 3 * LAYER, HIDDEN),
        ("electra", 3 * LAYER + NARROW * HIDDEN + HIDDEN, NARROW),
    ],
)
def test_flops_of_a_step(example: Callable[[str], Example], model_type: str, encoder: int, decoder_width: int) -> None:
    """Catches counted parameters that no token is multiplied with, such as embeddings, wrong factors, and a decoder
    counted as wide as the hidden states.

    Two sequences, of 10 and 30 tokens, six of them predicted, by hand: their mean attended length is 25.
    """
    head = (VOCABULARY + HIDDEN) * decoder_width  # per predicted token
    flops = known_flops(example(model_type)).per_step(tokens=40, squared_lengths=10**2 + 30**2, predicted=6)
    assert flops == 40 * (6 * encoder + 12 * HIDDEN * 3 * 25) + 6 * 6 * head


def test_a_local_window_caps_the_attended_length(example: Callable[[str], Example]) -> None:
    """Catches attention FLOPs of whole sequences in ModernBERT's local layers, and a window off by one."""
    model = known_flops(example("modernbert"))
    window = LOCAL_WINDOW + 1  # half on either side, and the token itself
    assert model.windows == (None, window, window, None)
    longer = model.per_step(tokens=50, squared_lengths=50**2, predicted=0)
    assert longer == 50 * (6 * model.encoder_parameters + 12 * HIDDEN * (2 * 50 + 2 * window))
    shorter = model.per_step(tokens=50, squared_lengths=10 * 5**2, predicted=0)
    assert shorter == 50 * (6 * model.encoder_parameters + 12 * HIDDEN * 4 * 5)


def test_parameters_that_longformer_does_not_use() -> None:
    """Catches FLOPs of its global attention, which no token uses, and of attention outside its windows."""
    fields = tiny_fields("longformer") | {"attention_window": [8, 4], "vocab_size": VOCABULARY}
    built = build_model(
        ModelConfig(config={"model_type": "longformer"}), AutoConfig.for_model("longformer", **fields), 0
    )
    hidden, inner = fields["hidden_size"], fields["intermediate_size"]
    layer = 4 * (hidden**2 + hidden) + 2 * hidden * inner + inner + hidden + 4 * hidden
    assert built.flops.encoder_parameters == 2 * layer
    assert built.flops.windows == (9, 5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_layers_that_share_parameters_all_count(groups: int) -> None:
    """Catches ALBERT's speed, planned time and attention's share as if it had a single layer."""
    sizes = {"embedding_size": 16, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 2}
    config = AutoConfig.for_model("albert", num_hidden_layers=4, num_hidden_groups=groups, **sizes)
    model = flops_model(meta_model(config))
    assert model.encoder_parameters == 4 * LAYER + 16 * HIDDEN + HIDDEN


def test_a_table_by_another_name_is_an_embedding() -> None:
    """Catches the speed of EuroBERT, whose tokens are in `embed_tokens`, as if each token were multiplied with them."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 2, "num_key_value_heads": 2}
    ids = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "mask")}
    model = meta_model(AutoConfig.for_model("eurobert", vocab_size=VOCABULARY, num_hidden_layers=3, **sizes, **ids))
    counts, flops = count_parameters(model), flops_model(model)
    assert counts.embeddings == VOCABULARY * HIDDEN
    assert flops.encoder_parameters == counts.encoder == 3 * (4 * HIDDEN**2 + 3 * HIDDEN * INNER + 2 * HIDDEN) + HIDDEN


def test_an_empty_step_has_no_flops(example: Callable[[str], Example]) -> None:
    """Catches a division by zero tokens."""
    assert known_flops(example("bert")).per_step(0, 0, 0) == 0.0


@pytest.mark.parametrize("model_type", ["perceiver", "modernvbert"])
def test_flops_are_unknown_without_hidden_size_and_layers(model_type: str) -> None:
    """Catches a run that stops with an AttributeError because of a figure that is only logged."""
    assert flops_model(meta_model(AutoConfig.for_model(model_type))) is None


def test_a_decoder_of_two_matrices() -> None:
    """Catches half of MobileBERT's decoder that Muon orthogonalizes, or that is not counted."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "embedding_size": NARROW, "num_hidden_layers": 1}
    model = meta_model(AutoConfig.for_model("mobilebert", **sizes))
    flops = flops_model(model)
    assert flops.decoder_width == HIDDEN
    assert "cls.predictions.dense.weight" not in hidden_matrices(model)


def test_a_head_that_multiplies_by_the_embeddings() -> None:
    """Catches DeBERTa's hidden layer taken for its decoder: left to AdamW by Muon, and FLOPs without the decoder."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = meta_model(AutoConfig.for_model("deberta-v2", legacy=False, **sizes))
    flops = flops_model(model)
    assert flops.decoder_width == HIDDEN
    assert "lm_predictions.lm_head.dense.weight" in hidden_matrices(model)


def model_of(model_type: str, **fields: Any) -> PreTrainedModel:
    """On the meta device: names and shapes only."""
    with torch.device("meta"):
        return AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **fields))


@pytest.mark.parametrize(
    ("model_type", "layers", "bottom", "top", "head"),
    [
        ("bert", 12, "embeddings.word_embeddings", "encoder.layer.11.", "cls.predictions.transform"),
        ("roberta", 12, "embeddings.position_embeddings", "encoder.layer.11.", "lm_head.dense"),
        ("electra", 12, "embeddings_project", "encoder.layer.11.", "generator_predictions.dense"),
        ("distilbert", 6, "embeddings.word_embeddings", "transformer.layer.5.", "vocab_transform"),
        ("albert", 1, "embedding_hidden_mapping_in", "albert_layer_groups.0.", "predictions.dense"),
        ("modernbert", 22, "embeddings.tok_embeddings", "layers.21.", "final_norm"),
        ("deberta-v2", 24, "rel_embeddings", "encoder.layer.23.", "cls.predictions.transform"),
        ("mpnet", 12, "relative_attention_bias", "encoder.layer.11.", "lm_head.dense"),
        ("esm", 12, "embeddings.word_embeddings", "encoder.layer.11.", "lm_head.dense"),
        ("mobilebert", 24, "embeddings.embedding_transformation", "encoder.layer.23.ffn.2", "cls.predictions"),
        ("xlm", 12, "position_embeddings", "attentions.11.", "pred_layer.proj"),
        ("xlm", 12, "layer_norm_emb", "layer_norm2.11.", "pred_layer.proj"),
        ("deberta-v2", 24, "deberta.encoder.LayerNorm", "encoder.layer.23.", "cls.predictions.transform"),
        ("deberta-v2", 24, "encoder.conv", "encoder.layer.23.", "cls.predictions.transform"),
        ("xlm-roberta-xl", 36, "embeddings.word_embeddings", "encoder.layer.35.", "roberta.encoder.LayerNorm"),
    ],
)
def test_layers_are_numbered_from_the_embeddings_to_the_head(
    model_type: str, layers: int, bottom: str, top: str, head: str
) -> None:
    """Catches a wrong origin, numbers of modules inside a layer, and a head counted as a layer."""
    shared = {"relative_attention": True, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3}
    fields = shared if "deberta" in model_type else {}
    ids = layer_ids(model_of(model_type, vocab_size=50, pad_token_id=1, mask_token_id=2, **fields))
    assert set(ids.values()) == set(range(layers + 2))
    for part, number in ((bottom, 0), (top, layers), (head, layers + 1)):
        found = {name: layer for name, layer in ids.items() if part in name}
        assert found, f"no parameter of {model_type} has '{part}' in its name"
        tied = {name for name in found if "embeddings" in name and number}
        assert {layer for name, layer in found.items() if name not in tied} == {number}, found


def test_unused_layers_are_not_counted() -> None:
    """Catches a smaller learning rate of all text layers because a vision tower has more."""
    model = model_of("bert", vocab_size=50, num_hidden_layers=6)
    unused = {name for name, _ in model.named_parameters() if any(f".layer.{number}." in name for number in (3, 4, 5))}
    ids = layer_ids(model, unused)
    assert ids["cls.predictions.bias"] == max(ids.values()) == 4


MATRICES = {
    "bert": (6 * 3 + 1, "cls.predictions.transform.dense.weight"),
    "modernbert": (4 * 4 + 1, "model.layers.0.attn.Wqkv.weight"),
    "electra": (6 * 3 + 2, "electra.embeddings_project.weight"),
}


@pytest.mark.parametrize("model_type", MATRICES)
def test_hidden_matrices(example: Callable[[str], Example], model_type: str) -> None:
    """Catches embeddings and decoders that are orthogonalized, and matrices that are not."""
    model = example(model_type).built.model
    found = hidden_matrices(model)
    count, name = MATRICES[model_type]
    assert len(found) == count
    assert name in found
    decoder = model.get_output_embeddings()
    others = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    assert not any(id(model.get_parameter(each)) in others | {id(decoder.weight)} for each in found)


def test_layers_that_share_their_matrices_count_once() -> None:
    """Catches a matrix of ALBERT that is updated once for each layer."""
    config = AutoConfig.for_model("albert", num_hidden_layers=4, hidden_size=24, num_attention_heads=2)
    assert len(hidden_matrices(meta_model(config))) == 6 + 2  # the projection of the embeddings, and the head
