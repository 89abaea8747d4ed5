import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast

from experiment.errors import UserError
from experiment.tokenizer import load_tokenizer, save_tokenizer, tokenizer_fingerprint
from pretrain.config import ModelConfig
from pretrain.modeling.build import build_model, check_tokenizer, resolve_config, usable_positions

TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}


@pytest.fixture(scope="session")
def tokenizer(wordpiece: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(wordpiece)


def resolve(tokenizer: PreTrainedTokenizerFast, **fields: Any) -> Any:
    return resolve_config(ModelConfig(config={"model_type": "bert", **TINY} | fields), tokenizer)


def test_the_vocabulary_comes_from_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches models with transformers' default vocabulary of 30,522 and its padding id."""
    config = resolve(tokenizer)
    assert config.vocab_size == len(tokenizer)
    assert config.pad_token_id == tokenizer.pad_token_id
    assert resolve(tokenizer, vocab_size=256).vocab_size == 256, "a vocabulary padded for speed is the user's choice"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "brt"}, "unknown model type 'brt'; did you mean 'bert'?"),
        ({"model_type": "llama"}, "'llama' has no masked-LM head"),
        ({"hiden_size": 24}, "'model.config.hiden_size' for 'bert'; did you mean 'hidden_size'?"),
        ({"vocab_size": 100}, "vocab_size is 100, but the tokenizer's ids go up to 199"),
        ({"pad_token_id": 3}, "model.config.pad_token_id is 3"),
        ({"hidden_size": "wide"}, "model.config"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(
    tokenizer: PreTrainedTokenizerFast, fields: dict[str, Any], message: str
) -> None:
    """Catches typos that train another model than the one meant, and traces of transformers'."""
    with pytest.raises(UserError) as refused:
        resolve(tokenizer, **fields)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_sizes_that_do_not_fit_together_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches a trace for a model that can be described but not built."""
    settings = ModelConfig(config={"model_type": "bert", **TINY, "num_attention_heads": 5})
    with pytest.raises(UserError, match=r"model\.config"):
        usable_positions(resolve_config(settings, tokenizer))  # the first that builds it, before the launch
    with pytest.raises(UserError, match=r"model\.config"):
        build_model(settings, resolve_config(settings, tokenizer), seed=1)


@pytest.mark.parametrize(("model_type", "positions"), [("bert", 70), ("roberta", 69), ("distilbert", 70)])
def test_usable_positions(tokenizer: PreTrainedTokenizerFast, model_type: str, positions: int) -> None:
    """Catches sequences that reach past RoBERTa's table, whose first positions are taken by padding (id 0 here)."""
    config = resolve_config(ModelConfig(config={"model_type": model_type, "max_position_embeddings": 70}), tokenizer)
    assert usable_positions(config) == positions


def test_the_seed_decides_the_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches ranks that begin with different weights, and seeds that are ignored."""
    settings = ModelConfig(config={"model_type": "bert", **TINY})
    weights = [
        torch.cat([p.flatten() for p in build_model(settings, resolve(tokenizer), seed).model.parameters()])
        for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Hugging Face folder of a masked-LM BERT in half precision."""
    path = tmp_path / "start"
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **TINY)).to(
        torch.bfloat16
    ).save_pretrained(path)
    save_tokenizer(tokenizer, path)
    return path


def test_training_begins_with_the_weights_of_the_folder(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches fresh weights in place of the folder's, masters in half precision, and a lost override of a field."""
    settings = ModelConfig(init_from=str(folder), config={"hidden_dropout_prob": 0.3})
    built = build_model(settings, resolve_config(settings, tokenizer), seed=9).model
    original = BertForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in original.named_parameters():
        assert torch.equal(built.get_parameter(name), parameter), name
    assert {parameter.dtype for parameter in built.parameters()} == {torch.float32}
    assert built.config.hidden_dropout_prob == 0.3
    assert {module.p for name, module in built.named_modules() if name.endswith("output.dropout")} == {0.3}


def test_a_folder_without_head_gets_a_fresh_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches encoders (sentence encoders, say) that are refused for want of a head, and a head made in silence."""
    encoder = BertModel(BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **TINY))
    encoder.save_pretrained(tmp_path / "encoder")
    settings = ModelConfig(init_from=str(tmp_path / "encoder"))
    with caplog.at_level(logging.WARNING):
        built = build_model(settings, resolve_config(settings, tokenizer), seed=1).model
    assert "no masked-LM head" in caplog.text
    assert torch.equal(
        built.get_parameter("bert.encoder.layer.1.output.dense.weight"),
        encoder.get_parameter("encoder.layer.1.output.dense.weight"),
    )


def test_weights_that_are_missing_in_the_encoder_are_refused(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches training on from an encoder of which some layers are random."""
    settings = ModelConfig(init_from=str(folder), config={"num_hidden_layers": 3})
    with pytest.raises(UserError, match=r"has no weights for bert\.encoder\.layer\.2"):
        build_model(settings, resolve_config(settings, tokenizer), seed=1)


def test_layers_that_are_left_out_are_told(
    folder: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a config that cuts a model in silence, and a warning where all layers are there."""
    for layers, told in ((2, False), (1, True)):
        settings = ModelConfig(init_from=str(folder), config={"num_hidden_layers": layers})
        build_model(settings, resolve_config(settings, tokenizer), seed=1)
        assert ("fewer layers" in caplog.text) == told


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size"])
def test_a_folder_whose_weights_do_not_fit_the_config_is_refused(
    folder: Path, tokenizer: PreTrainedTokenizerFast, field: str
) -> None:
    """Catches a trace of transformers' for weights of other shapes."""
    settings = ModelConfig(init_from=str(folder), config={field: 240})
    with pytest.raises(UserError, match=r"model\.init_from: .* the shape of bert\.\S+ is .*, but .* \[240"):
        build_model(settings, resolve_config(settings, tokenizer), seed=1)


def test_a_folder_with_a_model_of_another_type_is_refused(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches a model type that is ignored in silence; the same one is no change."""
    with pytest.raises(UserError, match=r"model_type is 'roberta', but the model in .* is of type 'bert'"):
        resolve_config(ModelConfig(init_from=str(folder), config={"model_type": "roberta"}), tokenizer)
    same = ModelConfig(init_from=str(folder), config={"model_type": "bert"})
    assert resolve_config(same, tokenizer).model_type == "bert"


def test_a_folder_that_is_none_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches an attempt to download what is meant as a folder, and a trace for a damaged config.json."""
    with pytest.raises(UserError, match=r"has no config\.json"):
        resolve_config(ModelConfig(init_from=str(tmp_path)), tokenizer)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        resolve_config(ModelConfig(init_from=str(tmp_path)), tokenizer)


def test_a_corpus_of_another_tokenizer_is_refused(
    folder: Path, wordpiece: Path, byte_level: Path, tmp_path: Path
) -> None:
    """Catches training on token ids that mean something else to the model, though they fit its vocabulary."""
    settings = ModelConfig(init_from=str(folder))
    check_tokenizer(settings, tokenizer_fingerprint(load_tokenizer(wordpiece)), tmp_path)
    with pytest.raises(UserError, match="another tokenizer"):
        check_tokenizer(settings, tokenizer_fingerprint(load_tokenizer(byte_level)), tmp_path)


@pytest.mark.parametrize(("token_dropout", "packed"), [(False, True), (True, False)])
def test_a_model_that_looks_at_the_share_of_masked_tokens_is_not_packed(
    tokenizer: PreTrainedTokenizerFast, token_dropout: bool, packed: bool
) -> None:
    """Catches a trial of packing without masked tokens, which ESM-2 passes although its sequences mix."""
    settings = ModelConfig(
        config={"model_type": "esm", **TINY, "mask_token_id": tokenizer.mask_token_id, "token_dropout": token_dropout}
    )
    assert build_model(settings, resolve_config(settings, tokenizer), seed=1).packed == packed


@pytest.mark.parametrize(
    ("model_type", "field"), [("deberta-v2", "position_buckets"), ("modernbert", "global_attn_every_n_layers")]
)
def test_fields_that_transformers_reads_without_a_default_are_known(
    tokenizer: PreTrainedTokenizerFast, model_type: str, field: str
) -> None:
    """Catches a refusal of real settings: some fields are looked for by name only, and no default lists them."""
    config = resolve(tokenizer, model_type=model_type, **{field: 2})
    assert getattr(config, field) == 2


def test_activations_that_transformers_cannot_recompute_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches a trace after the devices are taken, and a key that is silently without effect."""
    albert = ModelConfig(config={"model_type": "albert", **TINY}, activation_checkpointing=True)
    with pytest.raises(UserError, match=r"model\.activation_checkpointing: .* 'albert'"):
        resolve_config(albert, tokenizer)


def test_recomputing_activations_warns_of_nothing(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches transformers' advice about a cache, which encoders do not have, on the terminal of every such run."""
    said: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda _, message, *__, **___: said.append(message))
    model = build_model(
        ModelConfig(config={"model_type": "bert", **TINY}, activation_checkpointing=True), resolve(tokenizer), 1
    ).model
    model.set_attn_implementation("eager")
    model.train()(input_ids=torch.zeros(1, 4, dtype=torch.long))
    assert said == []
