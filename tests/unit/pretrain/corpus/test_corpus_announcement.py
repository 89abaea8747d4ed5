import textwrap
from pathlib import Path

import pytest

from pretrain.corpus.announcement import announce_sources, is_hard_wrapped
from pretrain.corpus.options import TextOptions
from pretrain.corpus.sources import find_sources

SENTENCES = [f"The {number}th run of the long night was slower than the one before it." for number in range(200)]


def test_wrapped_text_is_recognized() -> None:
    """Catches a book whose lines become documents of ten words."""
    assert is_hard_wrapped(textwrap.wrap(" ".join(SENTENCES), 72))
    assert is_hard_wrapped(textwrap.wrap("今天我们在图书馆里学习自然语言处理的新方法天气很好" * 200, 60))


@pytest.mark.parametrize(
    "lines",
    [
        SENTENCES,  # equally long, but complete
        [f"word {'x' * (number % 60)}" for number in range(200)],  # titles, search queries: all lengths
        [" ".join(SENTENCES[:9])] * 100,  # paragraphs
        textwrap.wrap(" ".join(SENTENCES[:5]), 72),  # too few to tell
    ],
)
def test_other_text_is_not(lines: list[str]) -> None:
    """Catches a warning about text with a document on each line."""
    assert not is_hard_wrapped(lines)


def test_sources_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a glob that names other files than meant, without a sign of it."""
    for number in range(12):
        (tmp_path / f"{number:02}.txt").write_text("\n".join(textwrap.wrap(" ".join(SENTENCES), 72)))
    announce_sources(find_sources(tmp_path), TextOptions())
    printed, warnings = capsys.readouterr()
    assert printed.startswith("reading 12 sources, 0.2 MB:\n")
    assert f"  {tmp_path}/09.txt\n  … and 2 more\n" in printed
    assert f"warning: the lines of {tmp_path}/00.txt look like parts of paragraphs" in warnings
    announce_sources(find_sources(tmp_path), TextOptions(document="blank_line"))
    assert "warning" not in capsys.readouterr().err
