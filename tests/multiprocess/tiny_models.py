"""Tiny models of every type that transformers has for masked LMs."""

import copy
from typing import Any

from transformers import AutoConfig

from experiment.models.config_fields import declared_fields

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
    "mobilebert": {"embedding_size": 24},
    "modernvbert": {"text_config": TEXT | {"model_type": "modernbert"}, "vision_config": VISION},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 2},
    "t5": {"eos_token_id": 3, "decoder_start_token_id": 0, "num_heads": 2, "d_kv": 16, "d_ff": 40},
    "ultravbert": {"text_config": TEXT | {"model_type": "ultrabert"}, "vision_config": VISION},
    "xmod": {"default_language": "en_XX"},
}


def tiny_fields(model_type: str) -> dict[str, Any]:
    """Fields of the config of a tiny model."""
    declared = declared_fields(AutoConfig.for_model(model_type))
    fields = {name: size for name, size in SMALL.items() if name in declared} | FIELDS.get(model_type, {})
    return copy.deepcopy({name: value for name, value in fields.items() if value is not None})
