"""Records of decontamination, in clean.json."""

import errno
import io
import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from experiment import decontamination
from experiment.decontamination import (
    EvaluationText,
    common_decontamination,
    decontamination_of,
    is_clean_summary,
    read_clean_summary,
    texts_digests,
)
from experiment.errors import UserError
from experiment.run_files.provenance import ancestors_of, write_origin
from experiment.run_files.run_folder import RunFolder
from experiment.storage import DeniedError, MissingError, StorageError


def digest_of(texts: list[str]) -> str:
    return texts_digests([EvaluationText("test", "", text) for text in texts])["test"]


def test_tasks_of_all_steps_are_read(tmp_path: Path) -> None:
    steps = [{"name": "a", "against": {"sst2": "1"}}, {"name": "b"}, {"name": "c", "against": {"cola": "2"}}]
    (tmp_path / "clean.json").write_text(json.dumps({"recipe": "r", "read": 2, "kept": 1, "steps": steps}))
    assert common_decontamination([read_clean_summary(str(tmp_path))]) == {"sst2": "1", "cola": "2"}
    assert read_clean_summary(str(tmp_path / "none")) is None


def test_a_users_file_of_the_same_name_is_text(tmp_path: Path) -> None:
    """Catches JSON Lines that a corpus leaves out because they are in a file called clean.json."""
    (tmp_path / "clean.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert not is_clean_summary(str(tmp_path / "clean.json"))
    (tmp_path / "clean.json").write_text('{"read": 1, "kept": 1, "steps": [], "recipe": ""}')
    assert is_clean_summary(str(tmp_path / "clean.json"))
    assert not is_clean_summary(str(tmp_path / "other.json"))


@pytest.mark.parametrize("first", ['{"text": "one"}\n', f'{{"text": "{"one " * 999}"}}\n'], ids=["short", "long"])
def test_a_users_file_of_the_same_name_is_not_read_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, first: str
) -> None:
    """Catches JSON Lines of 50 GB that are loaded into memory."""

    class File(io.BytesIO):
        def read(self, *_: object) -> bytes:
            pytest.fail("reads the whole file")

    monkeypatch.setattr(decontamination, "_LINE_BYTES", 1000)
    monkeypatch.setattr(decontamination, "open_file", lambda _: File(f'{first}{{"text": "two"}}\n'.encode()))
    assert read_clean_summary(str(tmp_path)) is None


@pytest.mark.parametrize("size", [0, 1, 20, 99])
def test_a_damaged_file_is_not_text(tmp_path: Path, size: int) -> None:
    """Catches a corpus that is built without the record of its decontamination."""
    summary = json.dumps({"recipe": "r", "read": 2, "kept": 1, "steps": [], "source": 60 * "s"}, indent=2)
    assert len(summary) > 99
    (tmp_path / "clean.json").write_text(summary[:size])
    with pytest.raises(UserError, match=r"clean\.json is damaged: .* and clean them again$"):
        is_clean_summary(str(tmp_path / "clean.json"))
    (tmp_path / "clean.json").write_bytes(bytes(3 << 20))  # as after a power cut
    with pytest.raises(UserError, match=r"clean\.json is damaged"):
        is_clean_summary(str(tmp_path / "clean.json"))


@pytest.mark.parametrize(
    "error", [StorageError("no success in 5 attempts: SlowDown"), OSError(errno.EIO, "Input/output error")]
)
def test_a_file_that_cannot_be_read_for_a_moment_is_not_missing(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Catches a corpus whose record of decontamination is lost in an outage."""
    monkeypatch.setattr(decontamination, "open_file", Mock(side_effect=error))
    with pytest.raises(UserError, match=r"no success in 5 attempts|cannot read s3://b/clean.json: Input/output error"):
        read_clean_summary("s3://b")


@pytest.mark.parametrize("error", [MissingError(), DeniedError(), NotADirectoryError(), IsADirectoryError()])
def test_a_file_that_may_be_missing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Catches a corpus that is not built because its storage does not say that there is no clean.json."""
    monkeypatch.setattr(decontamination, "open_file", Mock(side_effect=error))
    assert read_clean_summary("s3://b") is None


def test_the_order_of_texts_does_not_matter() -> None:
    assert digest_of(["a", "b"]) == digest_of(["b", "a", "a"]) != digest_of(["ab"])


def test_the_digest_of_texts_is_known() -> None:
    """Catches digests that change by accident: all corpora would count as not decontaminated. Corpora for which
    short lines took whole documents have others."""
    assert digest_of(["a"]) == "b02d3196b4f387d617871102ad90b2c7"


def test_a_corpus_of_several_folders_has_what_they_share(tmp_path: Path) -> None:
    """Catches a corpus that counts as decontaminated although one of its sources was not."""
    for name, tasks in (("a", {"sst2": "1", "cola": "2"}), ("b", {"sst2.yaml": "1"}), ("c", None)):
        (tmp_path / name).mkdir()
        if tasks is not None:
            summary = {"recipe": "", "read": 1, "kept": 1, "steps": [{"name": "decontaminate", "against": tasks}]}
            (tmp_path / name / "clean.json").write_text(json.dumps(summary))
    a, b, c = (read_clean_summary(f"{tmp_path}/{name}") for name in "abc")
    assert common_decontamination([a]) == {"sst2": "1", "cola": "2"}
    assert set((common_decontamination([a, b]) or {}).values()) == {"1"}
    assert common_decontamination([a, c]) == {}
    assert common_decontamination([c]) is None


def test_the_corpora_of_a_model_and_of_its_ancestors_are_known(tmp_path: Path) -> None:
    """Catches a model that was copied, exported, or trained further, of which nothing is known any more."""
    first, second, public = (tmp_path / name for name in ("first", "second", "public"))
    for folder in (first, second, public):
        folder.mkdir()
    write_origin(first, RunFolder(first), {"run_id": "1", "ancestors": [], "decontaminated": {"books": ["1"]}}, 4)
    ancestors = ancestors_of(first, "init_from")
    write_origin(second, RunFolder(second), {"run_id": "2", "ancestors": ancestors, "decontaminated": {"web": []}}, 8)
    assert decontamination_of(second) == [("books", ["1"]), ("web", [])]
    write_origin(second, RunFolder(second), {"run_id": "3", "ancestors": ancestors_of(public, "init_from")}, 8)
    assert decontamination_of(second) == decontamination_of(public) == []
