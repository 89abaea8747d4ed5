from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from experiment.errors import UserError
from finetune.data.columns import Columns, LabelColumn, TextColumn, TextsColumn
from finetune.data.records import read_table


class ParquetColumns(Columns):
    label: LabelColumn = "label"
    text: TextColumn = "text"
    choices: TextsColumn = "choices"


def test_texts_lists_and_numbers(tmp_path: Path) -> None:
    """Catches lists and whole numbers that arrive as something else than in JSON, and rows of later batches lost."""
    path = tmp_path / "a.parquet"
    columns = {"label": [1, 0], "text": ["one", "two"], "choices": [["a", "b"], []], "idx": [0, 1]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=1)
    table = read_table(path, ParquetColumns())
    assert [dict(record.values) for record in table.records] == [
        {"label": "1", "text": "one", "choices": ["a", "b"]},
        {"label": "0", "text": "two", "choices": []},
    ]
    assert table.records[1].place == f"{path}, row 2"


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    """Catches a traceback of pyarrow."""
    path = tmp_path / "a.parquet"
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet: No such file"):
        read_table(path, ParquetColumns())
    path.write_bytes(b"PAR1, and then nothing")
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet: .*Parquet"):
        read_table(path, ParquetColumns())
    pyarrow.parquet.write_table(pyarrow.table({"label": ["1", None], "text": ["a", "b"]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: no column 'choices'; found: label, text"):
        read_table(path, ParquetColumns())
