"""The ids, token types and padding that a model gets in training, and from its saved folder without our code."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    XLNetConfig,
    XLNetLMHeadModel,
    XLNetTokenizer,
)

from experiment.models.tokenizer import load_any_tokenizer, save_model_tokenizer
from finetune.data.records import Record, Table
from finetune.device import MicrobatchSize
from finetune.encoding.encoder import Encoder
from finetune.encoding.examples import Padding
from finetune.inference import evaluate
from finetune.kinds.classification import Config, Kind
from finetune.model import ModelSpec, build_model, read_model_inputs, save_model
from finetune.prediction.loaded_model import load_on_cpu
from finetune.prediction.mask_filler import ranking_task
from finetune.prepared_task import PreparedTask, encode_split
from tiny_models import tiny_fields

KIND = Kind(Config(train="f", validation="f"), ("a", "b"))
SPECIALS = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>"]


@pytest.fixture
def xlnet(tmp_path: Path) -> Path:
    """A Hugging Face folder with a tiny XLNet: padded on the left, no position limit, no type_vocab_size."""
    vocabulary = [(token, 0.0) for token in SPECIALS] + [("▁", -9.0)] + [(f"▁word{n}", -3.0) for n in range(9)]
    tokenizer = XLNetTokenizer(vocab=vocabulary)
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=len(tokenizer), d_model=32, n_layer=2, n_head=2, d_inner=64, initializer_range=0.5)
    XLNetLMHeadModel(config).save_pretrained(tmp_path / "xlnet")
    tokenizer.save_pretrained(tmp_path / "xlnet")
    return tmp_path / "xlnet"


def spec(folder: Path) -> ModelSpec:
    return ModelSpec(folder, True, KIND.auto_model, KIND.head)


def make_encoder(folder: Path, special_tokens_in_text: bool = False) -> Encoder:
    tokenizer = load_any_tokenizer(folder, needed=("pad_token",))
    inputs = read_model_inputs(spec(folder), tokenizer)
    assert inputs.max_length is None or inputs.max_length == 64
    return Encoder(tokenizer, 64, inputs.token_types, special_tokens_in_text)


def test_predictions_of_xlnet_do_not_depend_on_the_batch(xlnet: Path) -> None:
    """Catches padding on the wrong side: XLNet reads its answer from the last token. Also its rejection: it has no
    position limit."""
    texts = [" ".join(f"word{(n * k) % 9}" for k in range(n + 1)) for n in range(20)]
    table = Table(xlnet, tuple(Record("f", {"text": text, "text_pair": "word1 word2"}) for text in texts), False)
    encoder = make_encoder(xlnet)
    task = PreparedTask(KIND, {}, Padding.of(encoder.tokenizer))
    split = encode_split(table, KIND, encoder, training=False)
    model = build_model(spec(xlnet)).model
    alone, together = (
        [found["probabilities"]["a"] for found in evaluate(model, task, split, MicrobatchSize(size)).predictions]
        for size in (1, 20)
    )
    assert max(alone) - min(alone) > 1e-2
    assert together == pytest.approx(alone, abs=1e-4)


def test_token_types_of_xlnet_are_the_tokenizers(xlnet: Path) -> None:
    """Catches segments that XLNet cannot tell apart because its config has no type_vocab_size."""
    assert make_encoder(xlnet).encode("word1 word2", "word3").token_type_ids.tolist() == [0, 0, 0, 1, 1, 2]


def test_models_without_token_types_get_none(encoder: Path, tmp_path: Path) -> None:
    """Catches GPT-2, which adds a word embedding for each token type id, and a BERT with a single type."""
    for number, config in enumerate(
        (
            GPT2Config(vocab_size=45, n_embd=32, n_layer=1, n_head=2, n_positions=64, pad_token_id=0),
            BertConfig(vocab_size=45, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, type_vocab_size=1),
        )
    ):
        folder = tmp_path / str(number)
        config.save_pretrained(folder)
        inputs = read_model_inputs(spec(folder), load_any_tokenizer(encoder, needed=()))
        assert not inputs.token_types


@pytest.mark.parametrize("limit", [700, 600])
def test_deberta_cuts_texts_at_its_configured_positions(encoder: Path, tmp_path: Path, limit: int) -> None:
    """Catches texts that are cut at 512 tokens although the model or its tokenizer has another limit, and a saved
    tokenizer without a limit, with which `truncation=True` cuts nothing."""
    fields = {"vocab_size": 45, "max_position_embeddings": 700, "relative_attention": True}
    config = AutoConfig.for_model("deberta-v2", **tiny_fields("deberta-v2") | fields, position_biased_input=False)
    model = AutoModelForMaskedLM.from_config(config)
    model.save_pretrained(tmp_path)
    shutil.copy(encoder / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer"} | ({"model_max_length": 600} if limit == 600 else {}))
    )
    assert load_on_cpu(tmp_path, ranking_task()).encoder.max_length == limit
    save_model_tokenizer(load_any_tokenizer(tmp_path, needed=()), model, tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").model_max_length == limit


def inputs_of_saved(folder: Path, encoder: Encoder, saved: Path, *texts: str) -> dict[str, Any]:
    """The inputs that transformers alone makes of a text or a pair, from a saved folder."""
    tokenizer = load_any_tokenizer(folder, needed=("pad_token",))
    model = build_model(spec(folder)).model
    save_model(model, tokenizer, encoder.special_tokens_in_text, saved)
    return dict(AutoTokenizer.from_pretrained(saved)(*texts))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("family", ["bert", "xlnet", "tokenizer.json"])
def test_the_saved_folder_gives_the_inputs_of_training(
    encoder: Path, xlnet: Path, tmp_path: Path, family: str, special: bool
) -> None:
    """Catches `[SEP]` in a text that is special in one of them only, and token types that get lost."""
    folder = {"bert": encoder, "xlnet": xlnet, "tokenizer.json": tmp_path / "generic"}[family]
    if family == "tokenizer.json":  # a tokenizer whose class does not know of token types
        shutil.copytree(encoder, folder)
        load_any_tokenizer(encoder, needed=()).backend_tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    trained = make_encoder(folder, special)
    text = f"word0 {trained.tokenizer.sep_token} word1"
    tokens = trained.encode(text, "word2")
    if family != "xlnet":  # whose unigram model knows "<sep>" as a piece of text
        assert tokens.input_ids.tolist().count(trained.tokenizer.sep_token_id) == (3 if special else 2)
    found = inputs_of_saved(folder, trained, tmp_path / "saved", text, "word2")
    assert found["input_ids"] == tokens.input_ids.tolist()
    assert found["token_type_ids"] == tokens.token_type_ids.tolist()
