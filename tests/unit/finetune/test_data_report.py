import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from finetune.data.records import Record, Table
from finetune.data_report import data_warnings, describe_example, print_lengths, unknown_warnings
from finetune.encoding.encoder import Tokens
from finetune.encoding.examples import Example, Split
from finetune.kinds import classification, multi_label

COLUMNS = classification.ClassificationColumns(text="text", text_pair="pair")
KIND = classification.Kind(classification.Config(columns=COLUMNS), ())


def table(split: str, *rows: tuple[str, ...]) -> Table:
    """Rows of text, second text and perhaps label."""
    records = tuple(
        Record(f"{split}:{line}", dict(zip(("text", "text_pair", "label"), row, strict=False)))
        for line, row in enumerate(rows, 2)
    )
    return Table(Path(split), records, labelled=len(rows[0]) == 3)


def oddities(**splits: list[tuple[str, ...]]) -> list[str]:
    return data_warnings({name: table(name, *rows) for name, rows in splits.items()}, KIND)


GOOD = [(f"text {number}", "more", "ab"[number % 2]) for number in range(10)]


def test_ordinary_data_is_not_remarked_upon() -> None:
    """Catches warnings that users learn to ignore."""
    assert oddities(train=GOOD, test=[("other", "more"), ("texts", "more")]) == []
    numbers = [(f"text {number}", "more", str(number // 2)) for number in range(60)]
    assert oddities(train=numbers) == []
    assert oddities(train=[(str(number), "more", ["negative", "positive"][number % 2]) for number in range(9)]) == []


def test_texts_that_splits_share_are_counted() -> None:
    """Catches scores on texts of the training split; a second text makes it another example."""
    found = oddities(train=GOOD, validation=[("text 3", "more", "b"), ("text 3", "other", "a")], test=[("new", "more")])
    assert found == ["validation: 1 of 2 rows have a text that is also in train, such as in validation:2 and train:5"]
    found = oddities(train=GOOD, validation=[("v", "v", "a"), ("w", "w", "b")], test=[("v", "v"), ("v", "v")])
    assert found == ["test: 2 of 2 rows have a text that is also in validation, such as in test:2 and validation:2"]


def test_a_label_that_a_split_lacks_is_named() -> None:
    """Catches a rare label whose F1 is 0 in every report, because the split has no row with it."""
    rare = [*GOOD, ("rare text", "more", "rare"), ("odd text", "more", "odd")]
    found = oddities(train=rare, validation=[("v", "v", "a"), ("w", "w", "b")], test=[("x", "x"), ("y", "y")])
    assert found == ["validation: no row with 2 labels of train, such as 'odd'"]


def test_labels_of_several_that_a_split_lacks_are_named() -> None:
    """Catches a rare label of a multi-label task whose F1 is 0, because the split has no row with it."""
    config = multi_label.Config()
    rows = {"train": ["x, y", "z", "x"], "validation": ["y", "x"]}
    tables = {
        split: Table(
            Path(split),
            tuple(
                Record(f"{split}:{line}", {"text": f"{split} {line}", "labels": row}) for line, row in enumerate(found)
            ),
            labelled=True,
        )
        for split, found in rows.items()
    }
    found = data_warnings(tables, multi_label.Kind(config, ("x", "y", "z")))
    assert found == ["validation: no row with 1 label of train, such as 'z'"]


def test_texts_with_different_labels_are_counted() -> None:
    """Catches duplicates that contradict each other and set a limit to every score."""
    found = oddities(train=[*GOOD, ("text 1", "more", "b"), ("text 1", "more", "a"), ("text 1", "more", "a")])
    assert found == ["train: 1 text with different labels, such as in train:3 and train:13"]


def test_the_order_of_labels_means_nothing() -> None:
    """Catches the same labels in another order taken for a contradiction, and a multi-hot vector for a set."""
    kind = multi_label.Kind(multi_label.Config(labels=("x", "y")), ("x", "y"))

    def warnings(*labels: object) -> list[str]:
        records = [Record(f"f:{line}", {"text": "a", "labels": each}) for line, each in enumerate(labels, 1)]
        return data_warnings({"train": Table(Path("f"), tuple(records), labelled=True)}, kind)

    assert warnings("x, y", "y,x", ["y", "x"]) == []
    assert warnings("x", ["x", "y"]) == ["train: 1 text with different labels, such as in f:1 and f:2"]
    assert len(warnings(["1", "0"], ["0", "1"])) == 1


def test_an_example_shows_what_the_model_gets() -> None:
    """Catches a line that shows the text, not its tokens, hides the target, shows the number of a label, or has whole
    documents."""
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda ids: [f"t{number}" for number in ids])

    def shown(count: int, target: object, *labels: str) -> str:
        example = Example((Tokens(torch.arange(count), None),), target)
        split = Split(table("train", ("a", "b", "c")), ((example,),))
        return describe_example(split, tokenizer, labels)  # type: ignore[arg-type]

    assert shown(3, 1) == "first example: t0 t1 t2; target: 1"
    assert shown(3, 1, "low", "high") == "first example: t0 t1 t2; target: high"
    assert shown(3, [1.0, 0.0, 1.0], "a", "b", "c").endswith("; target: a, c")
    assert shown(3, [0.0, 0.0], "a", "b").endswith("; target: no label")
    assert shown(3, torch.tensor([-100, 1, 0, -100]), "B-X", "O").endswith("; target: – O B-X –")
    assert shown(3, [5, 7]).endswith("; target: [5, 7]")
    assert shown(3, ["long " * 9]).endswith("; target: ['long long long long long long long lo…")
    assert shown(41, None) == f"first example: {' '.join(f't{number}' for number in range(40))} … (41 tokens)"


def test_many_unknown_tokens_are_remarked_upon() -> None:
    """Catches a model for another language, whose scores are merely bad; and remarks about rare characters."""

    def split(*ids: list[int]) -> Split:
        examples = tuple(Example((Tokens(torch.tensor(sequence), None),), None) for sequence in ids)
        return Split(table("train", *GOOD), tuple((each,) for each in examples))

    splits = {"train": split([7, 1, 1], [1, 7]), "test": split([1, *[7] * 20]), "none": split()}
    (line,) = unknown_warnings(splits, 1)
    assert line.startswith("train: 60% of the tokens are unknown")
    assert list(unknown_warnings(splits, None)) == []


def test_empty_texts_are_counted() -> None:
    """Catches rows without text that are trained on silently."""
    assert oddities(train=[*GOOD, ("text", " ", "a")]) == ["train: 1 row with an empty text"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(f"text {n}", "x", f"id{n}") for n in range(9)], "train: 9 of 9 labels occur only once, such as 'id0': is t"),
        ([(f"text {n}", "x", str(n // 2)) for n in range(80)], "train: 40 labels, and all are numbers: if they are a"),
        (
            [("ab"[n % 2], "x", f"a long text {n // 2}") for n in range(9)],
            "train: the labels are longer than the texts",
        ),
        (
            [(f"text {n}", "x", ["a", "b", "ａ\u200b"][n % 3]) for n in range(8)],
            "train: the labels 'a' (3 rows) and 'ａ\\u200b' (2 rows) look alike, but are two classes",
        ),
        ([(f"text {n}", "x", ["no", "No "][n % 2]) for n in range(8)], "train: the labels 'No ' (4 rows) and 'no' (4"),
    ],
)
def test_a_wrong_label_column_is_suspected(rows: list[tuple[str, ...]], message: str) -> None:
    """Catches training on ids, on scores or on texts as labels, detected after hours."""
    assert any(line.startswith(message) for line in oddities(train=rows))


def split(full_lengths: range, max_length: int) -> Split:
    sequences = [
        Tokens(torch.zeros(min(length, max_length)), None, cut=max(length - max_length, 0)) for length in full_lengths
    ]
    examples = tuple(Example((tokens,)) for tokens in sequences)
    return Split(Table(Path("f.csv"), (), labelled=True), tuple((each,) for each in examples))


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
