import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_examples import TINY
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from experiment.errors import UserError
from pretrain.batching.packing import RowKind
from pretrain.config import ModelConfig
from pretrain.modeling.build import build_model, choose_row_kind
from pretrain.modeling.model_config import resolve_model_config
from pretrain.modeling.random_model import meta_model
from tiny_models import tiny_fields

BERT = ModelConfig(config={"model_type": "bert", **TINY})


def test_the_seed_determines_the_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches ranks that start with different weights, and an ignored seed."""
    config = resolve_model_config(BERT, tokenizer)
    weights = [
        torch.cat([p.flatten() for p in build_model(BERT, config, seed).model.parameters()]) for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_weights_come_from_the_folder(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches random weights in place of the folder's, 16-bit parameters, an ignored override of a field, and modules
    that stay in evaluation mode."""
    settings = ModelConfig(init_from=str(folder), config={"hidden_dropout_prob": 0.3})
    built = build_model(settings, resolve_model_config(settings, tokenizer), seed=9).model
    original = BertForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in original.named_parameters():
        assert torch.equal(built.get_parameter(name), parameter), name
    assert {parameter.dtype for parameter in built.parameters()} == {torch.float32}
    assert all(module.training for module in built.modules())
    assert built.config.hidden_dropout_prob == 0.3
    assert {module.p for name, module in built.named_modules() if name.endswith("output.dropout")} == {0.3}


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({"hidden_act": "relu", "layer_norm_eps": 1e-12}, "hidden_act 'relu' (was 'gelu')"),
        (
            {"hidden_act": "relu", "layer_norm_eps": 1e-5},
            "hidden_act 'relu' (was 'gelu'), layer_norm_eps 1e-05 (was 1e-12)",
        ),
        ({"model_type": "bert", "hidden_dropout_prob": 0.3}, None),
    ],
)
def test_fields_that_change_a_pretrained_model_are_logged(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    fields: dict[str, Any],
    changes: str | None,
) -> None:
    """Catches weights that silently compute something else, and a warning for fields that are meant to change."""
    settings = ModelConfig(init_from=str(folder), config=fields)
    build_model(settings, resolve_model_config(settings, tokenizer), seed=1)
    start = "model.config differs from the config of model.init_from: "
    assert [text for text in caplog.messages if start in text] == ([] if changes is None else [start + changes])


def test_an_untied_decoder_starts_as_a_copy_of_the_embeddings(
    folder: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a random decoder, with a warning that the folder has no head, and one that stays tied."""
    settings = ModelConfig(init_from=str(folder), config={"tie_word_embeddings": False})
    with caplog.at_level(logging.WARNING):
        built = build_model(settings, resolve_model_config(settings, tokenizer), seed=1).model
    assert not caplog.messages
    assert not built.config.tie_word_embeddings
    original = BertForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in original.named_parameters(remove_duplicate=False):
        assert torch.equal(built.get_parameter(name), parameter), name
    assert built.get_output_embeddings().weight is not built.get_input_embeddings().weight


def test_a_decoder_of_its_own_stays_with_tie_word_embeddings_false(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Catches a trained decoder that is replaced by the embeddings, in a folder that is untied already, and one that
    stays untied although the config says that it is tied."""
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=0, tie_word_embeddings=False, **TINY)
    original = BertForMaskedLM(config)
    original.save_pretrained(tmp_path)
    settings = ModelConfig(init_from=str(tmp_path), config={"tie_word_embeddings": False})
    built = build_model(settings, resolve_model_config(settings, tokenizer), seed=1).model
    assert torch.equal(built.get_output_embeddings().weight, original.get_output_embeddings().weight)
    settings = ModelConfig(init_from=str(tmp_path), config={"tie_word_embeddings": True})
    with pytest.raises(UserError, match=r"^model\.config\.tie_word_embeddings: .* weights of its own"):
        build_model(settings, resolve_model_config(settings, tokenizer), seed=1)


@pytest.mark.parametrize(("model_type", "fields"), [("perceiver", {}), ("deberta-v2", {"legacy": False})])
def test_a_head_without_a_decoder_cannot_be_untied(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model_type: str, fields: dict[str, Any]
) -> None:
    """Catches a key that changes nothing, and a traceback for a type that has no output embeddings."""
    settings = ModelConfig(config={"model_type": model_type, **tiny_fields(model_type), **fields})
    build_model(settings, resolve_model_config(settings, tokenizer), seed=1).model.save_pretrained(tmp_path)
    settings = ModelConfig(init_from=str(tmp_path), config={"tie_word_embeddings": True})
    build_model(settings, resolve_model_config(settings, tokenizer), seed=1)
    settings = ModelConfig(init_from=str(tmp_path), config={"tie_word_embeddings": False})
    with pytest.raises(UserError, match=r"^model\.config\.tie_word_embeddings: .* so it stays tied; leave the key out"):
        resolve_model_config(settings, tokenizer)


@pytest.mark.parametrize(
    ("model_type", "prefix", "pooler"),
    [
        ("bert", "bert", True),
        ("xlm-roberta", "roberta", True),
        ("longformer", "longformer", False),
        ("big_bird", "bert", False),
    ],
)
def test_a_folder_without_a_head_gets_a_new_one(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    prefix: str,
    pooler: bool,
) -> None:
    """Catches encoders (such as sentence encoders) rejected for lack of a head, or of a pooler, which BigBird's class
    for masked LM has, and a new head without a warning, or with a bias that is not initialized."""
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **TINY}
    encoder = AutoModel.from_config(AutoConfig.for_model(model_type, **sizes), add_pooling_layer=pooler)
    encoder.save_pretrained(tmp_path / "encoder")
    settings = ModelConfig(init_from=str(tmp_path / "encoder"))
    empty_like = torch.empty_like

    def not_finite(*args: Any, **options: Any) -> torch.Tensor:
        made = empty_like(*args, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty_like", not_finite)
    with caplog.at_level(logging.WARNING):
        built = build_model(settings, resolve_model_config(settings, tokenizer), seed=1).model
    assert "no masked-LM head" in caplog.text
    assert "pooler" not in caplog.text
    assert not any(each.isnan().any() for each in built.parameters())
    assert torch.equal(
        built.get_parameter(f"{prefix}.encoder.layer.1.output.dense.weight"),
        encoder.get_parameter("encoder.layer.1.output.dense.weight"),
    )


@pytest.mark.parametrize(("changed", "tied"), [("bias", True), ("decoder.bias", False), ("bias", False)])
def test_the_bias_of_a_head_and_that_of_its_decoder_are_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, changed: str, tied: bool
) -> None:
    """Catches a folder that is rejected for a bias of the old size, which older versions of transformers left in a
    resized model, and a trained bias that becomes 0 because an untied model has it under one name only."""
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=0, tie_word_embeddings=tied, **TINY)
    before = BertForMaskedLM(config).eval()
    torch.nn.init.normal_(before.get_output_embeddings().bias)
    weights = {name: value.clone() for name, value in before.state_dict().items()}
    weights["cls.predictions.bias"] = weights["cls.predictions.decoder.bias"]
    del weights[f"cls.predictions.{changed}"]
    if changed == "bias":
        weights["cls.predictions.bias"] = torch.randn(20)
    before.save_pretrained(tmp_path, state_dict={name: value.clone() for name, value in weights.items()})
    settings = ModelConfig(init_from=str(tmp_path))
    built = build_model(settings, resolve_model_config(settings, tokenizer), seed=1, new_head=False).model.eval()
    assert caplog.messages == []
    for name in ("cls.predictions.bias", "cls.predictions.decoder.bias"):
        assert torch.equal(built.get_parameter(name), before.get_output_embeddings().bias)


def test_a_part_of_a_head_is_missing(
    folder: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a head that is called absent for lack of one tensor, and a tensor of another shape in it for which
    `model.config` is blamed."""
    model = BertForMaskedLM.from_pretrained(folder)
    weights = {name: value.clone() for name, value in model.state_dict().items() if "decoder" not in name}
    model.save_pretrained(folder, state_dict=weights | {"cls.predictions.transform.dense.bias": torch.zeros(3)})
    settings = ModelConfig(init_from=str(folder))
    config = resolve_model_config(settings, tokenizer)
    built = build_model(settings, config, seed=1).model
    missing = "cls.predictions.transform.dense.bias"
    assert f"{folder} lacks parts of its masked-LM head; new ones are trained ({missing})" in caplog.messages
    name = "cls.predictions.transform.dense.weight"
    assert torch.equal(built.get_parameter(name), model.get_parameter(name))
    with pytest.raises(UserError, match=rf"lacks parts of its masked-LM head: its weights lack {missing}"):
        build_model(settings, config, seed=1, new_head=False)


def test_model_config_is_not_blamed_for_shapes_if_it_is_not_set(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Catches advice about fields that the user has not set."""
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": ', '"intermediate_size": 1'))
    settings = ModelConfig(init_from=str(folder))
    with pytest.raises(
        UserError, match=r"the shape of bert\.encoder\S+ is \[\d+.*\], but the config makes it \[[\d, ]+\]$"
    ):
        build_model(settings, resolve_model_config(settings, tokenizer), seed=1)


def test_the_head_of_a_deberta_release_is_continued(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a random head in place of the pretrained one, and a folder from which transformers loads another head."""
    before = DebertaV2ForMaskedLM(DebertaV2Config(vocab_size=len(tokenizer), pad_token_id=0, legacy=False, **TINY))
    before.save_pretrained(tmp_path / "release")
    path = tmp_path / "release" / "config.json"
    path.write_text(path.read_text().replace('"legacy": false,', ""))
    settings = ModelConfig(init_from=str(tmp_path / "release"))
    with caplog.at_level(logging.WARNING):
        built = build_model(settings, resolve_model_config(settings, tokenizer), seed=1)
    assert not built.packed
    assert [text for text in caplog.messages if "trains padded" not in text] == []
    built.model.save_pretrained(tmp_path / "continued")
    after = DebertaV2ForMaskedLM.from_pretrained(tmp_path / "continued")
    ids = torch.arange(1, 9)[None]
    assert torch.equal(after(ids).logits, before.eval()(ids).logits)


def test_big_bird_says_that_it_computes_full_attention(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a checkpoint whose config has block-sparse attention, with which it was not trained."""
    settings = ModelConfig(config={"model_type": "big_bird", **TINY})
    built = build_model(settings, resolve_model_config(settings, tokenizer), seed=1)
    assert built.model.config.attention_type == built.model.bert.attention_type == "original_full"
    assert "'big_bird' computes full attention: block_sparse is not supported" in caplog.messages


def test_an_unknown_head_is_named(
    folder: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a pretrained head by other names that is left out without a word."""
    model = BertForMaskedLM.from_pretrained(folder)
    model.my_head, model.cls = model.cls, torch.nn.Identity()
    model.save_pretrained(
        folder, state_dict={k: v.clone() for k, v in model.state_dict().items() if "decoder" not in k}
    )
    settings = ModelConfig(init_from=str(folder))
    build_model(settings, resolve_model_config(settings, tokenizer), seed=1)
    (text,) = caplog.messages
    assert text.endswith(
        "cls.predictions.transform.dense.weight); not used: my_head.predictions.bias, "
        "my_head.predictions.transform.LayerNorm.bias, my_head.predictions.transform.LayerNorm.weight, "
        "my_head.predictions.transform.dense.bias …"
    )


def test_weights_that_are_missing_in_the_encoder_are_rejected(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches an encoder in which some layers are silently random."""
    settings = ModelConfig(init_from=str(folder), config={"num_hidden_layers": 3})
    with pytest.raises(UserError, match=r"has no weights for bert\.encoder\.layer\.2"):
        build_model(settings, resolve_model_config(settings, tokenizer), seed=1)


def test_layers_left_out_are_reported(
    folder: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a config that drops layers without a warning, and a warning when all layers are used."""
    for layers, warns in ((2, False), (1, True)):
        settings = ModelConfig(init_from=str(folder), config={"num_hidden_layers": layers})
        build_model(settings, resolve_model_config(settings, tokenizer), seed=1)
        assert ("fewer layers" in caplog.text) == warns


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size"])
def test_a_folder_whose_weights_do_not_fit_the_config_is_rejected(
    folder: Path, tokenizer: PreTrainedTokenizerFast, field: str
) -> None:
    """Catches a traceback from transformers for weights of other shapes."""
    settings = ModelConfig(init_from=str(folder), config={field: 240})
    with pytest.raises(UserError, match=r"model\.init_from: .* the shape of bert\.\S+ is .*, but .* \[240"):
        build_model(settings, resolve_model_config(settings, tokenizer), seed=1)


def test_activation_checkpointing_logs_no_warning(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches transformers' warning about a cache, which encoders do not have."""
    warnings: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda _, message, *__, **___: warnings.append(message))
    settings = BERT.model_copy(update={"activation_checkpointing": True})
    model = build_model(settings, resolve_model_config(BERT, tokenizer), seed=1).model
    model.set_attn_implementation("eager")
    model.train()(input_ids=torch.zeros(1, 4, dtype=torch.long))
    assert warnings == []


@pytest.mark.parametrize("from_folder", [False, True])
def test_building_does_not_change_the_config(
    folder: Path, tokenizer: PreTrainedTokenizerFast, from_folder: bool
) -> None:
    """Catches a checkpoint with another model config than the one the run computes when it resumes, such as
    `use_cache` switched off by activation checkpointing, which makes the run impossible to resume."""
    settings = ModelConfig(init_from=str(folder), max_positions=600) if from_folder else BERT
    settings = settings.model_copy(update={"activation_checkpointing": True})
    config = resolve_model_config(settings, tokenizer)
    before = dict(vars(config))
    meta_model(config)
    built = build_model(settings, config, seed=1)
    assert built.model.config is not config
    assert vars(config) == before
    assert built.model.config.use_cache is False, "the model's own config may differ"


HEADS_OF_32 = BertConfig(hidden_size=128, num_attention_heads=4)
HEADS_OF_26 = BertConfig(hidden_size=312, num_attention_heads=12)


@pytest.mark.parametrize(
    ("packed", "config", "dtype", "capability", "rows"),
    [
        (True, HEADS_OF_32, torch.bfloat16, (9, 0), "flat"),
        (True, DistilBertConfig(dim=128, n_heads=4), torch.float16, (8, 0), "flat"),
        (False, HEADS_OF_32, torch.bfloat16, (9, 0), "padded"),
        (False, HEADS_OF_32, torch.bfloat16, None, "padded"),
        (True, HEADS_OF_32, torch.float32, (9, 0), "packed"),
        (True, HEADS_OF_26, torch.bfloat16, (9, 0), "packed"),
        (True, HEADS_OF_32, torch.float16, (7, 0), "packed"),
        (True, HEADS_OF_32, torch.bfloat16, None, "packed"),
        (True, PreTrainedConfig(), torch.bfloat16, (9, 0), "packed"),
    ],
)
def test_rows_are_flat_only_for_flash_attention(
    monkeypatch: pytest.MonkeyPatch,
    packed: bool,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    rows: RowKind,
) -> None:
    """Catches flat rows for a kernel that compares all slots of a row, whose memory would not suffice, and packed
    ones where flash attention would do. `capability` None: no CUDA device."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: capability is not None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    built: Any = SimpleNamespace(packed=packed, model=SimpleNamespace(config=config))
    assert choose_row_kind(built, dtype) == rows


@pytest.mark.parametrize(("token_dropout", "packed"), [(False, True), (True, False)])
def test_a_model_that_uses_the_share_of_masked_tokens_is_not_packed(
    tokenizer: PreTrainedTokenizerFast, token_dropout: bool, packed: bool
) -> None:
    """Catches a trial without masked tokens, which ESM-2 passes although its packed sequences mix."""
    settings = ModelConfig(
        config={"model_type": "esm", **TINY, "mask_token_id": tokenizer.mask_token_id, "token_dropout": token_dropout}
    )
    assert build_model(settings, resolve_model_config(settings, tokenizer), seed=1).packed == packed


@pytest.mark.parametrize(
    ("model_type", "field"), [("albert", {"num_hidden_groups": 0}), ("bert", {"max_position_embeddings": 5})]
)
def test_a_model_that_cannot_compute(
    tokenizer: PreTrainedTokenizerFast, model_type: str, field: dict[str, int]
) -> None:
    """Catches a traceback for a config of which transformers builds a model."""
    settings = ModelConfig(config={"model_type": model_type, **TINY, **field})
    config = resolve_model_config(settings, tokenizer)
    with pytest.raises(UserError, match=f"the '{model_type}' model cannot compute with its config"):
        build_model(settings, config, seed=1)
