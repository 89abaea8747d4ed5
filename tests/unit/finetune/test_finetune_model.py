import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertweetTokenizer,
    LukeTokenizer,
    PhobertTokenizer,
    RobertaConfig,
    RobertaForMaskedLM,
    RoCBertTokenizer,
    RoFormerConfig,
    RoFormerForMaskedLM,
)
from transformers.utils import logging

from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer
from finetune.kinds import multi_label, question_answering
from finetune.kinds.classification import Config, Kind
from finetune.model import ModelSpec, build_model, describe_model, model_files, pooling_of_head, read_model_inputs
from tiny_models import tiny_fields

AUTO = "AutoModelForSequenceClassification"


def start(folder: Path, pretrained: bool = True, labels: tuple[str, ...] = ("a", "b", "c")) -> ModelSpec:
    return ModelSpec(folder, pretrained, AUTO, Kind(Config(train="f", validation="f"), labels).head)


@pytest.fixture
def copied(encoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoder, tmp_path / "copy"))


def test_pretrained_weights_arrive_and_only_the_head_is_new(encoder: Path) -> None:
    """Catches an encoder silently left at random values, the most common reason for bad scores."""
    built = build_model(start(encoder))
    model, fresh = built.model, built.new
    word = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(model.state_dict()[word], load_file(encoder / "model.safetensors")[word])
    assert all("classifier" in name or "pooler" in name for name in fresh)
    assert "classifier.weight" in fresh
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.dtype == torch.float32


def test_random_weights_are_the_same_architecture_with_none_of_the_values(encoder: Path) -> None:
    """Catches a comparison of pretrained with random in which both are pretrained, or differ in shape."""
    pretrained = build_model(start(encoder)).model
    random = build_model(start(encoder, pretrained=False)).model
    assert {n: p.shape for n, p in random.named_parameters()} == {n: p.shape for n, p in pretrained.named_parameters()}
    matrices = [name for name, parameter in random.named_parameters() if parameter.ndim == 2 and "bert.e" in name]
    assert matrices
    for name in matrices:
        ours, theirs = random.state_dict()[name], pretrained.state_dict()[name]
        assert not torch.isclose(ours, theirs).float().mean() > 0.5


@pytest.mark.parametrize(
    ("model_type", "pooling", "expected"),
    [("modernbert", "mean", "mean"), ("modernbert", "cls", "cls"), ("eurobert", "cls", "bos")],
)
def test_the_head_pools_as_the_config_says(tmp_path: Path, model_type: str, pooling: Any, expected: str) -> None:
    """Catches a setting without effect, and a name of transformers' that its model does not know."""
    sizes = {
        "vocab_size": 20,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    special = {f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos", "cls", "sep", "mask"))}
    other = {"modernbert": {"mean": "cls", "cls": "mean"}[pooling], "eurobert": "late"}[model_type]
    config = AutoConfig.for_model(model_type, **sizes, **special, classifier_pooling=other)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    head = start(tmp_path).head
    model = build_model(
        ModelSpec(tmp_path, True, AUTO, {**head, **pooling_of_head(tmp_path, AUTO, pooling)})
    ).model.eval()
    assert model.config.classifier_pooling == expected
    inputs = torch.tensor([[3, 10, 11, 12, 4]])
    with torch.no_grad():
        found = model(inputs).logits
        model.config.classifier_pooling = model.classifier_pooling = other
        assert not torch.allclose(found, model(inputs).logits)


def test_a_head_without_a_choice_of_pooling(encoder: Path) -> None:
    """Catches a setting that is accepted and ignored."""
    assert pooling_of_head(encoder, AUTO, "default") == {}
    for auto_model in (AUTO, "AutoModelForTokenClassification", "AutoModel"):
        with pytest.raises(UserError, match=r"^model\.pooling: 'mean': bert models have no choice of pooling"):
            pooling_of_head(encoder, auto_model, "mean")


@pytest.mark.parametrize("pretrained", [True, False])
def test_fields_of_the_config_are_changed(encoder: Path, tmp_path: Path, pretrained: bool) -> None:
    """Catches dropout that is always that of pretraining, and a model folder that does not say what it was."""
    fields = {"hidden_dropout_prob": 0.0, "classifier_dropout": 0.3}
    model = build_model(replace(start(encoder, pretrained), fields=fields)).model
    assert (model.bert.embeddings.dropout.p, model.dropout.p) == (0.0, 0.3)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).hidden_dropout_prob == 0.0


def test_the_seed_decides_the_head(encoder: Path) -> None:
    """Catches heads that do not follow the seed, which makes runs with one seed differ."""
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(build_model(start(encoder)).model.classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_classifier_for_other_labels_gets_a_new_head(encoder: Path, tmp_path: Path) -> None:
    """Catches a failure to start from another task's model because its head has another size."""
    AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=5).save_pretrained(tmp_path)
    built = build_model(start(tmp_path))
    assert built.new == ("classifier.bias", "classifier.weight")
    assert built.model.classifier.out_features == 3


@pytest.mark.parametrize(
    ("labels", "kept"), [(("a", "b", "c"), True), (("a", "c", "b"), False), (("x", "y", "z"), False)]
)
def test_a_head_is_kept_only_for_the_same_labels(
    encoder: Path, tmp_path: Path, labels: tuple[str, ...], kept: bool
) -> None:
    """Catches a head that keeps its weights under other names: what it calls the first label means something else."""
    trained = build_model(start(encoder)).model
    trained.save_pretrained(tmp_path)
    spec = start(tmp_path, labels=labels)
    built = build_model(spec)
    assert torch.equal(built.model.classifier.weight, trained.classifier.weight) == kept
    assert built.new == (() if kept else ("classifier.bias", "classifier.weight"))
    assert torch.equal(built.model.bert.pooler.dense.weight, trained.bert.pooler.dense.weight)
    line = describe_model(built, spec)[0]
    assert ("head kept, its labels are the same" in line, "new head" in line) == (kept, not kept)


def test_a_head_for_another_task_is_not_kept(encoder: Path, tmp_path: Path) -> None:
    """Catches the head of a token classifier with the same labels, whose parameters have the same names and shapes."""
    head = Kind(Config(train="f", validation="f"), ("a", "b", "c")).head
    BertForTokenClassification.from_pretrained(encoder, **head).save_pretrained(tmp_path)
    assert {"classifier.bias", "classifier.weight"} <= set(build_model(start(tmp_path)).new)


@pytest.mark.parametrize("labels", [1, 3])
def test_a_head_for_answers_after_another_task(encoder: Path, tmp_path: Path, labels: int) -> None:
    """Catches a head that scores answers with as many outputs as the task before had labels."""
    AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=labels).save_pretrained(tmp_path)
    kind = question_answering.Kind(question_answering.Config(train="f", validation="f"), ())
    built = build_model(ModelSpec(tmp_path, True, kind.auto_model, kind.head))
    assert built.model.qa_outputs.out_features == 2
    assert built.new == ("qa_outputs.bias", "qa_outputs.weight")


def test_weights_that_are_not_used_are_reported(encoder: Path, copied: Path) -> None:
    """Catches layers that are left out silently because the config has fewer than the weights, and a list of the
    tensors of the masked-LM head, which a head for a task replaces."""
    spec = start(encoder)
    assert len(describe_model(build_model(spec), spec)) == 1
    weights = load_file(copied / "model.safetensors")
    other = {"bert.other.weight": weights["bert.embeddings.LayerNorm.weight"].clone()}
    save_file(weights | other, copied / "model.safetensors", metadata={"format": "pt"})
    _, line = describe_model(build_model(start(copied)), start(copied))
    assert line == f"{copied}: tensors that the model does not use: bert.other.weight"
    more = {name.replace("layer.0.", "layer.1."): value.clone() for name, value in weights.items()}
    save_file(weights | more, copied / "model.safetensors", metadata={"format": "pt"})
    lines = describe_model(build_model(start(copied)), start(copied))
    assert lines[1] == (
        f"the config has fewer layers than {copied}: 16 tensors are left out "
        "(bert.encoder.layer.1.attention.output.LayerNorm.bias …)"
    )
    buffer = {"bert.encoder.layer.0.attention.self.inv_freq": torch.zeros(4)}
    save_file(weights | buffer, copied / "model.safetensors", metadata={"format": "pt"})
    lines = describe_model(build_model(start(copied)), start(copied))
    assert lines[1:] == [f"{copied}: tensors that the model does not use: {next(iter(buffer))}"]


def test_an_unused_masked_lm_head_is_not_reported(copied: Path) -> None:
    """Catches a line on the masked-LM head in each run of embeddings, and a tensor of the encoder left out silently."""
    spec = ModelSpec(copied, True, "AutoModel", {})
    assert len(describe_model(build_model(spec), spec)) == 1
    weights = load_file(copied / "model.safetensors")
    other = {"bert.embeddings.other.weight": weights["bert.embeddings.LayerNorm.weight"].clone()}
    save_file(weights | other, copied / "model.safetensors", metadata={"format": "pt"})
    _, line = describe_model(build_model(spec), spec)
    assert line.endswith("tensors that the model does not use: bert.embeddings.other.weight")


def test_released_heads_of_deberta_are_not_reported(tmp_path: Path) -> None:
    """Catches a line on the heads of DeBERTa-v3, whose config names no architecture, in each run from it."""
    config = AutoConfig.for_model("deberta-v2", **tiny_fields("deberta-v2"), legacy=False)
    model = AutoModelForMaskedLM.from_config(config)
    model.mask_predictions = torch.nn.Linear(8, 1)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["architectures"], fields["legacy"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    built = build_model(start(tmp_path))
    assert {name.partition(".")[0] for name in built.unused} == {"lm_predictions", "mask_predictions"}
    assert len(describe_model(built, start(tmp_path))) == 1


def test_frozen_modules_are_not_trained(encoder: Path) -> None:
    """Catches modules that are trained despite model.freeze, a typo in it, and a model with nothing to train."""
    spec = replace(start(encoder), freeze=("embeddings", "layer.0"))
    built = build_model(spec)
    frozen = {name for name, parameter in built.model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in built.model.named_parameters() if "embeddings" in name or "layer.0" in name}
    assert "% frozen)" in describe_model(built, spec)[0]
    for freeze, message in ((("layers.0",), "did you mean 'layer.0'"), (("bert", "classifier"), "whole model")):
        with pytest.raises(UserError, match=rf"^model\.freeze: .*{message}"):
            read_model_inputs(replace(spec, freeze=freeze), load_tokenizer(encoder))


@pytest.mark.parametrize("pretrained", [True, False])
def test_sinusoidal_positions_are_not_trained(tmp_path: Path, pretrained: bool) -> None:
    """Catches positions that change because transformers lets all parameters in a folder require a gradient, and a
    folder that is rejected because it lacks them."""
    config = RoFormerConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    RoFormerForMaskedLM(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["roformer.encoder.embed_positions.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model = build_model(start(tmp_path, pretrained)).model
    fixed = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert fixed == ["roformer.encoder.embed_positions.weight"]


def test_weights_that_lack_a_layer_are_rejected(copied: Path) -> None:
    """Catches a folder whose weights fill only part of the encoder being trained as if it were pretrained."""
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(UserError, match=r"weights do not fit its config: no bert\.encoder\.layer\.1"):
        build_model(start(copied))


def test_loading_is_quiet(
    encoder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches transformers' progress bar, its reports on new weights and on another number of labels on the terminal,
    or its logging left off."""
    level = logging.get_verbosity()
    BertForSequenceClassification(BertConfig.from_pretrained(encoder, num_labels=3)).save_pretrained(tmp_path)
    capfd.readouterr()
    caplog.clear()
    build_model(start(encoder))
    build_model(ModelSpec(tmp_path, True, AUTO, {"num_labels": 1}))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert logging.get_verbosity() == level


def test_usable_length_of_bert_and_roberta(encoder: Path, tmp_path: Path) -> None:
    """Catches the RoBERTa family's offset being forgotten: its positions begin at padding_idx + 1."""
    tokenizer = load_tokenizer(encoder)
    bert = read_model_inputs(start(encoder), tokenizer)
    assert (bert.max_length, bert.token_types) == (64, True)
    config = RobertaConfig(
        vocab_size=45,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
        pad_token_id=1,
        type_vocab_size=1,
    )
    RobertaForMaskedLM(config).save_pretrained(tmp_path)
    roberta = read_model_inputs(start(tmp_path), tokenizer)
    assert (roberta.max_length, roberta.token_types) == (64, False)


def test_a_tokenizer_with_more_tokens_than_the_model_is_rejected(copied: Path) -> None:
    """Catches an index error inside the embedding, minutes into a training."""
    (copied / "vocab.txt").write_text((copied / "vocab.txt").read_text() + "extra\n")
    with pytest.raises(UserError, match=r"ids go up to 45, vocab_size is 45"):
        read_model_inputs(start(copied), load_tokenizer(copied))


@pytest.mark.parametrize("missing", ["vocab.txt", "model.safetensors"])
def test_an_incomplete_folder_is_a_user_error(copied: Path, missing: str) -> None:
    """Catches a traceback from transformers, or an empty tokenizer that maps every word to [UNK]."""
    (copied / missing).unlink()
    with pytest.raises(UserError, match="copy"):
        load_tokenizer(copied) and build_model(start(copied))


@pytest.mark.parametrize("pretrained", [True, False])
def test_code_in_the_folder_is_not_run(copied: Path, monkeypatch: pytest.MonkeyPatch, pretrained: bool) -> None:
    """Catches transformers asking on stdin whether to run the folder's code for a head that it does not have itself."""
    ran = copied / "ran"
    (copied / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    (copied / "config.json").write_text(json.dumps({"model_type": "vit", "auto_map": {AUTO: "code.Model"}}))
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(str(question)) or "y")
    with pytest.raises(UserError, match="copy"):
        build_model(start(copied, pretrained))
    assert not asked
    assert not ran.exists()


@pytest.mark.parametrize("model_type", ["big_bird", "bigbird_pegasus"])
def test_big_bird_says_that_it_computes_full_attention(tmp_path: Path, model_type: str) -> None:
    """Catches block-sparse attention in training and full attention in prediction, because of one short text."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    for part in ("encoder", "decoder"):
        sizes |= {"d_model": 8, f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 30, **sizes}))
    spec = start(tmp_path, pretrained=False)
    built = build_model(spec)
    encoder = built.model.bert if model_type == "big_bird" else built.model.model.encoder
    assert encoder.attention_type == "original_full"
    assert describe_model(built, spec)[0].endswith(", with full attention, randomly initialized")


def test_an_unknown_model_type_is_a_user_error(copied: Path) -> None:
    """Catches a traceback for a model type that transformers does not support."""
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "model_type": "bort"}))
    with pytest.raises(UserError, match="copy"):
        build_model(start(copied, pretrained=False))


def test_a_head_of_another_kind_of_task_is_not_kept(encoder: Path, tmp_path: Path) -> None:
    """Catches a multi-label head with the same labels that is kept, and a saved classifier whose pipeline would give
    independent probabilities."""
    head = multi_label.Kind(multi_label.Config(), ("a", "b", "c")).head
    build_model(ModelSpec(encoder, True, AUTO, head)).model.save_pretrained(tmp_path)
    built = build_model(start(tmp_path))
    assert "classifier.weight" in built.new
    assert built.model.config.problem_type == "single_label_classification"


@pytest.mark.parametrize(
    ("auto_model", "output"),
    [
        (AUTO, "logits"),
        ("AutoModelForTokenClassification", "logits"),
        ("AutoModelForQuestionAnswering", "end_logits"),
        ("AutoModelForMaskedLM", "logits"),
    ],
)
def test_the_output_layer_of_a_head_computes_in_fp32(encoder: Path, auto_model: str, output: str) -> None:
    """Catches values of a regression that are multiples of 0.5 in bf16, and options of a blank with equal scores."""
    model = build_model(ModelSpec(encoder, True, auto_model, {})).model
    with torch.autocast("cpu", torch.bfloat16):
        values = model(input_ids=torch.tensor([[1, 2, 3]]))[output]
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())


@pytest.mark.parametrize("tokenizer", [BertweetTokenizer, LukeTokenizer, PhobertTokenizer, RoCBertTokenizer])
def test_all_files_of_a_tokenizer_belong_to_the_model(tokenizer: Any, tmp_path: Path) -> None:
    """Catches exported models without a file of their tokenizer, and runs that resume with other merges."""
    names = set(tokenizer.vocab_files_names.values())
    for name in names:
        (tmp_path / name).touch()
    assert {path.name for path in model_files(tmp_path, weights=False)} == names
