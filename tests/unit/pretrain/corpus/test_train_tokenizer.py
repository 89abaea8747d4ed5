from pathlib import Path

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from experiment.errors import UserError
from experiment.tokenizer import load_tokenizer, tokenizer_fingerprint
from pretrain.corpus.encoding import DocumentEncoder, tokenizer_spec
from pretrain.corpus.options import TokenizerOptions
from pretrain.corpus.train_tokenizer import train_tokenizer

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
    spec = tokenizer_spec(load_tokenizer(tmp_path / "t"))
    encoded = DocumentEncoder(spec).encode([TRICKS, "the river", TRICKS.lower()])
    assert encoded.special is None
    assert not set(encoded.ids.tolist()) & set(spec.special_ids)
    assert len(spec.special_ids) == 4


def test_a_tokenizer_that_makes_special_tokens_of_text_is_found_out() -> None:
    """Catches the check itself being blind: a model that splits at spaces finds [MASK] in its vocabulary."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[MASK]": 1, "a": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", mask_token="[MASK]")
    assert DocumentEncoder(tokenizer_spec(wrapped)).encode(["a", "b", "a [MASK]", "[MASK]"]).special == 2


def test_counts_a_document(vocabulary_folder: Path) -> None:
    """Catches counts that slip to a neighbour when a document has no token."""
    tokenizer = load_tokenizer(vocabulary_folder)
    encoded = DocumentEncoder(tokenizer_spec(tokenizer)).encode(["\x00", "the ŧ ŧ", "\x01", "a river", ""])
    assert encoded.lengths.tolist() == [0, 3, 0, 2, 0]
    assert encoded.unknown.tolist() == [0, 2, 0, 0, 0]
    assert encoded.words.tolist() == [1, 3, 1, 2, 0]


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
