"""A small BERT tokenizer and text, shared by the corpus tests."""

from pathlib import Path

import pytest

_WORDS = "the a of and in is to film actor river was born town year he she it on by with un"
_ALPHANUMERIC = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = [*_WORDS.split(), "##known", "##s", "##ing"]
LETTERS = [*_ALPHANUMERIC, *".,;:!?()[]<>/=-'\"你好世界", *(f"##{character}" for character in _ALPHANUMERIC)]


@pytest.fixture(scope="session")
def vocabulary_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only an uncased vocab.txt."""
    folder = tmp_path_factory.mktemp("vocabulary")
    entries = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS]
    (folder / "vocab.txt").write_text("\n".join(entries) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def lines() -> list[str]:
    """Three hundred lines of different lengths."""
    return [" ".join(WORDS[(i * j) % 22] for j in range(1, 3 + i % 17)) + f" {i}" for i in range(300)]
