import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from experiment.errors import UserError
from finetune.data.columns import Columns, LabelColumn
from finetune.data.records import Record, Table
from finetune.data.splits import read_splits, related_records, split_off
from finetune.data.task_config import TaskConfig
from finetune.kinds import multi_label
from finetune.kinds.classification import ClassificationColumns
from finetune.kinds.multiple_choice import MultipleChoiceColumns
from finetune.kinds.question_answering import QuestionAnsweringColumns
from finetune.kinds.regression import RegressionColumns
from finetune.prepared_task import make_kind
from finetune.task_kind import find_kind

TEXTS = ClassificationColumns()


def table(*rows: dict[str, object]) -> Table:
    return Table(Path("f.csv"), tuple(Record(f"f.csv:{line}", row) for line, row in enumerate(rows, 2)), labelled=True)


def draw(table: Table, columns: Columns, share: float, seed: int) -> tuple[Table, Table]:
    return split_off(table, TaskConfig(columns=columns, metric="", validation_share=share, split_seed=seed))


def labels(table: Table) -> Counter[str]:
    return Counter(record.values["label"] for record in table.records)


LABELLED = table(*({"text": str(number), "label": "rare" if number % 10 == 3 else "common"} for number in range(200)))


def test_the_share_has_as_much_of_each_label() -> None:
    """Catches a rare label that is missing in validation, and a row in both splits or in none."""
    train, validation = draw(LABELLED, TEXTS, share=0.1, seed=0)
    assert labels(train) == {"common": 162, "rare": 18}
    assert labels(validation) == {"common": 18, "rare": 2}
    places = [record.place for split in (train, validation) for record in split.records]
    assert sorted(places) == sorted(record.place for record in LABELLED.records)


def test_rows_of_the_share_are_counted_in_it() -> None:
    """Catches row numbers that have gaps where rows of the file were skipped."""
    records = tuple(replace(record, row=number + number // 50) for number, record in enumerate(LABELLED.records, 1))
    for split in draw(replace(LABELLED, records=records), TEXTS, 0.1, seed=0):
        assert [record.row for record in split.records] == [*range(1, len(split) + 1)]


def test_the_seed_decides() -> None:
    """Catches a split that differs between the seeds of a run or after a resume, and a seed that has no effect."""
    assert draw(LABELLED, TEXTS, 0.1, seed=0) == draw(LABELLED, TEXTS, 0.1, seed=0)
    assert draw(LABELLED, TEXTS, 0.1, seed=0) != draw(LABELLED, TEXTS, 0.1, seed=1)


def test_a_label_that_occurs_once_stays_in_train() -> None:
    """Catches a label in validation that the model cannot know."""
    once = table(*({"text": "", "label": str(number)} for number in range(50)), *[{"text": "", "label": "twice"}] * 2)
    for seed in range(20):
        train, validation = draw(once, TEXTS, 0.5, seed)
        assert labels(validation) == {"twice": 1}
        assert labels(train)["twice"] == 1


def test_rows_without_a_label() -> None:
    """Catches numbers to predict that are taken for labels which occur once."""
    numbers = table(*({"label": number / 7, "text": "a"} for number in range(40)))
    _, validation = draw(numbers, RegressionColumns(), 0.25, seed=0)
    assert len(validation) == 10


def test_the_texts_of_right_choices_are_not_labels() -> None:
    """Catches questions that stay in train because no other has the same answer."""
    answers = ["yes"] * 40 + [f"answer {number}" for number in range(160)]
    asked = table(*({"question": "", "choices": [answer, "no"], "label": answer} for answer in answers))
    _, validation = draw(asked, MultipleChoiceColumns(), 0.1, seed=0)
    assert len(validation) == 20
    assert labels(validation)["yes"] < 20


def test_labels_of_any_role_are_balanced() -> None:
    """Catches a rare label that is missing in validation because its kind calls the column something else."""

    class Emotions(Columns):
        emotion: LabelColumn = "emotion"

    rows = table(*({"emotion": "rare" if number % 10 == 3 else "common"} for number in range(200)))
    _, validation = draw(rows, Emotions(), 0.1, seed=0)
    assert Counter(record.values["emotion"] for record in validation.records) == {"common": 18, "rare": 2}


@pytest.mark.parametrize("labels", [["b", "a"], "b, a", ["1", "1", "0"]])
def test_rare_labels_of_several_are_in_both_splits(labels: object) -> None:
    """Catches a rare label of a multi-label task without a row in validation, or in train."""
    config = multi_label.Config(labels=("a", "b", "c"))
    for seed in range(20):
        rows = table(*({"text": "", "labels": labels if number % 20 == 3 else "a"} for number in range(200)))
        train, validation = split_off(rows, config.model_copy(update={"split_seed": seed}))
        counts = [
            sum("b" in config.labels_of(record.values) for record in split.records) for split in (train, validation)
        ]
        assert counts == [9, 1]
        assert len(validation) == 20


def test_labels_that_occur_once_do_not_keep_rows_in_train() -> None:
    """Catches a validation split that shrinks, or cannot be drawn, because each row has a tag of its own."""
    rows = table(*({"text": "", "labels": f"{'ab'[number % 2]}, tag {number % 150}"} for number in range(200)))
    _, validation = split_off(rows, multi_label.Config())
    counts = Counter(record.values["labels"][0] for record in validation.records)
    assert len(validation) == 20
    assert 7 <= counts["a"] <= 13


def test_questions_on_one_text_stay_together() -> None:
    """Catches a validation split whose texts are all known from train."""
    rows = table(*({"context": str(number // 4), "question": str(number)} for number in range(80)))
    train, validation = draw(rows, QuestionAnsweringColumns(), 0.1, seed=0)
    assert len(validation) == 8
    contexts = [{record.values["context"] for record in split.records} for split in (train, validation)]
    assert not contexts[0] & contexts[1]


def test_questions_without_a_text_are_not_related() -> None:
    """Catches a validation split with all rows whose context is empty, or with none of them."""
    rows = table(*({"context": "" if number % 2 else str(number), "question": str(number)} for number in range(80)))
    assert related_records(rows.records, QuestionAnsweringColumns()) == [[number] for number in range(80)]


def test_labels_of_a_drawn_validation_split_are_known() -> None:
    """Catches a rare label of the training file that is unknown because its row was drawn for validation."""
    config = multi_label.Config(train="f.jsonl")
    train, drawn = table({"text": "a", "labels": ["x", "y"]}), table({"text": "b", "labels": ["z"]})
    assert make_kind(config, {"train": train, "validation": drawn}).labels == ("x", "y", "z")
    given = config.model_copy(update={"validation": "v.jsonl"})
    assert make_kind(given, {"train": train, "validation": drawn}).labels == ("x", "y")


@pytest.mark.parametrize(
    ("kind", "train", "labels", "labelled"),
    [
        ("classification", "-1", None, True),
        ("classification", "0", None, False),
        ("classification", "0", ("-1", "0", "1"), True),
        ("regression", "-1", None, False),
    ],
)
def test_minus_one_in_all_rows_of_a_test_split(
    tmp_path: Path, kind: str, train: str, labels: tuple[str, ...] | None, labelled: bool
) -> None:
    """Catches a test split with the label -1 that is not scored, and one without targets that is: -1 is a number like
    others in the training data of a regression."""
    files = {"train": f"text,label\na,{train}\nb,1\n", "validation": "text,label\na,1\n", "test": "text,label\na,-1\n"}
    for split, content in files.items():
        (tmp_path / f"{split}.csv").write_text(content)
    paths = {split: str(tmp_path / f"{split}.csv") for split in files}
    given = {} if labels is None else {"labels": labels}
    config = find_kind(kind).config_type(**paths, **given, columns={"text": "text"})
    assert read_splits(config, None)["test"].labelled == labelled


def test_a_dash_that_is_no_label_of_the_training_split(tmp_path: Path) -> None:
    """Catches an unknown label where annotators disagreed, if the training split has no such rows."""
    files = {"train": ["x", "y", "z"], "validation": ["-", "x"], "test": ["-", "-"]}
    for split, labels in files.items():
        rows = (json.dumps({"text": "a", "label": label}) for label in labels)
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    paths = {split: str(tmp_path / f"{split}.jsonl") for split in files}
    read = read_splits(find_kind("classification").config_type(**paths, columns={"text": "text"}), None)
    assert [record.values for record in read["validation"].records] == [{"label": "x", "text": "a"}]
    assert (len(read["test"]), read["test"].labelled) == (2, False)
    given = find_kind("classification").config_type(**paths, columns={"text": "text"}, labels=("x", "y", "z", "-"))
    assert read_splits(given, None)["test"].labelled


def test_too_few_rows_are_rejected() -> None:
    """Catches an empty validation split."""
    with pytest.raises(UserError, match=r"f\.csv: too few rows to take a validation split from; set task\.validation"):
        draw(table(*[{"label": "a"}] * 4, {"label": "b"}), TEXTS, 0.1, seed=0)


@pytest.mark.parametrize(("texts", "found"), [(1, "1 text"), (9, "9 texts")])
def test_few_texts_are_named_as_the_reason(texts: int, found: str) -> None:
    """Catches 900 questions that are called too few rows because they are on a few texts, which stay together."""
    rows = table(*({"context": str(number % texts), "question": "", "answers": []} for number in range(900)))
    advice = ", or raise task.validation_share" if texts > 1 else ""
    message = f"only {found} (task.columns.context) for 900 rows, too few to take a validation split from; set "
    with pytest.raises(UserError, match=re.escape(f"{message}task.validation to a file{advice}") + "$"):
        draw(rows, QuestionAnsweringColumns(), 0.1, seed=0)
    turns = replace(LABELLED, records=tuple(replace(record, group="1") for record in LABELLED.records))
    with pytest.raises(UserError, match=r"only 1 dialogue \(task\.dialogue\.group\) for 200 rows"):
        draw(turns, TEXTS, 0.1, seed=0)


def test_labels_that_occur_once_are_named_as_the_reason() -> None:
    """Catches hundreds of rows called too few because task.columns.label names the column of the texts."""
    swapped = table(*({"text": "good", "label": f"a film about {number}"} for number in range(200)))
    with pytest.raises(
        UserError, match=r"200 of its 200 rows have a label that no other row has: is task\.columns\.label"
    ):
        draw(swapped, TEXTS, 0.1, seed=0)
    several = table(*({"text": "", "labels": [f"{number} a", f"{number} b"]} for number in range(200)))
    with pytest.raises(UserError, match=r"200 of its 200 rows have a label .*: is task\.columns\.labels the column of"):
        split_off(several, multi_label.Config())


def test_rows_that_are_trained_on_together_have_numbers_of_their_own(tmp_path: Path) -> None:
    """Catches a row with the number of another, or, where rows are left out, another number than in its file."""
    for split, labels in {"train": "xyz-xyz", "validation": "-xy"}.items():
        rows = (json.dumps({"text": "a", "label": label}) for label in labels)
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    paths = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
    config = find_kind("classification").config_type(**paths, columns={"text": "text"}, labels=("x", "y", "z"))
    train = read_splits(config, None, "train+validation")["train"]
    assert [record.row for record in train.records] == [1, 2, 3, 5, 6, 7, 9, 10]
