import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from finetune.data.records import Table
from finetune.encoding.encoded_split import Split
from finetune.encoding.encoder import Tokens
from finetune.encoding.examples import Example
from finetune.encoding.lengths import print_lengths


def split(full_lengths: range, max_length: int) -> Split:
    sequences = [
        Tokens(torch.zeros(min(length, max_length)), None, length > max_length, length) for length in full_lengths
    ]
    examples = tuple(Example((tokens,)) for tokens in sequences)
    return Split(Table(Path("f.csv"), (), labelled=True), examples, tuple(range(len(examples))))


def printed(positions: int | None = None, terminal: bool = False, **splits: Split) -> list[str]:
    file = io.StringIO()
    print_lengths(Console(file=file, force_terminal=terminal, width=100, color_system=None), splits, positions)
    return file.getvalue().splitlines()


def test_lengths_are_those_before_cutting() -> None:
    """Catches a table of lengths that ends at max_seq_length, which hides how much is lost."""
    assert printed(train=split(range(1, 201), 150), test=split(range(1, 11), 150)) == [
        "train: tokens of a sequence: 50 % 101, 90 % 181, 99 % 199, max 200, cut 25.0%",
        "test: tokens of a sequence: 50 % 6, 90 % 10, 99 % 10, max 10, cut 0.0%",
        "model.max_seq_length: 200 would hold 99 % of the sequences",
    ]


@pytest.mark.parametrize(
    ("max_length", "positions", "expected"),
    [
        (199, None, []),
        (64, 128, ["99 % of the sequences have up to 200 tokens, but the model has 128 positions"]),
        (64, 512, ["model.max_seq_length: 200 would hold 99 % of the sequences"]),
    ],
)
def test_a_length_is_suggested_that_the_model_allows(
    max_length: int, positions: int | None, expected: list[str]
) -> None:
    """Catches a suggestion for a single long text, or one that the next start rejects."""
    assert printed(positions, train=split(range(1, 201), max_length))[1:] == expected


def test_a_terminal_shows_a_table() -> None:
    """Catches a table that is drawn with lines in a log file, or a split that it lacks."""
    lines = printed(terminal=True, train=split(range(1, 201), 150), test=split(range(1, 11), 150))
    assert "│ tokens of a sequence │" in lines[1].replace("┃", "│")
    assert any("train" in line and "25.0%" in line for line in lines)
    assert any("test" in line and "0.0%" in line for line in lines)


def test_a_split_without_sequences_has_no_lengths() -> None:
    """Catches a division by zero for a file of empty sentences."""
    lines = printed(train=split(range(1, 3), 150), test=split(range(0), 150))
    assert [line.split(":")[0] for line in lines] == ["train"]
