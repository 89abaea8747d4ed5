import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from experiment.errors import UserError
from pretrain.corpus.encoding import Encoder
from pretrain.corpus.options import TokenizerOptions
from pretrain.corpus.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_of,
)

TEXT = "The river ran by the town .\nThe actor was born in the town by the river !\n" * 20 + "你好 世界 ünknown\n" * 3
TRICKS = "[CLS] [SEP] [PAD] [MASK] [UNK] <s> </s> <pad> <mask> <unk> [unused0] ##the x[MASK]y"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_training_gives_a_folder_that_transformers_opens(tmp_path: Path, text: Path, kind: str) -> None:
    """Catches missing special tokens or post-processing, and a vocabulary that differs between two trainings."""
    for name in ("a", "b"):
        train_tokenizer(
            TokenizerOptions(source=text, output=tmp_path / name, vocab_size=300, kind=kind, lowercase=True)
        )
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "a"))
    single, pair = tokenizer("The river"), tokenizer("The river", "the town")
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert [single["input_ids"][0], single["input_ids"][-1]] == [cls, sep]
    assert pair["input_ids"].count(sep) == (2 if kind == "wordpiece" else 3)
    assert ("token_type_ids" in pair) == (kind == "wordpiece")
    assert tokenizer("THE")["input_ids"] == tokenizer("the")["input_ids"]
    bert, roberta = ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"], ["<s>", "</s>", "<pad>", "<unk>", "<mask>"]
    roles = (tokenizer.cls_token, tokenizer.sep_token, tokenizer.pad_token, tokenizer.unk_token, tokenizer.mask_token)
    assert list(roles) == (bert if kind == "wordpiece" else roberta)
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(load_tokenizer(tmp_path / "a"))


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_text_never_gives_a_special_token(tmp_path: Path, text: Path, kind: str) -> None:
    """Catches a literal [MASK] or </s> in the text that becomes the special token."""
    train_tokenizer(TokenizerOptions(source=text, output=tmp_path / "t", vocab_size=400, kind=kind))
    vocabulary = vocabulary_of(load_tokenizer(tmp_path / "t"))
    encoded = Encoder(vocabulary).encode([TRICKS, "the river", TRICKS.lower()])
    assert encoded.special is None
    assert not set(encoded.ids.tolist()) & set(vocabulary.special_ids)
    assert len(vocabulary.special_ids) == 4


def test_a_tokenizer_that_makes_special_tokens_of_text_is_found_out() -> None:
    """Catches the check itself being blind: a model that splits at spaces finds [MASK] in its vocabulary."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[MASK]": 1, "a": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", mask_token="[MASK]")
    assert Encoder(vocabulary_of(wrapped)).encode(["a", "b", "a [MASK]", "[MASK]"]).special == 2


def test_counts_a_document(vocabulary_folder: Path) -> None:
    """Catches counts that slip to a neighbour when a document has no token."""
    tokenizer = load_tokenizer(vocabulary_folder)
    encoded = Encoder(vocabulary_of(tokenizer)).encode(["\x00", "the ŧ ŧ", "\x01", "a river", ""])
    assert encoded.lengths.tolist() == [0, 3, 0, 2, 0]
    assert encoded.unknown.tolist() == [0, 2, 0, 0, 0]
    assert encoded.words.tolist() == [1, 3, 1, 2, 0]


@pytest.mark.parametrize(
    ("entries", "config", "lowercase"),
    [
        (["the", "<S>", "[unused1]"], None, True),
        (["the", "The"], None, False),
        (["the"], {"do_lower_case": False}, False),
        (["the", "The"], {"do_lower_case": True}, True),
    ],
)
def test_a_bare_vocabulary_is_cased_or_not(
    tmp_path: Path, entries: list[str], config: dict[str, bool] | None, lowercase: bool
) -> None:
    """Catches a cased vocabulary read as uncased, which turns names into other words."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*specials, *entries]) + "\n")
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert json.loads(load_tokenizer(tmp_path).backend_tokenizer.to_str())["normalizer"]["lowercase"] is lowercase


def test_fingerprint_is_of_what_makes_ids(tmp_path: Path, vocabulary_folder: Path) -> None:
    """Catches a fingerprint that changes with padding, or stays the same with another normalizer or vocabulary."""
    tokenizer = load_tokenizer(vocabulary_folder)
    plain = tokenizer_fingerprint(tokenizer)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    tokenizer.backend_tokenizer.enable_truncation(max_length=8)
    assert tokenizer_fingerprint(tokenizer) == plain
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "saved")) == plain
    cased = tmp_path / "cased"
    cased.mkdir()
    (cased / "vocab.txt").write_bytes((vocabulary_folder / "vocab.txt").read_bytes())
    (cased / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert tokenizer_fingerprint(load_tokenizer(cased)) != plain
    tokenizer.add_tokens(["newword"])
    assert tokenizer_fingerprint(tokenizer) != plain


def test_saved_tokenizers_say_nothing_of_their_source(tmp_path: Path, vocabulary_folder: Path) -> None:
    """Catches paths or loading options in the files, which would make equal corpora differ."""
    save_tokenizer(load_tokenizer(vocabulary_folder), tmp_path / "one")
    save_tokenizer(load_tokenizer(tmp_path / "one"), tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
        assert str(tmp_path) not in file.read_text()


def test_folders_without_a_usable_tokenizer(tmp_path: Path) -> None:
    """Catches a trace, or a tokenizer without a mask token that fails at the first batch."""
    with pytest.raises(UserError, match="is no folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(UserError, match=r"found encoder\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("the\na\n")
    with pytest.raises(UserError, match=r"no \[CLS\]"):
        load_tokenizer(tmp_path)
    gpt = Tokenizer(models.BPE({"a": 0}, []))
    gpt.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="mask_token"):
        load_tokenizer(tmp_path)


def test_wrong_values(tmp_path: Path, text: Path) -> None:
    """Catches bad flags that train for an hour before they are noticed, and an output that is overwritten."""
    for flags in ({"vocab_size": "many"}, {"vocab_size": 300, "kind": "word_piece"}, {"vocab_size": 300, "added": "a"}):
        with pytest.raises(ValidationError):
            TokenizerOptions(source=text, output=tmp_path / "t", **flags)
    with pytest.raises(UserError, match="too small for bpe"):
        train_tokenizer(TokenizerOptions(source=text, output=tmp_path / "t", vocab_size=100, kind="bpe"))
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(UserError, match="no column"):
        train_tokenizer(TokenizerOptions(source=tmp_path / "a.jsonl", output=tmp_path / "t", vocab_size=300))
    with pytest.raises(UserError, match="already holds"):
        train_tokenizer(TokenizerOptions(source=text, output=tmp_path, vocab_size=300))
    assert not (tmp_path / "t").exists()
