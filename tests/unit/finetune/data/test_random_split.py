from collections import Counter
from pathlib import Path

import pytest

from experiment.errors import UserError
from finetune.data.random_split import split_off
from finetune.data.records import Record, Table


def table(*rows: dict[str, object]) -> Table:
    return Table(Path("f.csv"), tuple(Record(f"f.csv:{line}", row) for line, row in enumerate(rows, 2)), labelled=True)


def labels(table: Table) -> Counter[str]:
    return Counter(record.values["label"] for record in table.records)


LABELLED = table(*({"text": str(number), "label": "rare" if number % 10 == 3 else "common"} for number in range(200)))


def test_the_share_has_as_much_of_each_label() -> None:
    """Catches a rare label that is missing in validation, and a row in both splits or in none."""
    train, validation = split_off(LABELLED, share=0.1, seed=0)
    assert labels(train) == {"common": 162, "rare": 18}
    assert labels(validation) == {"common": 18, "rare": 2}
    places = [record.place for split in (train, validation) for record in split.records]
    assert sorted(places) == sorted(record.place for record in LABELLED.records)


def test_the_seed_decides() -> None:
    """Catches a split that differs between the seeds of a run or after a resume, and a seed that has no effect."""
    assert split_off(LABELLED, 0.1, seed=0) == split_off(LABELLED, 0.1, seed=0)
    assert split_off(LABELLED, 0.1, seed=0) != split_off(LABELLED, 0.1, seed=1)


def test_a_label_that_occurs_once_stays_in_train() -> None:
    """Catches a label in validation that the model cannot know."""
    once = table(*({"text": "", "label": str(number)} for number in range(50)), *[{"text": "", "label": "twice"}] * 2)
    for seed in range(20):
        train, validation = split_off(once, 0.5, seed)
        assert labels(validation) == {"twice": 1}
        assert labels(train)["twice"] == 1


def test_rows_without_a_label() -> None:
    """Catches numbers or lists of tags that are taken for labels which occur once."""
    _, validation = split_off(table(*({"label": number / 7, "text": "a"} for number in range(40))), 0.25, seed=0)
    assert len(validation) == 10


def test_questions_on_one_text_stay_together() -> None:
    """Catches a validation split whose texts are all known from train."""
    rows = table(*({"context": str(number // 4), "question": str(number)} for number in range(80)))
    train, validation = split_off(rows, 0.1, seed=0)
    assert len(validation) == 8
    contexts = [{record.values["context"] for record in split.records} for split in (train, validation)]
    assert not contexts[0] & contexts[1]


def test_too_few_rows_are_rejected() -> None:
    """Catches an empty validation split."""
    with pytest.raises(UserError, match=r"f\.csv: too few rows to take a validation split from; set task\.validation"):
        split_off(table(*[{"label": "a"}, {"label": "b"}]), 0.1, seed=0)
