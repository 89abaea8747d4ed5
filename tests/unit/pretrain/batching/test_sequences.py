import errno
import fcntl
import multiprocessing
import os
import platform
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiment import files
from experiment.file_locks import try_lock
from pretrain.batching import sequences
from pretrain.batching.sequences import open_index, split_documents
from small_disk import SmallDisk


@given(st.lists(st.integers(1, 400), max_size=40), st.integers(1, 60))
def test_splitting_loses_nothing_and_balances(documents, capacity):
    """Catches lost or doubled tokens, sequences that are too long, and one-token tails."""
    lengths = split_documents(np.array(documents, dtype=np.int64), capacity)
    taken = 0
    for document in documents:
        parts = -(-document // capacity)
        chunk = lengths[taken : taken + parts]
        assert chunk.sum() == document
        assert chunk.max() <= capacity
        assert chunk.max() - chunk.min() <= 1
        taken += parts
    assert taken == len(lengths)


@pytest.mark.parametrize(("length", "expected"), [(10, [10]), (11, [6, 5]), (20, [10, 10]), (21, [7, 7, 7])])
def test_splitting_examples(length, expected):
    """Catches a change of the rule, which would change the stream of every existing run."""
    assert split_documents(np.array([length]), 10).tolist() == expected


@dataclass(frozen=True)
class Documents:
    """What an index needs of a corpus: documents of 10, 25 and 3 tokens."""

    path: Path
    fingerprint: str = "0123456789abcdef0123"
    name: str = "documents"
    tokens: int = 38

    def document_lengths(self):
        yield np.array([10, 25], dtype=np.int32)
        yield np.array([3], dtype=np.int32)


STARTS = [0, 10, 19, 27, 35, 38]

DAMAGE = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[:-8],
    "truncated in the header": lambda content: content[:60],
    "not an array": lambda content: b"not an array" * 20,
    "torn header": lambda content: content.replace(b"}", b"{"),
    "an archive": lambda content: b"PK\3\4" + content[4:],
    "other type": lambda content: content.replace(b"<i8", b"<f8"),
    "first": lambda content: content[:-48] + np.int64(1).tobytes() + content[-40:],
    "last": lambda content: content[:-8] + np.int64(39).tobytes(),
    "negative length": lambda content: content[:-24] + np.int64(10).tobytes() + content[-16:],
    "empty sequence": lambda content: content[:-16] + np.int64(27).tobytes() + content[-8:],
    "too long": lambda content: content[:-24] + np.int64(30).tobytes() + content[-16:],
    "flipped bit": lambda content: content[:-17] + bytes([content[-17] ^ 0x80]) + content[-16:],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("block", [1, 2, 100])
def test_a_damaged_index_is_built_again(tmp_path, monkeypatch, caplog, damage, block):
    """Catches a run that never starts with a truncated index, or trains on sequences of negative length."""
    monkeypatch.setattr(sequences, "_BLOCK", block)
    corpus = Documents(tmp_path)
    assert open_index(corpus, 10, tmp_path / "fallback").starts.tolist() == STARTS
    (file,) = (tmp_path / "index").glob("*.npy")
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[damage](whole))
    assert file.read_bytes() != whole
    caplog.clear()
    assert open_index(corpus, 10, tmp_path / "fallback").starts.tolist() == STARTS
    assert file.read_bytes() == whole
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert f"{file} is damaged (" in warnings[0]


def test_a_damaged_index_in_a_read_only_corpus_is_built_elsewhere(tmp_path, monkeypatch):
    """Catches a run that cannot start because it may not repair the index."""
    corpus = Documents(tmp_path)
    open_index(corpus, 10, tmp_path / "fallback")
    (file,) = (tmp_path / "index").glob("*.npy")
    file.write_bytes(b"")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert open_index(corpus, 10, tmp_path / "fallback").starts.tolist() == STARTS
    assert file.read_bytes() == b""


def test_a_disk_without_locks(tmp_path, monkeypatch):
    """Catches a run that cannot start on NFS without lockd, and one that waits for a lock of a node that has died."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert open_index(Documents(tmp_path), 10, tmp_path / "fallback").starts.tolist() == STARTS
    assert list((tmp_path / "index").glob("*.npy"))


def test_a_valid_index_is_not_built_again(tmp_path, monkeypatch):
    """Catches an index that is rebuilt at every start."""
    corpus = Documents(tmp_path)
    open_index(corpus, 10, tmp_path / "fallback")
    monkeypatch.setattr(sequences, "_build", None)
    assert open_index(corpus, 10, tmp_path / "fallback").starts.tolist() == STARTS


def test_a_new_index_is_verified_without_the_lock(tmp_path, monkeypatch):
    """Catches ranks that read a large index one after another, for longer than the timeout of a collective."""
    free = []

    def find_damage(*_):
        (path,) = (tmp_path / "index").glob(".*.lock")
        with path.open("ab") as file:
            free.append(try_lock(file.fileno()))
        return ""

    monkeypatch.setattr(sequences, "_find_damage", find_damage)
    open_index(Documents(tmp_path), 10, tmp_path / "fallback")
    assert free == [True]


def test_an_index_that_another_process_has_built_is_read_without_the_lock(tmp_path, monkeypatch):
    """Catches the same of the ranks that wait for the lock."""
    open_index(Documents(tmp_path), 10, tmp_path / "fallback")
    (file,) = (tmp_path / "index").glob("*.npy")
    built = file.rename(tmp_path / "built")
    events = []
    read, opened_lock = sequences._read, sequences.opened_lock

    @contextmanager
    def lock_when_it_is_built(path):
        with opened_lock(path) as lock:
            built.rename(file)
            yield lock
        events.append("unlocked")

    monkeypatch.setattr(sequences, "opened_lock", lock_when_it_is_built)
    monkeypatch.setattr(sequences, "_read", lambda path, *rest: events.append(path.exists()) or read(path, *rest))
    monkeypatch.setattr(sequences, "_build", None)
    assert open_index(Documents(tmp_path), 10, tmp_path / "fallback").starts.tolist() == STARTS
    assert events == [False, False, "unlocked", True]


def test_an_index_that_another_machine_has_built_is_not_built_again(tmp_path, monkeypatch):
    """Catches hosts that build the index one after another: NFS remembers that a name does not exist, until the folder
    is listed."""
    open_index(Documents(tmp_path), 10, tmp_path / "fallback")
    (file,) = (tmp_path / "index").glob("*.npy")
    seen, names_in, read = set(), files.names_in, sequences._read

    def listed(folder):
        seen.update(names_in(folder))
        return names_in(folder)

    monkeypatch.setattr(files, "names_in", listed)
    monkeypatch.setattr(Path, "exists", lambda path: path.name in seen or path.is_dir())
    monkeypatch.setattr(sequences, "_read", lambda path, *rest: read(path, *rest) if path.exists() else (None, ""))
    monkeypatch.setattr(sequences, "_build", None)
    assert open_index(Documents(tmp_path), 10, tmp_path / "fallback").starts.tolist() == STARTS
    assert seen >= {file.name}


def test_a_killed_build_leaves_nothing(tmp_path):
    """Catches 8 bytes per sequence that stay beside the corpus for each build that was killed."""
    with subprocess.Popen("true") as ended:
        pass
    open_index(Documents(tmp_path), 10, tmp_path / "fallback")
    (file,) = (tmp_path / "index").glob("*.npy")
    names = [path.name for path in sorted((tmp_path / "index").iterdir())]
    file.rename(file.with_name(f".{file.name}.{platform.node()}.{ended.pid}"))
    open_index(Documents(tmp_path), 10, tmp_path / "fallback")
    assert [path.name for path in sorted((tmp_path / "index").iterdir())] == names


@dataclass(frozen=True)
class ManyDocuments(Documents):
    """An index of several pages."""

    tokens: int = 4000

    def document_lengths(self):
        yield np.ones(4000, dtype=np.int32)


def open_on_full_disk(path, fallback):
    open_index(ManyDocuments(path), 10, fallback)


@pytest.mark.parametrize("free", [0, 1, 2, 5])
def test_an_index_that_does_not_fit_beside_the_corpus_is_built_elsewhere(small_disk: SmallDisk, tmp_path, caplog, free):
    """Catches SIGBUS, which a memory-mapped file gives on a full disk, and a run that a full corpus disk keeps from
    starting."""
    small_disk.fill(leave=free * 4096)
    process = multiprocessing.get_context("fork").Process(
        target=open_on_full_disk, args=(small_disk.path, tmp_path / "fallback")
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    assert len(open_index(ManyDocuments(small_disk.path), 10, tmp_path / "fallback")) == 4000
    assert "saving it in" in caplog.text
    assert list((small_disk.path / "index").glob("*.npy")) == []


def test_an_index_that_fits_nowhere_is_an_error_of_the_disk(small_disk: SmallDisk):
    """Catches an error that names no file."""
    small_disk.fill(leave=4096)
    with pytest.raises(OSError, match="No space left") as caught:
        open_index(ManyDocuments(small_disk.path / "corpus"), 10, small_disk.path / "run")
    assert str(small_disk.path / "run") in caught.value.filename
    assert [path for path in small_disk.path.rglob("*") if path.suffix not in ("", ".lock")] == []
