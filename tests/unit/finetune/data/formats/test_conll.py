from pathlib import Path

import pytest

from experiment.errors import UserError
from finetune.data.formats import FileFormat, read_rows
from finetune.data.formats.row import Row

DOCUMENT = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

\t
-DOCSTART- -X- -X- O

Peter NNP B-NP B-PER
"""


def rows(path: Path, text: str) -> list[Row]:
    path.write_text(text, encoding="utf-8")
    return list(read_rows(path, FileFormat("conll")))


def named(row: Row) -> dict[str, object]:
    return dict(zip(row.names, row.cells, strict=True))


def test_sentences_with_their_tags(tmp_path: Path) -> None:
    """Catches document borders and blank lines taken for sentences, and tags from the wrong column."""
    path = tmp_path / "eng.train"
    found = rows(path, DOCUMENT)
    assert [row.place for row in found] == [f"{path}:3", f"{path}:9"]
    assert named(found[0]) == {
        "0": ["EU", "rejects"],
        "1": ["NNP", "VBZ"],
        "2": ["B-NP", "B-VP"],
        "3": ["B-ORG", "O"],
        "tokens": ["EU", "rejects"],
        "tags": ["B-ORG", "O"],
    }
    assert named(found[1])["tags"] == ["B-PER"]


def test_tabs_and_one_column(tmp_path: Path) -> None:
    """Catches tokens with spaces torn apart, Chinese spaces lost, and tokens given as their own tags."""
    found = rows(tmp_path / "a.conll", "New York\tB-LOC\n\u3000\tO\n")
    assert named(found[0])["tokens"] == ["New York", "\u3000"]
    assert named(rows(tmp_path / "a.conll", "one\r\ntwo\r\n")[0]) == {"0": ["one", "two"], "tokens": ["one", "two"]}


def test_a_line_of_another_width_is_rejected(tmp_path: Path) -> None:
    """Catches a tag lost from a line, which shifts or drops labels silently."""
    with pytest.raises(UserError, match=r"a\.conll:3: expected 2 columns, found 1"):
        rows(tmp_path / "a.conll", "EU B-ORG\n\nrejects\n")
