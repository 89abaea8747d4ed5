"""Checksums of the data of a task."""

from pathlib import Path
from unittest.mock import Mock

import pytest

from experiment.errors import UserError
from finetune.data import task_config
from finetune.data.task_config import data_checksums
from finetune.kinds.classification import Config


def test_a_changed_file_changes_its_split_only(tmp_path: Path) -> None:
    """Catches changed data that is taken for the same: of a file, of a file in a folder, and of a moved file there.
    Also a hidden file that counts, although it is not read."""
    train, test = tmp_path / "train.csv", tmp_path / "test"
    train.write_text("label,text\na,b\n")
    (test / "inner").mkdir(parents=True)
    (test / "inner" / "1.json").write_text("{}")
    task = Config(train=str(train), test={"one": str(test)})
    before = data_checksums(task)
    (test / "inner" / "._1.json").write_text("{}")
    assert data_checksums(task) == before
    assert before.keys() == {"train", "one"}
    (test / "inner" / "1.json").write_text("[]")
    edited = data_checksums(task)
    assert edited["one"] != before["one"]
    assert edited["train"] == before["train"]
    (test / "inner" / "1.json").rename(test / "2.json")
    assert data_checksums(task)["one"] != edited["one"]
    train.write_text("label,text\na,c\n")
    assert data_checksums(task)["train"] != before["train"]


def test_a_folder_that_is_read_as_a_data_set_counts_by_its_content(tmp_path: Path) -> None:
    """Catches an edited label that is taken for the same data, because the name of the folder is the same."""
    (tmp_path / "train.csv").write_text("label,text\na,b\n")
    task = Config(train=f"hub:{tmp_path}")
    before = data_checksums(task)
    (tmp_path / "train.csv").write_text("label,text\na,c\n")
    assert data_checksums(task) != before


def test_a_file_that_cannot_be_read_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, and a message that does not name the split."""
    with pytest.raises(UserError, match=r"task\.train: cannot read /nowhere\.csv: No such file"):
        data_checksums(Config(train="/nowhere.csv"))
    (tmp_path / "1.json").touch()
    monkeypatch.setattr(task_config, "checksum", Mock(side_effect=OSError(5, "Input/output error")))
    with pytest.raises(UserError, match=rf"task\.train: cannot read {tmp_path}: Input/output error"):
        data_checksums(Config(train=str(tmp_path)))
