import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    ConvBertForSequenceClassification,
)
from transformers.models.bert.modeling_bert import BertPooler

from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer, save_tokenizer
from finetune.device import Device
from finetune.prediction.loaded_model import NotFiniteError, load_model
from finetune.prediction.mask_filler import MaskFiller, ranking_task
from finetune.prediction.predictor import Predictor
from finetune.prediction.saved_task import TASK_FILE, override_task, read_saved_task
from hub_server import HubServer

SAVED = {"labels": ["a", "b"], "max_seq_length": 8, "padded": False, "temperature": None}
LONG = [f"word{number} " * 200 for number in range(40)]  # longer than the 16 tokens of the model
NEEDS_NUMBERS = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="transformers before 5.18 rejects labels that are numbers",
)


@pytest.fixture
def model(trained_run: Path, tmp_path: Path) -> Path:
    """A model folder of its own, away from its run."""
    return Path(shutil.copytree(trained_run / "seed-1" / "model", tmp_path / "model"))


@pytest.fixture
def classifier(encoder: Path, tmp_path: Path) -> Path:
    """A classifier of transformers with the labels "no" and "yes"."""
    torch.manual_seed(0)
    labels = {0: "no", 1: "yes"}
    made = AutoModelForSequenceClassification.from_pretrained(
        encoder, id2label=labels, label2id={label: number for number, label in labels.items()}
    )
    made.save_pretrained(tmp_path / "foreign")
    shutil.copy(encoder / "vocab.txt", tmp_path / "foreign")
    return tmp_path / "foreign"


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_linear_layers_are_computed_as_in_training(model: Path) -> None:
    """Catches predictions on a CPU that take longer than those during training."""
    types = {type(module) for module in Predictor.load(model, "fp32")._inference.model.modules()}
    assert any(issubclass(found, torch.nn.Linear) for found in types)
    assert torch.nn.Linear not in types


def test_threads_share_a_predictor(model: Path) -> None:
    """Catches state that a prediction leaves behind, such as the truncation of the tokenizer."""
    predictor = Predictor.load(model, "fp32", batch_size=4)
    records = [{"text": text} for text in LONG]
    expected = [predictor.predict([record])[0]["label"] for record in records]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: predictor.predict(records), range(16)))
    assert [[prediction["label"] for prediction in batch] for batch in found] == [expected] * 16


def test_no_records_give_no_predictions(model: Path) -> None:
    """Catches an error for the empty request of a client."""
    assert Predictor.load(model, "fp32").predict([]) == []


def test_a_record_with_other_roles_is_rejected(model: Path) -> None:
    """Catches a pair that is scored by its first text alone, or a traceback for a missing text."""
    predictor = Predictor.load(model, "fp32")
    with pytest.raises(UserError, match="record 2: expected text; found text, text_pair"):
        predictor.predict([{"text": "word1"}, {"text": "word1", "text_pair": "word2"}])
    with pytest.raises(UserError, match="record 1: expected text; found 0"):
        predictor.predict([{0: "word1"}])  # type: ignore[dict-item]
    with pytest.raises(UserError, match="record 1: expected text; found nothing"):
        predictor.predict([{}])
    with pytest.raises(UserError, match=r"expected a list of records, found one: \['word1'\]"):
        predictor.predict("word1")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="record 1: expected a mapping of text to values, found 'word1'"):
        predictor.predict(["word1"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("value", "found"), [(5, "5"), (None, "null"), (["word1"], r'\["word1"\]'), ("\ud800", "half of a surrogate")]
)
def test_a_value_of_another_type_is_rejected(model: Path, value: object, found: str) -> None:
    """Catches a traceback of the tokenizer for a number or a missing text."""
    with pytest.raises(UserError, match=rf"record 2: expected .*text in 'text', found {found}"):
        Predictor.load(model, "fp32").predict([{"text": "word1"}, {"text": value}])


def test_damaged_weights_are_rejected(model: Path, tmp_path: Path) -> None:
    """Catches a flipped sign in the weights, which changes predictions silently; files that the user has changed are
    used if the user says so; and a traceback of safetensors, which has an error class of its own."""
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    weights = folder / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 0x80
    weights.write_bytes(damaged)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged, or was changed .* remove 'checksums'"):
        Predictor.load(folder)
    saved = json.loads((folder / TASK_FILE).read_text())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= saved.pop("checksums").keys()
    (folder / TASK_FILE).write_text(json.dumps(saved))
    Predictor.load(folder)
    weights.write_bytes(damaged[:50])
    with pytest.raises(UserError, match=f"cannot load the weights in {folder}"):
        Predictor.load(folder)


def test_weights_that_are_not_finite_are_rejected(model: Path) -> None:
    """Catches the first label for every text, with a probability of NaN."""
    weights = load_file(model / "model.safetensors")
    weights["bert.embeddings.position_embeddings.weight"][8] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    change(model / TASK_FILE, checksums={})
    predictor, words = Predictor.load(model, "fp32"), "word1 word2 word3 word4 word5 word6"
    assert predictor.predict([{"text": words}])
    with pytest.raises(NotFiniteError, match=r"model: .* not finite in fp32; its weights are damaged, or its training"):
        predictor.predict([{"text": words}, {"text": f"{words} word7"}])
    fp16 = replace(predictor.loaded, device=Device(torch.device("cpu"), torch.float16))
    with pytest.raises(NotFiniteError, match=r"not finite in fp16; use bf16 or fp32$"):
        fp16.check_finite([[0.0], [torch.inf]])
    weights["bert.embeddings.position_embeddings.weight"][0] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotFiniteError, match="model: the model's outputs are not finite in fp32"):
        Predictor.load(model, "fp32")


def test_the_task_file_survives(model: Path) -> None:
    """Catches options of the task that are lost on the way to another machine, and overrides that have no effect."""
    saved = override_task(read_saved_task(model), {"columns.text": "review"})
    assert (saved.kind.labels, saved.max_seq_length) == (("high", "low"), 16)
    assert saved.kind.config.columns.model_dump() == {"label": "label", "text": "review", "text_pair": None}
    assert saved.kind.config.metric == "macro_f1"
    with pytest.raises(UserError, match=r"unknown config key 'columns\.txt'; did you mean 'columns\.text'"):
        override_task(saved, {"columns.txt": "review"})


def test_words_are_encoded_as_in_training(model: Path, classifier: Path) -> None:
    """Catches taggers of earlier versions and of transformers that get other tokens than they were trained with: in
    these, words of scripts without spaces have a space before them."""
    assert not Predictor.load(model, "fp32").loaded.encoder.spaced_words
    saved = json.loads((model / TASK_FILE).read_text())
    del saved["spaced_words"]
    (model / TASK_FILE).write_text(json.dumps(saved))
    for folder in (model, classifier):
        assert Predictor.load(folder, "fp32").loaded.encoder.spaced_words


def test_the_model_folder_names_its_ancestors(trained_run: Path, encoder: Path) -> None:
    """Catches a fine-tuned model that cannot be traced to the encoder that it was made from."""
    origin = json.loads((trained_run / "seed-1" / "model" / "deepcloze.json").read_text())
    provenance = json.loads((trained_run / "provenance.json").read_text())
    assert (origin["run_id"], origin["folder"]) == (provenance["run_id"], "seed-1")
    (ancestor,) = origin["ancestors"]
    assert (ancestor["relation"], ancestor["folder"]) == ("init_from", encoder.name)


def test_the_model_folder_has_no_path_of_the_machine(trained_run: Path, encoder: Path) -> None:
    """Catches the user's name and folders in a model that is published."""
    for path in (trained_run / "seed-1" / "model").iterdir():
        content = path.read_bytes()
        assert str(encoder.parent).encode() not in content, path.name
        assert str(trained_run.parent).encode() not in content, path.name


@pytest.mark.parametrize("labels", [("no", "yes"), pytest.param((0, 1), marks=NEEDS_NUMBERS)])
def test_a_classifier_of_transformers_works(classifier: Path, labels: tuple[str | int, ...]) -> None:
    """Catches models of others being rejected, or their labels lost, or not text if they are numbers in JSON."""
    change(classifier / "config.json", id2label=dict(enumerate(labels)))
    predictor = Predictor.load(classifier, "fp32")
    (prediction,) = predictor.predict([{"text": "word1 " * 500}])
    assert list(prediction["probabilities"]) == [str(label) for label in labels]
    assert prediction["label"] in prediction["probabilities"]
    with pytest.raises(UserError, match=r"expected text; found text, context"):
        predictor.predict([{"text": "word1", "context": "word2"}])
    with pytest.raises(UserError, match=r"expected text in 'text_pair', found 5"):
        predictor.predict([{"text": "word1", "text_pair": 5}])


def test_a_model_of_the_hub(hub: HubServer, classifier: Path) -> None:
    """Catches a name that `deepcloze predict` takes and a script does not."""
    hub.repository("org/tiny").push_folder(classifier)
    (found,) = Predictor.load("org/tiny", "fp32").predict([{"text": "word1"}])
    assert [found] == Predictor.load(classifier, "fp32").predict([{"text": "word1"}])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "not a sequence classifier with two or more labels"),
        ({"id2label": {"0": "LABEL_0"}, "label2id": {}}, "not a sequence classifier with two or more labels"),
        ({"id2label": {"0": "no", "1": "no", "2": "yes"}}, r"config\.json: id2label has 'no' more than once"),
    ],
)
def test_a_head_that_means_something_else_is_rejected(
    classifier: Path, changed: dict[str, object], message: str
) -> None:
    """Catches a softmax over the outputs of a multi-label model, a regression that is always 100 % certain, and the
    probability of one of two labels of the same name."""
    change(classifier / "config.json", **changed)
    with pytest.raises(UserError, match=message):
        Predictor.load(classifier, "fp32")


def test_an_encoder_without_a_head_is_rejected(encoder: Path) -> None:
    """Catches predictions of a random head."""
    with pytest.raises(UserError, match=r"architecture: BertForMaskedLM.*`deepcloze finetune` makes"):
        Predictor.load(encoder, "fp32")


def test_a_head_that_is_missing_is_not_drawn(model: Path, encoder: Path) -> None:
    """Catches predictions of a random head, for a folder whose weights were replaced."""
    shutil.copy(encoder / "model.safetensors", model)
    change(model / TASK_FILE, checksums={})
    with pytest.raises(UserError, match=r"not fine-tuned: its weights lack .*classifier"):
        Predictor.load(model, "fp32")


def test_a_model_that_depends_on_padding_is_padded_as_in_training(model: Path) -> None:
    """Catches predictions of such a model that change with the other rows of a batch."""
    change(model / TASK_FILE, padded=True)
    predictor = Predictor.load(model, "fp32", batch_size=1)
    lengths = []
    predictor._inference.model.register_forward_pre_hook(
        lambda _, args, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    predictor.predict([{"text": "word1"}, {"text": "word1 word2 word3"}])
    assert lengths == [16, 16]


def test_the_other_texts_do_not_change_the_answer_of_a_foreign_model(
    convolutions: Path,
) -> None:
    """Catches a model whose outputs depend on padding, trained elsewhere, that is padded."""
    texts = ["word1 [MASK]", "word2 [MASK] word3 word4 word5 word6 word7"]
    filler = MaskFiller(load_model(convolutions, ranking_task(), "fp32"))
    candidates = [filler.fill([text])[0][0][0] for text in texts]
    assert [found[0][0] for found in filler.fill(texts)] == [
        found | {"probability": pytest.approx(found["probability"], abs=1e-6)} for found in candidates
    ]
    ConvBertForSequenceClassification.from_pretrained(convolutions).save_pretrained(convolutions)
    predictor = Predictor.load(convolutions, "fp32")
    alone = [predictor.predict([{"text": text}])[0]["probabilities"] for text in texts]
    together = predictor.predict([{"text": text} for text in texts])
    assert [found["probabilities"] for found in together] == [pytest.approx(each, abs=1e-6) for each in alone]


@pytest.mark.parametrize("kind", ["byte_level", "wordpiece"])
def test_candidates_that_differ_by_a_space(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Catches a token at the beginning of a word and one within it that cannot be told apart in an answer, and an added
    word with the spaces that BERT's normalizer puts around Chinese characters."""
    tokenizer, folder = load_tokenizer(request.getfixturevalue(kind)), tmp_path / "model"
    tokenizer.add_tokens("新冠")
    save_tokenizer(tokenizer, folder)
    vocabulary = tokenizer.get_vocab()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    filler = MaskFiller(load_model(folder, ranking_task(), "fp32"))
    ((found,),) = filler.fill([filler.mask], top_k=1000)
    assert {each["piece"] for each in found} == vocabulary.keys()
    assert {each["token"] for each in found if each["piece"] in ("e", "Ġe")} == {"e"}


def test_a_foreign_model_that_ignores_padding_is_not_padded(classifier: Path) -> None:
    """Catches batches of one length, which are slow, for models that do not need them."""
    assert not Predictor.load(classifier, "fp32").loaded.padding.is_avoided


def test_a_precision_that_the_model_cannot_compute_in(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a traceback for models such as DeBERTa v1, some of whose operations do not exist in bf16 on a CPU."""

    def forward(self: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("expected scalar type BFloat16 but found Float")
        return torch.tanh(inputs[:, 0] @ self.dense.weight.T + self.dense.bias)

    records = [{"text": "word1"}]
    (expected,) = Predictor.load(model, "fp32").predict(records)
    monkeypatch.setattr(BertPooler, "forward", forward)
    (found,) = Predictor.load(model, "bf16").predict(records)
    assert found["probabilities"] == pytest.approx(expected["probabilities"])
    assert "bert cannot compute in bf16 on cpu: predicting in fp32" in caplog.text
    with pytest.raises(UserError, match=r"--precision: expected auto, fp32, .*, found 'fp8'"):
        Predictor.load(model, "fp8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"task": {"kind": "classification"}}', "'labels', .* and 'temperature' are missing"),
        ('{"task": {"kind": "classification"}, "labels": ["a", "b"], "max_seq_length": "x"}', "max_seq_length.*number"),
        (json.dumps({**SAVED, "task": {"kind": "telepathy"}}), "has no tasks of kind 'telepathy'"),
        (json.dumps({**SAVED, "task": {"kind": "classification", "x": 1}}), "unknown config key 'x'"),
    ],
)
def test_a_damaged_task_file_is_a_user_error(model: Path, text: str, message: str) -> None:
    """Catches a traceback, or a file of a later version that is half understood."""
    (model / TASK_FILE).write_text(text)
    with pytest.raises(UserError, match=message):
        read_saved_task(model)
