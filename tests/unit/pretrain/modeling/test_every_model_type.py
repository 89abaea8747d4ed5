"""Every type that transformers' AutoModelForMaskedLM knows trains."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, PreTrainedTokenizerFast

from experiment.errors import UserError
from pretrain.batching.batch import Microbatch
from pretrain.config import ModelConfig
from pretrain.modeling.build import build_model
from pretrain.modeling.config_fields import declared_fields
from pretrain.modeling.masked_lm import MaskedLanguageModel
from pretrain.modeling.model_config import resolve_model_config
from pretrain.modeling.random_model import meta_model

TYPES = [name for name, config in CONFIG_MAPPING.items() if config in MODEL_FOR_MASKED_LM_MAPPING]
# Sizes by the names that transformers has for them; a type gets those that it declares.
SMALL = (
    dict.fromkeys(("hidden_size", "d_model", "dim", "emb_dim", "embedding_size", "d_latents"), 32)
    | dict.fromkeys(("qk_channels", "v_channels"), 32)
    | dict.fromkeys(("num_hidden_layers", "n_layers", "encoder_layers", "decoder_layers", "num_layers"), 2)
    | dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_key_value_heads"), 2)
    | dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    | dict.fromkeys(("num_self_attention_heads", "num_cross_attention_heads"), 2)
    | dict.fromkeys(("num_self_attends_per_block", "num_blocks"), 1)
    | dict.fromkeys(("head_dim", "d_head", "attention_head_size"), 16)
    | dict.fromkeys(("intermediate_size", "hidden_dim", "feed_forward_size", "d_inner"), 40)
    | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 40)
    | {"max_position_embeddings": 70, "num_latents": 8, "entity_vocab_size": 10, "entity_emb_size": 8}
)
TEXT = {key: SMALL[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
VISION = TEXT | {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 16}
# What a type needs besides; None: not this size.
FIELDS: dict[str, dict[str, Any]] = {
    "funnel": {"num_hidden_layers": None, "num_blocks": None, "block_sizes": [1, 1]},
    "modernvbert": {"text_config": TEXT | {"model_type": "modernbert"}, "vision_config": VISION},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 2},
    "ultravbert": {"text_config": TEXT | {"model_type": "ultrabert"}, "vision_config": VISION},
    "xmod": {"default_language": "en_XX"},
}


def tiny(model_type: str) -> ModelConfig:
    declared = declared_fields(AutoConfig.for_model(model_type))
    fields = {name: size for name, size in SMALL.items() if name in declared} | FIELDS.get(model_type, {})
    given = {name: value for name, value in fields.items() if value is not None}
    return ModelConfig(config={"model_type": model_type, **given})


def microbatch(packed: bool, first_position: int) -> Microbatch:
    """Two rows; with two sequences in the first one, if `packed`."""
    ids = torch.arange(10, 34).view(2, 12)
    segments = torch.tensor([[1] * 5 + [3 if packed else 1] * 4 + [0] * 3, [2] * 12], dtype=torch.int32)
    lengths = [5, 4, 3, 12] if packed else [9, 3, 12]
    positions = torch.cat([torch.arange(length) for length in lengths]).view(2, 12) + first_position
    boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Microbatch(ids, positions, segments, boundaries, torch.tensor([2, 7, 14]), torch.tensor([11, 12, 13]))


@pytest.mark.soak
@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_trains(tokenizer: PreTrainedTokenizerFast, model_type: str) -> None:
    """Catches a type that is accepted and fails in its first step, or learns nothing, also one that a new release of
    transformers brings. What cannot be trained has to be refused by `resolve_model_config`."""
    settings = tiny(model_type)
    built = build_model(settings, resolve_model_config(settings, tokenizer), seed=1)
    assert sum(parameter.numel() for parameter in built.model.parameters()) < 2e7, "not tiny: add its sizes to SMALL"
    module = MaskedLanguageModel(built.model, built.packed)  # in evaluation mode: without dropout
    batch = microbatch(built.packed, built.first_position)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    module.train()
    module(*batch).loss_sum.backward()
    module.eval()
    with torch.no_grad():
        before = module(*batch).loss_sum
        optimizer.step()
        after = module(*batch).loss_sum
    assert torch.isfinite(before)
    assert after < before


@pytest.mark.parametrize(("model_type", "key"), [("xmod", "default_language"), ("reformer", "axial_pos_embds")])
def test_defaults_that_cannot_be_trained_are_refused(
    tokenizer: PreTrainedTokenizerFast, model_type: str, key: str
) -> None:
    """Catches a type whose defaults fail in the first step, with a traceback."""
    with pytest.raises(UserError, match=rf"model\.config\.{key}: .*'{model_type}'.*expected"):
        resolve_model_config(ModelConfig(config={"model_type": model_type}), tokenizer)


def test_too_many_layers_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches a mistyped number of layers, which are built until the memory is full."""
    config = resolve_model_config(ModelConfig(config={"model_type": "bert", "num_hidden_layers": 120_000}), tokenizer)
    with pytest.raises(UserError, match="'num_hidden_layers' is 120,000; expected at most 1,000"):
        meta_model(config)
