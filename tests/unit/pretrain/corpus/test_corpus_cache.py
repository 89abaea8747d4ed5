"""Copies of corpora on a local disk."""

import errno
import fcntl
import logging
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import Mock

import pytest

from experiment import downloads
from experiment.config import build_config
from experiment.errors import UserError
from experiment.storage import FileInfo, StorageError, delete, list_files, read_bytes, upload, write_bytes
from pretrain.config import CorpusConfig
from pretrain.corpus import cache
from pretrain.corpus.cache import CorpusCache, open_metadata, read_description
from pretrain.corpus.reader import open_corpus
from small_disk import SmallDisk


@pytest.fixture
def stored(wordpiece_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of `wordpiece_corpus` in a folder, where requests take no time."""
    return f"file://{shutil.copytree(wordpiece_corpus, tmp_path_factory.mktemp('stored') / 'text')}"


@pytest.fixture
def in_bucket(bucket: str, wordpiece_corpus: Path) -> str:
    """The URL of `wordpiece_corpus` in object storage."""
    for path in wordpiece_corpus.rglob("*"):
        if path.is_file():
            upload(path, f"{bucket}/corpora/text/{path.relative_to(wordpiece_corpus)}")
    return f"{bucket}/corpora/text"


def release(copy: Path) -> None:
    """Close the locks of a copy, as the end of the process that uses it does."""
    for descriptor in Path("/proc/self/fd").iterdir():
        if descriptor.exists() and descriptor.samefile(copy.parent / ".lock"):
            os.close(int(descriptor.name))


def files_below(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_copies_of_a_folder_and_of_a_url_are_equal(stored: str, wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a copy with another name or fingerprint, which results would depend on, and two copies of one corpus."""
    cache = CorpusCache(tmp_path / "cache")
    found = cache.locate(stored)
    assert found == cache.locate(str(wordpiece_corpus))
    copy, original = open_corpus(found), open_corpus(wordpiece_corpus)
    assert (copy.name, copy.fingerprint) == (original.name, original.fingerprint)
    assert copy.path.is_relative_to(tmp_path / "cache")
    assert all(copy.find_damage(shard) is None for shard in copy.manifest.shards)
    assert copy.tokenizer_path.joinpath("tokenizer.json").exists()
    assert not list(copy.path.glob("index/*"))


def test_a_url_is_opened_without_its_documents(stored: str, wordpiece_corpus: Path) -> None:
    """Catches a launcher that copies a corpus of terabytes to plan a run."""
    corpus = open_metadata(stored)
    assert corpus.fingerprint == open_corpus(wordpiece_corpus).fingerprint
    assert corpus.tokenizer_path.joinpath("tokenizer.json").exists()
    assert not list(corpus.path.glob("*.arrow"))


def test_what_is_complete_is_not_copied_again(in_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a host that copies at every start, or all files if one is missing."""
    cache = CorpusCache(tmp_path)
    folder = cache.locate(in_bucket)
    release(folder)
    shards = sorted(folder.glob("*.arrow"))
    before = {path: path.stat().st_ino for path in folder.rglob("*") if path.is_file()}
    content = shards[0].read_bytes()
    shards[0].unlink()
    (folder / f".{shards[0].name}.partial").write_bytes(content[:1000])  # where it was interrupted
    opened: list[str] = []
    original = downloads.open_url
    monkeypatch.setattr(
        downloads, "open_url", lambda url, start=0: opened.append(f"{url}@{start}") or original(url, start)
    )
    cache.locate(in_bucket)
    assert f"{in_bucket}/{shards[0].name}@1000" in opened
    assert shards[0].read_bytes() == content
    after = {path: path.stat().st_ino for path in folder.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    assert [name for name in opened if name.endswith("@0")] == []


def test_one_corpus_under_two_names(wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a process that waits for itself: the copy of the first name is locked."""
    (tmp_path / "latest").symlink_to(wordpiece_corpus)
    sources = [str(wordpiece_corpus), str(tmp_path / "latest")]
    calls: list[None] = []
    cache = CorpusCache(
        tmp_path / "cache", on_progress=lambda: calls.append(None) if len(calls) < 20 else pytest.fail("waits")
    )
    assert [cache.locate(source).name for source in sources] == [wordpiece_corpus.name, "latest"]


@pytest.mark.parametrize("is_url", [False, True])
def test_other_files_are_not_copied(wordpiece_corpus: Path, tmp_path: Path, is_url: bool) -> None:
    """Catches a backup in the folder of a corpus that is read into memory and written to each host, and a file of the
    corpus that is not."""
    folder = Path(shutil.copytree(wordpiece_corpus, tmp_path / "text"))
    (folder / "clean.json").write_text("[]")
    expected = {name for name in files_below(folder) if not name.startswith(("index/", "."))}
    assert expected >= {"manifest.json", "dataset_info.json", "state.json", "tokenizer/tokenizer.json"}
    for name in ("text.tar", "backup/manifest.json", "tokenizer/.hidden"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    assert files_below(CorpusCache(tmp_path / "cache").locate(f"file://{folder}" if is_url else str(folder))) == {
        name: (folder / name).stat().st_size for name in expected
    }


def test_paths_that_lead_out_of_the_folder(stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bucket with names of objects that make a command write files anywhere."""
    outside = [str(tmp_path / "x"), "tokenizer/../../../x", "../x"]
    found = list_files(stored) | {f"{stored}/{name}": FileInfo(1, "") for name in outside}
    monkeypatch.setattr(cache, "list_files", lambda _: found)
    monkeypatch.setattr(cache, "read_bytes", lambda url: read_bytes(url) if url in list_files(stored) else b"x")
    copy = CorpusCache(tmp_path / "cache").locate(stored)
    assert open_metadata(stored).manifest == open_corpus(copy).manifest
    assert not list(tmp_path.rglob("x"))


@pytest.mark.parametrize("kind", ["folder", "url", "metadata"])
def test_files_beside_the_shards_are_current(wordpiece_corpus: Path, tmp_path: Path, kind: str) -> None:
    """Catches an old tokenizer in the copy, and the rest of a longer file that is appended to an older one."""
    folder = tmp_path / "text"
    shutil.copytree(wordpiece_corpus, folder)
    source = str(folder) if kind == "folder" else f"file://{folder}"
    for change in ("", " ", "\n  \n", ""):
        (folder / "tokenizer" / "tokenizer.json").write_text(
            (wordpiece_corpus / "tokenizer" / "tokenizer.json").read_text() + change
        )
        if kind == "metadata":
            copy = open_metadata(source).path
        else:
            copy = CorpusCache(tmp_path / "cache").locate(source)
            release(copy)
        assert (copy / "tokenizer" / "tokenizer.json").read_text().endswith("}" + change)


def test_a_copy_in_use_outlives_errors_of_the_source(wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a copy that is deleted under a run because another run cannot read the source."""
    folder = tmp_path / "text"
    shutil.copytree(wordpiece_corpus, folder)
    copy = CorpusCache(tmp_path / "cache").locate(str(folder))
    (folder / "tokenizer" / "notes").symlink_to("/proc/self/mem")  # reading it fails
    assert CorpusCache(tmp_path / "cache").locate(str(folder)) == folder
    assert open_corpus(copy).manifest == open_corpus(folder).manifest


def test_a_damaged_copy_is_copied_again(stored: str, tmp_path: Path) -> None:
    """Catches a copy that stays damaged, so that no run can use the host."""
    cache = CorpusCache(tmp_path)
    folder = cache.locate(stored)
    release(folder)
    shard = next(folder.glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    corpus = open_corpus(cache.locate(stored))
    assert all(corpus.find_damage(shard) is None for shard in corpus.manifest.shards)


def test_a_damaged_original(stored: str, tmp_path: Path) -> None:
    """Catches damage in object storage that reaches a run."""
    shard = next(name for name in list_files(stored) if name.endswith(".arrow"))
    content = bytearray(read_bytes(shard))
    content[-100] ^= 1
    write_bytes(shard, bytes(content))
    with pytest.raises(StorageError, match=f"^{shard} is damaged: found checksum [0-9a-f]*, expected "):
        CorpusCache(tmp_path).locate(stored)


def test_one_of_several_processes_copies(wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches runs on one host that write the same files at the same time. (Locks of files opened twice are those of
    two processes.)"""
    source = str(wordpiece_corpus)
    waits: list[int] = []

    def locate(number: int) -> Path:
        return CorpusCache(tmp_path, on_progress=lambda: waits.append(number)).locate(source)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(locate, range(4)))
    assert found == [found[0]] * 4
    assert files_below(tmp_path).keys() >= {f"{found[0].relative_to(tmp_path)}/manifest.json"}
    assert not [name for name in files_below(tmp_path) if name.endswith(".partial")]


def test_a_process_that_waits_holds_no_lock(wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches processes that start at the same time, wait with a shared lock each, and refuse each other the right to
    copy."""
    source = str(wordpiece_corpus)
    manifest = open_corpus(wordpiece_corpus).manifest
    path = CorpusCache(tmp_path).folder_of(source, read_description(source)).parent / ".lock"
    path.parent.mkdir(parents=True)
    with path.open("w") as other:  # of another process that has just looked
        fcntl.flock(other, fcntl.LOCK_SH)
        waited = Event()

        def take_turns() -> None:
            if not waited.is_set():  # later it is called while the corpus is copied
                waited.set()
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(other, fcntl.LOCK_UN)

        found = CorpusCache(tmp_path, on_progress=take_turns).locate(source)
    assert waited.is_set()
    assert open_corpus(found).manifest == manifest


def test_a_disk_without_locks(
    wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback on Lustre without `-o flock`, and a copy that is deleted or made again although it may be in
    use."""
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))))
    text, heldout = str(wordpiece_corpus), str(heldout_corpus)
    size = sum(files_below(CorpusCache(tmp_path / "sizes").locate(heldout)).values())
    copy = CorpusCache(tmp_path / "cache").locate(text)
    assert copy.is_relative_to(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(CorpusCache, "_copy", lambda *_: pytest.fail("copies again"))
        assert CorpusCache(tmp_path / "cache").locate(text) == copy
    assert CorpusCache(tmp_path / "cache", size + 1000).locate(heldout) == heldout_corpus
    assert open_corpus(copy).manifest == open_corpus(wordpiece_corpus).manifest


@pytest.mark.parametrize("full", ["cache", "disk"])
def test_the_copy_that_was_not_used_for_longest_is_deleted(
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    byte_level_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    full: str,
) -> None:
    """Catches a limit that deletes a copy in use, deletes too much, or is exceeded, and a full disk for which
    nothing is deleted."""
    text, heldout, other = map(str, (wordpiece_corpus, heldout_corpus, byte_level_corpus))
    sizes = {}
    for source in (text, heldout, other):
        cache = CorpusCache(tmp_path / "sizes")
        sizes[source] = sum(files_below(cache.locate(source)).values())
    room = max(sizes[text], sizes[other]) + sizes[heldout] + 1000
    limit = room if full == "cache" else 1e12
    if full == "disk":
        monkeypatch.setattr(
            shutil,
            "disk_usage",
            lambda folder: shutil._ntuple_diskusage(0, 0, room - sum(files_below(folder).values())),
        )
    first, second = (CorpusCache(tmp_path / "cache", limit).locate(source) for source in (text, heldout))
    os.utime(first.parent / ".lock", (time.time() - 10, time.time() - 10))
    os.utime(second.parent / ".lock", (time.time() - 20, time.time() - 20))
    release(first)
    third = CorpusCache(tmp_path / "cache", limit).locate(other)
    assert (first.exists(), second.exists(), third.exists()) == (False, True, True)
    assert third.is_relative_to(tmp_path / "cache")
    with pytest.raises(
        UserError, match=r"^corpus.cache: .* corpus.cache_gib allows .* MiB, expected .* or another user's$"
    ):
        CorpusCache(tmp_path / "cache", 10).locate(f"file://{text}")


def give_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a folder be one of another user, for root too."""
    original_open, original_access = os.open, os.access

    def open_to_read(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if Path(path).is_relative_to(folder) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return original_open(path, flags, *arguments, **options)

    def access(path: Any, mode: int) -> bool:
        return original_access(path, mode) and not (Path(path).is_relative_to(folder) and mode & os.W_OK)

    monkeypatch.setattr(os, "open", open_to_read)
    monkeypatch.setattr(os, "access", access)
    monkeypatch.setattr(os, "utime", Mock(side_effect=PermissionError(errno.EACCES, os.strerror(errno.EACCES))))


def test_the_copy_of_another_user(
    stored: str,
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    byte_level_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a run that is refused, or reads a slow disk, because it may not write to a copy, nor delete the least
    recently used one."""
    cache = CorpusCache(tmp_path / "cache")
    theirs, ours = cache.locate(stored), cache.locate(str(heldout_corpus))
    release(theirs)
    release(ours)
    os.utime(theirs.parent / ".lock", (0, 0))
    give_away(theirs.parent, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(CorpusCache, "_copy", lambda *_: pytest.fail("copies again"))
        for source in (stored, str(wordpiece_corpus)):
            assert CorpusCache(cache.folder).locate(source) == theirs
    other = CorpusCache(tmp_path / "sizes").locate(str(byte_level_corpus))
    limit = sum(sum(files_below(folder).values()) for folder in (theirs, ours, other)) - 1
    assert CorpusCache(cache.folder, limit).locate(str(byte_level_corpus)).is_relative_to(cache.folder)
    assert (theirs.exists(), ours.exists()) == (True, False)


def test_an_incomplete_copy_of_another_user(
    stored: str, heldout_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches copies that are deleted to make space for one that cannot be written."""
    cache = CorpusCache(tmp_path / "cache")
    theirs, ours = cache.locate(stored), cache.locate(str(heldout_corpus))
    release(theirs)
    release(ours)
    limit = sum(files_below(theirs).values())
    (theirs / "manifest.json").unlink()  # their run was killed
    give_away(theirs.parent, monkeypatch)
    with pytest.raises(UserError, match="Permission denied"):
        CorpusCache(cache.folder, limit).locate(stored)
    assert ours.exists()


@pytest.mark.parametrize("full", ["cache", "disk"])
def test_no_copy_is_deleted_if_that_is_not_enough(
    wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    """Catches copies that other runs must make again, although the new one fits in neither case."""
    cache = CorpusCache(tmp_path / "cache", 10 if full == "cache" else 1e12)
    folder = CorpusCache(tmp_path / "cache").locate(str(heldout_corpus))
    release(folder)
    if full == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, -(10**9)))
    assert cache.locate(str(wordpiece_corpus)) == wordpiece_corpus
    assert open_corpus(folder).documents


def test_copies_that_vanish_while_the_cache_is_measured(
    wordpiece_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that does not start because another one deletes a copy."""
    gone = tmp_path / "cache" / "0123456789abcdef" / "text"
    gone.mkdir(parents=True)
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scandir(gone / "deleted" if str(path) == str(gone) else path))
    copy = CorpusCache(tmp_path / "cache", 1e9).locate(str(wordpiece_corpus))
    assert open_corpus(copy).fingerprint == open_corpus(wordpiece_corpus).fingerprint
    assert copy.is_relative_to(tmp_path / "cache")


def test_a_full_disk(
    wordpiece_corpus: Path, small_disk: SmallDisk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that does not start because a local disk is full, although it could read the shared disk."""
    caplog.set_level(logging.WARNING)
    cache, source = CorpusCache(small_disk.path / "cache"), str(wordpiece_corpus)
    small_disk.fill()
    assert cache.locate(source) == wordpiece_corpus
    assert f"reading {source} instead of a copy" in caplog.text
    with pytest.raises(UserError, match=f"^corpus.cache: file://{source} cannot be copied to {cache.folder}: "):
        cache.locate(f"file://{source}")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 10**12))  # full a moment later
    assert cache.locate(source) == wordpiece_corpus


def test_a_bucket_that_vanishes(in_bucket: str, tmp_path: Path) -> None:
    """Catches a copy that goes on without files that are gone."""
    shard = next(name for name in list_files(in_bucket) if name.endswith(".arrow"))
    delete(shard)
    with pytest.raises(StorageError, match=f"^{shard} does not exist$"):
        CorpusCache(tmp_path).locate(in_bucket)
    delete(in_bucket)
    with pytest.raises(StorageError, match=f"^{in_bucket}/manifest.json does not exist$"):
        CorpusCache(tmp_path).locate(in_bucket)


def test_configs() -> None:
    """Catches URLs that reach code for folders."""
    with pytest.raises(UserError, match=r"s3://b/x is a URL: set 'cache' to a folder on a local disk"):
        build_config(CorpusConfig, {"train": "s3://b/x"})
    with pytest.raises(UserError, match=r"s3://b/x is a URL: set 'cache'"):
        build_config(CorpusConfig, {"train": "x", "eval": {"x": "s3://b/x"}})
    with pytest.raises(UserError, match=r"'cache_gib' limits 'cache', which is missing"):
        build_config(CorpusConfig, {"train": "x", "cache_gib": 1.0})
    with pytest.raises(UserError, match=r"'cache': expected a folder on a local disk, found the URL s3://b/c"):
        build_config(CorpusConfig, {"train": "x", "cache": "s3://b/c"})
    config = build_config(CorpusConfig, {"train": "s3://b/x", "eval": {"x": "y", "z": "s3://b/x"}, "cache": "c"})
    assert config.sources == ("s3://b/x", "y")
