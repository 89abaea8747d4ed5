import zipfile
from pathlib import Path

import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from experiment.output_folder import lock_output
from pretrain.corpus.options import TokenizerOptions
from pretrain.corpus.train_tokenizer import train_tokenizer
from small_disk import SmallDisk

TEXT = "The river ran by the town .\nThe actor was born in the town by the river !\n" * 20 + "你好 世界 ünknown\n" * 3
NEWER_PUNCTUATION = " ".join(f"a{chr(code)}b" for code in range(0x2E53, 0x2E5D))  # no punctuation for tokenizers


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(f"{TEXT}{NEWER_PUNCTUATION}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_trained_tokenizer_opens_in_transformers(tmp_path: Path, text: Path, kind: str) -> None:
    """Catches missing special tokens or post-processing, and training that is not reproducible."""
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


def test_room_in_the_vocabulary_goes_to_rare_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches Chinese characters that are unknown although the vocabulary is not full, and rare ones that crowd out
    words where it is."""
    characters = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    words = "".join(f"{chr(97 + first)}{chr(97 + second)}x\n" for first in range(26) for second in range(26))
    for name, text, unknown in (("zh", characters * 2, 0), ("mixed", f"{words * 3}{characters * 2}", 100)):
        source = tmp_path / f"{name}.txt"
        source.write_text(text, encoding="utf-8")
        train_tokenizer(TokenizerOptions(source=source, output=tmp_path / name, vocab_size=400))
        ids = load_tokenizer(tmp_path / name)(characters, add_special_tokens=False)["input_ids"]
        assert len(ids) == 300
        assert (ids.count(1) > unknown) == (unknown > 0)
    assert capsys.readouterr().err.count("found only 305 tokens in the text, fewer than --vocab_size 400") == 1


@pytest.mark.parametrize("size", [12, 20, 50, 300])
def test_a_vocabulary_is_not_larger_than_asked_for(tmp_path: Path, size: int) -> None:
    """Catches an alphabet that takes more tokens than there are."""
    (tmp_path / "a.txt").write_text(f"{TEXT}{''.join(map(chr, range(0x4E00, 0x4E00 + 400))) * 2}", encoding="utf-8")
    train_tokenizer(TokenizerOptions(source=tmp_path / "a.txt", output=tmp_path / "t", vocab_size=size))
    assert len(load_tokenizer(tmp_path / "t")) == size


def test_a_small_vocabulary_is_named(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a vocabulary that lacks a digit, of which nothing is said."""
    train_tokenizer(TokenizerOptions(source=text, output=tmp_path / "t", vocab_size=50))
    assert "--vocab_size 50 is small: usual vocabularies have 8,000 to 50,000 tokens\n" in capsys.readouterr().err


def test_invalid_options(tmp_path: Path, text: Path) -> None:
    """Catches invalid options that are found after training, and an output folder that is overwritten or used by
    another process."""
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
    with lock_output(tmp_path / "t", ""), pytest.raises(UserError, match="another process is writing it"):
        train_tokenizer(TokenizerOptions(source=tmp_path / "missing", output=tmp_path / "t", vocab_size=300))
    assert not (tmp_path / "t").exists()


def test_patterns_that_match_nothing(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a tokenizer of other text than its options say, which `deepcloze corpus` would reject."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", TEXT)
        archive.writestr("a.png", "")
    shared = {"output": tmp_path / "t", "vocab_size": 300}
    with pytest.raises(UserError, match=r"a\.zip: no member matches '\*\.md'"):
        train_tokenizer(TokenizerOptions(source=f"{text},{tmp_path}/a.zip::*.md", **shared))
    with pytest.raises(UserError, match=r"--document_start '\^# ' matches no line"):
        train_tokenizer(TokenizerOptions(source=text, document_start="^# ", **shared))
    train_tokenizer(TokenizerOptions(source=tmp_path / "a.zip", **shared))
    assert capsys.readouterr().err.count("skipping 1 file of other formats, such as a.png") == 1


@pytest.mark.parametrize("free", [0, 4096, 12288])
def test_a_full_disk_leaves_nothing(small_disk: SmallDisk, text: Path, free: int) -> None:
    """Catches a traceback, and half a tokenizer that keeps the disk full."""
    small_disk.fill(leave=free)
    options = TokenizerOptions(source=text, output=small_disk.path / "t", vocab_size=300, kind="bpe")
    with pytest.raises(UserError, match=r"--output .*small-disk/t: .*disk full"):
        train_tokenizer(options)
    assert [path.name for path in small_disk.path.iterdir()] == ["filler"]
