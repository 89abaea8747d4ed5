"""Models that are built from the config of a Hugging Face folder. Commands: tests/unit/test_damaged_inputs.py."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules import module
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    FunnelConfig,
)

from experiment.errors import UserError
from experiment.models import model_folder
from experiment.models.model_folder import build_from_config, load_model_config, load_weights


def build(config: Any, weights: Path | None = None, auto_model: Any = AutoModelForMaskedLM) -> Any:
    with torch.device("meta"):
        return build_from_config(auto_model, config, "config.json", weights)


@pytest.mark.timeout(60)
def test_layers_by_any_name_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches layers that a config calls otherwise, such as Funnel's blocks, and are built until the memory is full."""
    monkeypatch.setattr(model_folder, "_MAX_TENSORS", 1000)
    with pytest.raises(UserError, match=r"^config\.json: it makes a model of more than 1,000 tensors, such as "):
        build(FunnelConfig(block_sizes=[1, 1], d_model=8, n_head=1, d_head=8, d_inner=8, num_decoder_layers=10**9))
    assert not module._global_parameter_registration_hooks


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("bert", {"hidden_act": "foo"}, "'hidden_act' has the unknown value 'foo'"),
        ("eurobert", {"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, "unknown key or value 'foo'"),
    ],
)
def test_an_unknown_value_is_named(model_type: str, fields: dict[str, Any], message: str) -> None:
    """Catches a message that consists of the value alone, the text of a KeyError."""
    with pytest.raises(UserError) as error:
        build(AutoConfig.for_model(model_type, **fields))
    assert str(error.value) == f"config.json: cannot build a '{model_type}' model from it: {message}"


@pytest.mark.parametrize(
    ("model_type", "auto_model"),
    [("mt5", AutoModelForSequenceClassification), ("bart", AutoModelForMaskedLM), ("bert", AutoModelForMaskedLM)],
)
def test_weights_in_few_bits_are_large_enough(model_type: str, auto_model: Any, tmp_path: Path) -> None:
    """Catches a model in int8 that is rejected: one byte for each parameter, and tied ones only once."""
    config = AutoConfig.for_model(model_type)
    elements = sum(parameter.numel() for parameter in build(config, auto_model=auto_model).parameters())
    with (tmp_path / "model.onnx").open("wb") as file:
        file.truncate(elements)
    build(config, tmp_path, auto_model)
    config.vocab_size *= 20
    with pytest.raises(UserError, match=rf"far larger than its weights: .*{config.vocab_size}.* {elements:,} bytes"):
        build(config, tmp_path, auto_model)


def test_an_onnx_model_is_no_weights(tmp_path: Path) -> None:
    """Catches transformers' message for a folder that `deepcloze export --format onnx` wrote, as `model.init_from`."""
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UserError, match=r"no weights: expected \*\.safetensors .*, found an ONNX model"):
        load_weights(AutoModelForMaskedLM, tmp_path, BertConfig())


SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 30}


@pytest.mark.parametrize("file", ["safetensors", "safetensors index", "bin", "bin before torch 1.6", "bin index"])
@pytest.mark.parametrize("legacy", [False, True])
def test_the_head_of_a_deberta_release_is_loaded(tmp_path: Path, legacy: bool, file: str) -> None:
    """Catches a pretrained masked-LM head that is replaced by a random one because the config does not say which of
    the two heads the weights have."""
    model = DebertaV2ForMaskedLM(DebertaV2Config(**SIZES, legacy=legacy))
    model.save_pretrained(tmp_path, max_shard_size=2000 if file.endswith("index") else "1GB")
    if file.startswith("bin"):
        for path in tmp_path.glob("*.safetensors*"):
            path.unlink()
        name = "pytorch_model-00001-of-00001.bin" if file == "bin index" else "pytorch_model.bin"
        new_format = file != "bin before torch 1.6"
        torch.save(model.state_dict(), tmp_path / name, _use_new_zipfile_serialization=new_format)
        if file == "bin index":
            index = {"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), name)}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = tmp_path / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({name: fields[name] for name in fields.keys() - {"legacy", "architectures"}}))
    loaded, report = load_weights(AutoModelForMaskedLM, tmp_path, load_model_config(tmp_path))
    assert not report["missing_keys"]
    assert torch.equal(loaded(torch.arange(9)[None]).logits, model.eval()(torch.arange(9)[None]).logits)
    assert loaded.config.architectures == (None if legacy else ["DebertaV2ForMaskedLM"])


def test_deberta_v3_has_no_trained_masked_lm_head(tmp_path: Path) -> None:
    """Catches the random masked-LM head of a discriminator of replaced tokens that is taken for a pretrained one."""
    model = DebertaV2ForMaskedLM(DebertaV2Config(**SIZES, legacy=False))
    model.mask_predictions = torch.nn.Linear(8, 1)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({name: fields[name] for name in fields.keys() - {"legacy", "architectures"}})
    )
    config = load_model_config(tmp_path)
    assert config.architectures is None
    _, report = load_weights(AutoModelForMaskedLM, tmp_path, config)
    assert "cls.predictions.bias" in report["missing_keys"]


@pytest.mark.parametrize("model_type", ["big_bird", "bigbird_pegasus"])
def test_a_config_says_what_is_computed(tmp_path: Path, model_type: str) -> None:
    """Catches block-sparse attention in the config of a BigBird that computes full attention, and the names of code
    that is not in the folders that deepcloze writes."""
    auto_map = {"AutoModelForMaskedLM": "modeling_big_bird.BigBirdForMaskedLM"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": auto_map}))
    config = load_model_config(tmp_path)
    assert config.attention_type == "original_full"
    assert "auto_map" not in config.to_dict()


def test_a_config_with_outputs_can_be_saved(tmp_path: Path) -> None:
    """Catches a model whose config asks for attention weights, which trains, but of which no checkpoint is saved."""
    outputs = {"output_attentions": True, "output_hidden_states": True}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **SIZES, **outputs}))
    model = build(load_model_config(tmp_path))
    model.set_attn_implementation("sdpa")
    model.config.save_pretrained(tmp_path)
    assert not outputs.keys() & json.loads((tmp_path / "config.json").read_text()).keys()


def test_weights_that_a_layer_does_not_use_are_rejected(tmp_path: Path) -> None:
    """Catches a model of BERT without the relative positions that it was trained with, which transformers dropped, and
    buffers of older releases that are rejected."""
    config = BertConfig(**SIZES, position_embedding_type="relative_key_query")
    model = build_from_config(AutoModelForMaskedLM, config, "config.json")
    attention = model.bert.encoder.layer[0].attention.self
    attention.inv_freq = torch.nn.Buffer(torch.zeros(4))
    model.bert.encoder.layer.append(torch.nn.Linear(2, 2))  # a layer more than the config has
    model.save_pretrained(tmp_path)
    load_weights(AutoModelForMaskedLM, tmp_path, load_model_config(tmp_path))
    attention.distance_embedding = torch.nn.Embedding(63, 4)
    for prefix, saved in (("bert.", model), ("", model.bert)):
        saved.save_pretrained(tmp_path)
        with pytest.raises(UserError) as error:
            load_weights(AutoModelForMaskedLM, tmp_path, load_model_config(tmp_path))
        assert str(error.value) == (
            f"{tmp_path}: transformers' 'bert' model does not use {prefix}encoder.layer.0.attention.self."
            "distance_embedding.weight: position_embedding_type 'relative_key_query' is not supported"
        )


def test_biases_that_a_layer_does_not_use_are_rejected(tmp_path: Path) -> None:
    """Catches a model that computes something else than it was trained to, because its config leaves its biases out."""
    config = AutoConfig.for_model("modernbert", **SIZES, pad_token_id=0, attention_bias=True)
    build_from_config(AutoModelForMaskedLM, config, "config.json").save_pretrained(tmp_path)
    config.attention_bias = False
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model does not use model\.layers\.0\.attn\.Wo\.bias and 1 more"):
        load_weights(AutoModelForMaskedLM, tmp_path, load_model_config(tmp_path))


def test_threads_load_models_one_after_the_other(tmp_path: Path) -> None:
    """Catches threads that leave transformers without a function that it replaces while it loads: all later models of
    the process then lack the weights of their heads."""
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    build_from_config(AutoModelForMaskedLM, config, "config.json").save_pretrained(tmp_path)

    def missing(_: int) -> int:
        return len(load_weights(AutoModelForMaskedLM, tmp_path, load_model_config(tmp_path))[1]["missing_keys"])

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(missing, range(12))) == {0}
    assert missing(0) == 0


def test_labels_of_parts_are_counted(tmp_path: Path) -> None:
    """Catches labels of the text model in a config for texts and images, which fill the memory too."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "text_config": {"num_labels": 10**9}}))
    with pytest.raises(UserError, match="'num_labels' is 1,000,000,000"):
        load_model_config(tmp_path)
    BertConfig(num_labels=1000).save_pretrained(tmp_path)
    assert load_model_config(tmp_path).num_labels == 1000
