"""Records of decontamination, in clean.json."""

import json
from pathlib import Path

from experiment.decontamination import is_clean_summary, read_decontamination, texts_digest


def test_tasks_of_all_steps_are_read(tmp_path: Path) -> None:
    steps = [{"name": "a", "against": {"sst2": "1"}}, {"name": "b"}, {"name": "c", "against": {"cola": "2"}}]
    (tmp_path / "clean.json").write_text(json.dumps({"recipe": "r", "read": 2, "kept": 1, "steps": steps}))
    assert read_decontamination(tmp_path) == {"sst2": "1", "cola": "2"}
    assert read_decontamination(tmp_path / "none") is None


def test_a_users_file_of_the_same_name_is_text(tmp_path: Path) -> None:
    """Catches JSON Lines that a corpus leaves out because they are in a file called clean.json."""
    (tmp_path / "clean.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert not is_clean_summary(tmp_path / "clean.json")
    (tmp_path / "clean.json").write_text('{"read": 1, "kept": 1, "steps": [], "recipe": ""}')
    assert is_clean_summary(tmp_path / "clean.json")
    assert not is_clean_summary(tmp_path / "other.json")


def test_the_order_of_texts_does_not_matter() -> None:
    assert texts_digest(["a", "b"]) == texts_digest(["b", "a", "a"]) != texts_digest(["ab"])
