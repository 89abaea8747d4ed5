import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_examples import CONFIGS, TINY
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

from experiment.errors import UserError
from experiment.models.transformers_models import max_positions
from pretrain.config import ModelConfig
from pretrain.modeling.build import build_model
from pretrain.modeling.model_config import resolve_model_config
from pretrain.modeling.random_model import meta_model, random_model


def resolve(tokenizer: PreTrainedTokenizerFast, **fields: Any) -> PreTrainedConfig:
    return resolve_model_config(ModelConfig(config={"model_type": "bert", **TINY} | fields), tokenizer)


def test_the_vocabulary_comes_from_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches models with transformers' default vocabulary size of 30,522 and padding id."""
    config = resolve(tokenizer)
    assert config.vocab_size == len(tokenizer)
    assert config.pad_token_id == tokenizer.pad_token_id
    assert resolve(tokenizer, vocab_size=256).vocab_size == 256, "a vocabulary padded for speed is kept"


def visual(**text: Any) -> dict[str, Any]:
    """A model whose vocabulary is that of its text model."""
    vision = {"image_size": 32, "patch_size": 16, **TINY}
    return {"model_type": "modernvbert", "text_config": TINY | text, "vision_config": vision}


def test_the_vocabulary_of_a_text_model_comes_from_the_tokenizer(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Catches ModernVBERT with transformers' default vocabulary, or refused with a traceback in a folder of others."""
    config = resolve_model_config(ModelConfig(config=visual()), tokenizer)
    model = meta_model(config)
    assert model.get_input_embeddings().num_embeddings == model.get_output_embeddings().out_features == len(tokenizer)
    assert config.text_config.pad_token_id == tokenizer.pad_token_id
    assert resolve_model_config(ModelConfig(config=visual(vocab_size=256)), tokenizer).text_config.vocab_size == 256
    config.save_pretrained(tmp_path)
    resolve_model_config(ModelConfig(init_from=str(tmp_path)), tokenizer)
    for fields, message in (
        (visual(vocab_size=100), "vocab_size is 100, but the tokenizer's ids go up to 199"),
        (visual(pad_token_id=3), "pad_token_id is 3"),
        (visual() | {"text_config": "wide"}, "model.config: .*'text_config'"),
    ):
        with pytest.raises(UserError, match=message):
            resolve_model_config(ModelConfig(config=fields), tokenizer)
    with pytest.raises(UserError, match="'num_hidden_layers' is 120,000; expected 1 to 1,000"):
        meta_model(resolve_model_config(ModelConfig(config=visual(num_hidden_layers=120_000)), tokenizer))


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [("eurobert", {}), ("esm", {"token_dropout": True, "position_embedding_type": "rotary"})],
)
def test_special_token_ids_come_from_the_tokenizer(
    tokenizer: PreTrainedTokenizerFast, model_type: str, fields: dict[str, Any]
) -> None:
    """Catches ids of transformers' default tokenizer, which are outside the vocabulary: EuroBERT could not be built."""
    settings = ModelConfig(config={"model_type": model_type, **TINY, **fields})
    config = resolve_model_config(settings, tokenizer)
    for role in ("bos", "eos", "pad", "mask"):
        assert getattr(config, f"{role}_token_id") == getattr(tokenizer, f"{role}_token_id"), role
    build_model(settings, config, seed=1)
    chosen = ModelConfig(config={"model_type": model_type, **TINY, **fields, "mask_token_id": 7})
    assert resolve_model_config(chosen, tokenizer).mask_token_id == 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "brt"}, "unknown model type 'brt'; did you mean 'bert'?"),
        ({"model_type": "llama"}, "'llama' has no masked-LM head"),
        (
            {"hiden_size": 24},
            "'model.config.hiden_size': 'bert' does not use it; did you mean 'hidden_size'?",
        ),
        (
            {"chunk_size_feedforward": 24},
            "bert' does not use it; did you mean 'chunk_size_feed_forward'?",
        ),
        ({"vocab_size": 100}, "vocab_size is 100, but the tokenizer's ids go up to 199"),
        (
            {"model_type": "big_bird", "attention_type": "block_sparse"},
            "model.config.attention_type is 'block_sparse'; expected original_full",
        ),
        ({"model_type": "esm", "vocab_size": None}, "vocab_size is None, but the tokenizer's ids go up to 199"),
        ({"pad_token_id": 3}, "model.config.pad_token_id is 3"),
        ({"hidden_size": "wide"}, "model.config"),
    ],
)
def test_a_config_that_makes_no_model_is_rejected(
    tokenizer: PreTrainedTokenizerFast, fields: dict[str, Any], message: str
) -> None:
    """Catches typos that train another model than intended, and tracebacks from transformers."""
    with pytest.raises(UserError) as error:
        resolve(tokenizer, **fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_sizes_that_do_not_fit_together_are_rejected(tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches a traceback for a config that can be read but makes no model."""
    settings = ModelConfig(config={"model_type": "bert", **TINY, "num_attention_heads": 5})
    with pytest.raises(UserError, match=r"model\.config"):
        meta_model(resolve_model_config(settings, tokenizer))  # before the launch
    with pytest.raises(UserError, match=r"model\.config"):
        build_model(settings, resolve_model_config(settings, tokenizer), seed=1)


@pytest.mark.parametrize(("model_type", "positions"), [("bert", 70), ("roberta", 69), ("distilbert", 70)])
def test_max_positions(tokenizer: PreTrainedTokenizerFast, model_type: str, positions: int) -> None:
    """Catches sequences longer than RoBERTa's position table, whose first rows belong to padding (id 0 here)."""
    config = resolve_model_config(
        ModelConfig(config={"model_type": model_type, "max_position_embeddings": 70}), tokenizer
    )
    assert max_positions(meta_model(config)) == positions


@pytest.mark.parametrize("model_type", ["deberta", "deberta-v2"])
def test_relative_positions_have_no_limit(model_type: str) -> None:
    """Catches DeBERTa limited to 512 tokens although it has no table of positions, or not limited where it has one."""
    fields = TINY | {"relative_attention": True, "max_position_embeddings": 70}
    for learned, positions in ((True, 70), (False, None)):
        config = AutoConfig.for_model(model_type, **fields, position_biased_input=learned)
        assert max_positions(meta_model(config)) == positions
    ids = torch.arange(90)[None]
    assert random_model(config)(input_ids=ids).logits.isfinite().all()


def test_a_folder_with_a_model_of_another_type_is_rejected(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches a model type that is silently ignored, and rejection of the folder's own type."""
    with pytest.raises(UserError, match=r"model_type is 'roberta', but the model in .* is of type 'bert'"):
        resolve_model_config(ModelConfig(init_from=str(folder), config={"model_type": "roberta"}), tokenizer)
    same = ModelConfig(init_from=str(folder), config={"model_type": "bert"})
    assert resolve_model_config(same, tokenizer).model_type == "bert"


def test_a_padding_id_that_is_not_the_tokenizers_is_rejected(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches an override that makes an ordinary token the padding of a pretrained model, and an agreeing one that is
    refused."""
    same = ModelConfig(init_from=str(folder), config={"pad_token_id": tokenizer.pad_token_id})
    resolve_model_config(same, tokenizer)
    with pytest.raises(UserError, match=r"model\.config\.pad_token_id is 3, the tokenizer's padding token is 0"):
        resolve_model_config(ModelConfig(init_from=str(folder), config={"pad_token_id": 3}), tokenizer)


def test_layers_left_out_have_no_types(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Catches a run of ModernBERT that fails at its first checkpoint, because its config has types of more layers."""
    fields = {"model_type": "modernbert", **TINY, "num_hidden_layers": 4}
    resolve_model_config(ModelConfig(config=fields), tokenizer).save_pretrained(tmp_path)
    config = resolve_model_config(ModelConfig(init_from=str(tmp_path), config={"num_hidden_layers": 2}), tokenizer)
    assert len(config.layer_types) == 2
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.config: .*num_hidden_layers` \(3\)"):
        resolve_model_config(ModelConfig(init_from=str(tmp_path), config={"num_hidden_layers": 3}), tokenizer)


def test_a_decoder_is_rejected(tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches a model that trains on both sides of a mask, but predicts from one side where transformers loads it."""
    with pytest.raises(UserError, match=r"set model\.config\.is_decoder to false"):
        resolve(tokenizer, is_decoder=True)


def test_positions_that_depend_on_other_sequences_are_rejected(tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches losses that depend on which sequences are in a microbatch: transformers scales all positions alike."""
    factors = {"long_factor": [4.0] * 4, "short_factor": [1.0] * 4, "original_max_position_embeddings": 16}
    scaled = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    with pytest.raises(UserError, match=r"model\.config\.rope_parameters: with 'longrope'"):
        resolve(tokenizer, model_type="eurobert", num_key_value_heads=2, rope_parameters=scaled)


def test_a_folder_without_a_model_is_rejected(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches an attempt to download a folder's name from the hub, and a traceback for a damaged config.json."""
    with pytest.raises(UserError, match=r"has no config\.json"):
        resolve_model_config(ModelConfig(init_from=str(tmp_path)), tokenizer)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        resolve_model_config(ModelConfig(init_from=str(tmp_path)), tokenizer)


def test_unsupported_activation_checkpointing_is_rejected(tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches a traceback after the launch, and a key without effect."""
    albert = ModelConfig(config={"model_type": "albert", **TINY}, activation_checkpointing=True)
    with pytest.raises(UserError, match=r"model\.activation_checkpointing: .* 'albert'"):
        resolve_model_config(albert, tokenizer)


@pytest.mark.parametrize(
    ("model_type", "field", "value"), [("deberta-v2", "position_buckets", 8), ("bert", "hidden_act", "relu")]
)
def test_fields_of_a_folder(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, model_type: str, field: str, value: Any
) -> None:
    """Catches checks that hold for new models only, rejection of undeclared fields that the model looks up, and keys of
    config.json without effect that can be set in silence."""
    given = CONFIGS[model_type] | {"vocab_size": len(tokenizer), "position_buckets": 16, "made_up": 1}
    AutoConfig.for_model(model_type, **given).save_pretrained(tmp_path)
    config = resolve_model_config(ModelConfig(init_from=str(tmp_path), config={field: value}), tokenizer)
    assert getattr(config, field) == value
    for unknown in ("made_up", "dropot"):
        with pytest.raises(UserError, match=rf"'model\.config\.{unknown}'"):
            resolve_model_config(ModelConfig(init_from=str(tmp_path), config={unknown: 0.1}), tokenizer)


@pytest.mark.parametrize(
    ("field", "instead"), [("global_attn_every_n_layers", "layer_types"), ("global_rope_theta", "rope_parameters")]
)
def test_older_names_of_fields_have_no_effect_on_a_folder(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, field: str, instead: str
) -> None:
    """Catches fields of which only a new config computes others, but which published config.json files have."""
    given = CONFIGS["modernbert"] | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    AutoConfig.for_model("modernbert", **given).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: 3}))
    with pytest.raises(UserError, match=f"config.{field}': 'modernbert' does not .*; set {instead}$"):
        resolve_model_config(ModelConfig(init_from=str(tmp_path), config={field: 1}), tokenizer)
