from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from pretrain.modeling.layer_ids import layer_ids


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
    ],
)
def test_layers_are_numbered_from_the_embeddings_to_the_head(
    model_type: str, layers: int, bottom: str, top: str, head: str
) -> None:
    """Catches a wrong origin, numbers of modules inside a layer, and a head counted as a layer."""
    fields = {"relative_attention": True} if "deberta" in model_type else {}
    ids = layer_ids(model_of(model_type, vocab_size=50, pad_token_id=1, mask_token_id=2, **fields))
    assert set(ids.values()) == set(range(layers + 2))
    for part, number in ((bottom, 0), (top, layers), (head, layers + 1)):
        found = {name: layer for name, layer in ids.items() if part in name}
        assert found, f"no parameter of {model_type} has '{part}' in its name"
        tied = {name for name in found if "embeddings" in name and number}
        assert {layer for name, layer in found.items() if name not in tied} == {number}, found
