import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from experiment.models.tokenizer import load_tokenizer
from pretrain.modeling.random_model import random_model
from pretrain.training.checkpoint_tensors import PinnedMemory, persistent_buffers, write_hugging_face_folder
from runs import sampled
from tiny_models import tiny_fields

TINY = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}


@pytest.fixture(scope="module")
def model() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=200, **TINY))


@pytest.fixture
def folder(tmp_path: Path, model: BertForMaskedLM, wordpiece: Path) -> Path:
    """A Hugging Face folder whose weights are all 1."""
    weights = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    write_hugging_face_folder(weights, model, load_tokenizer(wordpiece), tmp_path / "hf")
    return tmp_path / "hf"


def test_the_given_weights_are_written(folder: Path, model: BertForMaskedLM) -> None:
    """Catches a checkpoint of the initial or the 16-bit weights instead of the fp32 master weights."""
    written = AutoModelForMaskedLM.from_pretrained(folder)
    assert all(bool((parameter == 1.0).all()) for parameter in written.parameters())
    assert written.config.architectures == ["BertForMaskedLM"]
    assert AutoTokenizer.from_pretrained(folder)("de fi")["input_ids"]
    assert not bool((next(model.parameters()) == 1.0).all())


def test_transformers_can_cut_texts_at_the_positions(folder: Path) -> None:
    """Catches a tokenizer without a length limit: `truncation=True` then cuts nothing, and long texts fail."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer("de fi " * 2000, truncation=True)["input_ids"]) == 512


def test_a_limit_of_the_tokenizer_is_kept(tmp_path: Path, model: BertForMaskedLM, wordpiece: Path) -> None:
    """Catches texts that are as long as the model has positions, though it was trained on shorter ones."""
    tokenizer = load_tokenizer(wordpiece)
    tokenizer.model_max_length = 128
    write_hugging_face_folder(dict(model.named_parameters()), model, tokenizer, tmp_path / "hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").model_max_length == 128


@pytest.mark.parametrize(
    ("model_type", "missing"),
    [
        ("bert", set()),
        ("distilbert", {"token_type_ids"}),
        ("modernbert", {"token_type_ids"}),
        ("fnet", {"attention_mask"}),
    ],
)
def test_the_tokenizer_gives_the_inputs_of_the_model(
    tmp_path: Path, wordpiece: Path, model_type: str, missing: set[str]
) -> None:
    """Catches token types or a mask for a model that has none, with which `model(**tokenizer(text))` fails in
    transformers 4."""
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **tiny_fields(model_type)))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_hugging_face_folder(weights, model, load_tokenizer(wordpiece), tmp_path / "hf")
    given = AutoTokenizer.from_pretrained(tmp_path / "hf")("de fi").keys()
    assert given == {"input_ids", "token_type_ids", "attention_mask"} - missing


@pytest.mark.parametrize(
    "model_type", sampled(MODEL_FOR_MASKED_LM_MAPPING_NAMES, ["camembert", "roberta", "xlm-roberta"])
)
def test_the_whole_encoder_is_found_without_the_head(tmp_path: Path, wordpiece: Path, model_type: str) -> None:
    """Catches embeddings under the name of the decoder that they are tied to: a model with another head, or none, would
    begin with random ones."""
    config = AutoConfig.for_model(model_type, **tiny_fields(model_type), vocab_size=200, pad_token_id=0)
    model = random_model(config)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()} | persistent_buffers(model)
    write_hugging_face_folder(weights, model, load_tokenizer(wordpiece), tmp_path / "hf")
    _, report = AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert [name for name in report["missing_keys"] if "pooler" not in name] == []


def test_others_can_open_the_folder(folder: Path) -> None:
    """Catches a tokenizer that transformers 4 does not know, traces of this machine, and files that only their owner
    can read."""
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_max_length"] == 512
    assert not {"is_local", "local_files_only", "name_or_path", "tokenizer_file"} & config.keys()
    new = folder / "new"
    new.touch()
    assert {oct(path.stat().st_mode) for path in folder.iterdir()} == {oct(new.stat().st_mode)}


def test_pinned_memory_is_little_more_than_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the memory of two BERT-bases for the copy of one, and tensors that overlap."""
    blocks: list[int] = []
    with torch.device("meta"):
        sizes = [parameter.numel() for parameter in BertForMaskedLM(BertConfig()).parameters()]

    def allocate(size: int, **_: object) -> Tensor:
        blocks.append(1 << (size - 1).bit_length())  # as torch does
        return new(size)

    new = partial(torch.empty, dtype=torch.uint8, device="meta")
    monkeypatch.setattr(torch, "empty", allocate)
    memory = PinnedMemory()
    copies = [memory.like(new((size,), dtype=torch.float32)) for size in [*sizes, 1] for _ in range(3)]
    assert [len(copy) for copy in copies] == [size for size in [*sizes, 1] for _ in range(3)]
    assert sum(blocks) < 1.05 * sum(copy.nbytes for copy in copies)
    monkeypatch.undo()

    memory = PinnedMemory()
    monkeypatch.setattr(torch, "empty", lambda size, **_: torch.zeros(size, dtype=torch.uint8))
    small = [memory.like(value).copy_(value) for value in map(torch.tensor, (1.0, [2, 3], [[4.0]]))]
    assert [copy.tolist() for copy in small] == [1.0, [2, 3], [[4.0]]]
