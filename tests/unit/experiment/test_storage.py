"""Files by URL, on a real server."""

import hashlib
import logging
import os
import platform
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread, get_ident

import pytest

from experiment import downloads, storage
from experiment.downloads import Download, download, local_folder
from experiment.errors import UserError
from experiment.storage import (
    DeniedError,
    FileInfo,
    StorageError,
    delete,
    exists,
    list_files,
    list_folders,
    open_url,
    read_bytes,
    stat_file,
    upload,
    write_bytes,
)
from rank_pool import free_port
from s3_server import Fault, Proxy, proxy, response

CONTENT = os.urandom(3 << 20)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
BUSY = response("503 Slow Down", "SlowDown", "Please reduce your request rate.")
SLOW = response("408 Request Timeout", "RequestTimeout", "The connection was not read from or written to in time.")
EXPIRED = response("403 Forbidden", "ExpiredToken", "The provided token has expired.")


def put(bucket: str, **files: bytes) -> None:
    for name, content in files.items():
        write_bytes(f"{bucket}/{name}", content)


def sizes_of(url: str) -> dict[str, int]:
    return {name: info.size for name, info in list_files(url).items()}


def test_lists_a_file_a_folder_and_a_pattern(bucket: str) -> None:
    """Catches a listing that lacks files in subfolders, has folders, or is that of before a write."""
    put(bucket, **{"a/1.txt": b"1", "a/b/2.txt": b"22", "c.txt": b"333"})
    assert sizes_of(f"{bucket}/c.txt") == {f"{bucket}/c.txt": 3}
    assert sizes_of(f"{bucket}/a") == {f"{bucket}/a/1.txt": 1, f"{bucket}/a/b/2.txt": 2}
    assert sizes_of(f"{bucket}/a/*.txt") == {f"{bucket}/a/1.txt": 1}
    assert list_folders(f"{bucket}/a") == ["b"]
    put(bucket, **{"a/d/3.txt": b"1", "a/4.txt": b"1"})
    assert f"{bucket}/a/4.txt" in list_files(f"{bucket}/a/*.txt")
    assert list_folders(f"{bucket}/a") == ["b", "d"]
    assert list_folders(f"{bucket}/missing") == []
    delete(f"{bucket}/a")
    delete(f"{bucket}/a")
    assert not exists(f"{bucket}/a")
    assert exists(f"{bucket}/c.txt")


def test_similar_and_unusual_names(bucket: str) -> None:
    """Catches files of a folder whose name begins in the same way, and a name that is taken for a pattern."""
    import s3fs

    put(bucket, **{"ab/1": b"1", "abc/2": b"22", "x[1].txt": b"333"})
    folder = {"Bucket": bucket.removeprefix("s3://"), "Key": "ab/"}  # as consoles make them
    s3fs.S3FileSystem(**storage._OPTIONS["s3"]).call_s3("put_object", **folder)
    assert sizes_of(f"{bucket}/ab") == {f"{bucket}/ab/1": 1}
    assert not exists(f"{bucket}/a")
    assert stat_file(f"{bucket}/x[1].txt") == list_files(bucket)[f"{bucket}/x[1].txt"]
    delete(f"{bucket}/ab")
    assert list_folders(bucket) == ["abc"]


@pytest.mark.parametrize("how", ["write_bytes", "upload"])
def test_a_file_on_a_disk_is_replaced_not_overwritten(tmp_path: Path, how: str) -> None:
    """Catches a mirror in a folder with half of a run's metrics after a kill or on a full disk, and a file for each
    kill that stays there."""
    (tmp_path / "source").write_bytes(CONTENT)
    target = tmp_path / "new" / "x.bin"
    url = f"file://{target}"
    write_bytes(url, b"before")
    left = target.with_name(f".x.bin.{platform.node()}.{2**30}")  # of a thread that is gone
    left.write_bytes(CONTENT[:1000])
    with target.open("rb") as opened:
        if how == "upload":
            upload(tmp_path / "source", url)
        else:
            write_bytes(url, CONTENT)
        assert opened.read() == b"before"
    assert sizes_of(f"file://{target.parent}") == {url: len(CONTENT)}
    with pytest.raises(FileNotFoundError):
        upload(tmp_path / "gone", url)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("url", ["s3", "file", "http"])
def test_reads_from_any_position(url: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Catches a reader that starts elsewhere, or loses bytes between two ranges."""
    (tmp_path / "x.bin").write_bytes(CONTENT)
    if url == "s3":
        bucket = request.getfixturevalue("bucket")
        upload(tmp_path / "x.bin", f"{bucket}/x.bin")
        found = f"{bucket}/x.bin"
    elif url == "http":
        found = f"{request.getfixturevalue('web_server')}/x.bin"
    else:
        found = f"file://{tmp_path}/x.bin"
    assert sizes_of(found) == {found: len(CONTENT)}
    with open_url(found) as file:
        assert file.read() == CONTENT
    with open_url(found, start=len(CONTENT) - 7) as file:
        assert file.read(100) == CONTENT[-7:]
        file.seek(5)
        assert file.read(3) == CONTENT[5:8]
        assert file.tell() == 8
        assert file.seek(-4, os.SEEK_END) == len(CONTENT) - 4
        assert file.read() == CONTENT[-4:]
    download(Download(found, tmp_path / "copy", len(CONTENT), DIGEST))
    assert (tmp_path / "copy").read_bytes() == CONTENT


class _RangeHandler(SimpleHTTPRequestHandler):
    """Answers requests for a range, as web servers do."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        content, status = path.read_bytes(), 200
        if (wanted := self.headers.get("Range")) is not None:
            start, end = wanted.removeprefix("bytes=").split("-")
            content, status = content[int(start) : int(end or len(content)) + 1], 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end}/{path.stat().st_size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Not on the terminal."""


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[str]:
    """The URL of a server of the files in `tmp_path`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_RangeHandler, directory=str(tmp_path))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_errors_of_a_web_server(web_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a server that is busy, gone or refuses, taken for one that lacks the file, as fsspec does."""
    monkeypatch.setattr(storage, "_WAITS", (0.01,))
    with pytest.raises(StorageError, match=r"/a.txt: no success in 2 attempts: Cannot connect"):
        list_files(f"http://127.0.0.1:{free_port()}/a.txt")
    with proxy(int(web_server.rpartition(":")[2])) as between:
        (tmp_path / "a.txt").write_bytes(b"text")
        url = f"http://127.0.0.1:{between.port}/a.txt"
        between.faults = [Fault(BUSY)] * 2
        assert sizes_of(url) == {url: 4}
        between.faults = [Fault(SLOW)] * 2
        assert sizes_of(url) == {url: 4}
        between.lasting = Fault(EXPIRED)
        with pytest.raises(DeniedError, match=r"a.txt: 403"):
            list_files(url)


@pytest.mark.parametrize("is_listed", [True, False])
def test_a_file_that_changes_while_it_is_read(bucket: str, monkeypatch: pytest.MonkeyPatch, is_listed: bool) -> None:
    """Catches the beginning of one version with the end of another, and advice that repeats the error."""
    monkeypatch.setattr(storage, "_BLOCK", 1 << 10)
    put(bucket, x=CONTENT)
    if is_listed:
        list_files(bucket)
    with open_url(f"{bucket}/x") as file:
        assert file.read(10) == CONTENT[:10]
        put(bucket, x=bytes(len(CONTENT)))
        with pytest.raises(StorageError, match=r"x changed while it was read; run the command again"):
            file.read()


def test_a_download_continues(bucket: str, tmp_path: Path) -> None:
    """Catches a copy that starts over, and progress that does not add up to the size."""
    put(bucket, x=CONTENT)
    (tmp_path / ".x.partial").write_bytes(CONTENT[: 2 << 20])
    found: list[int] = []
    download(Download(f"{bucket}/x", tmp_path / "x", len(CONTENT), DIGEST), advance=found.append)
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert sum(found) == len(CONTENT)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_damaged_part_is_copied_again(bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a local part of another file that ends up in the copy."""
    put(bucket, x=CONTENT)
    (tmp_path / ".x.partial").write_bytes(b"other" * 1000)
    found: list[int] = []
    download(Download(f"{bucket}/x", tmp_path / "x", len(CONTENT), DIGEST), advance=found.append)
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert sum(found) == len(CONTENT)
    assert "copying it again" in caplog.text


def test_a_wrong_checksum_leaves_no_file(bucket: str, tmp_path: Path) -> None:
    """Catches a damaged object that is taken for the file."""
    put(bucket, x=CONTENT)
    with pytest.raises(StorageError, match=f"{bucket}/x is damaged: found checksum {DIGEST}, expected 000"):
        download(Download(f"{bucket}/x", tmp_path / "x", len(CONTENT), "0" * 64))
    with pytest.raises(StorageError, match="found 3,145,728 bytes, expected 9"):
        download(Download(f"{bucket}/x", tmp_path / "x", 9, DIGEST))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fault", [Fault(answer=BUSY), Fault(cut_after=0), Fault(cut_after=100_000)], ids=["503", "cut", "cut midway"]
)
def test_faults_that_pass(bucket: str, faulty: Proxy, tmp_path: Path, fault: Fault) -> None:
    """Catches a busy server or a cut connection that ends a copy, or leaves a hole in it."""
    put(bucket, x=CONTENT)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # so that it connects again
    faulty.faults = [fault, fault]
    download(Download(f"{bucket}/x", tmp_path / "x", len(CONTENT), DIGEST))
    assert faulty.met == 2
    assert (tmp_path / "x").read_bytes() == CONTENT
    faulty.faults = [fault]
    upload(tmp_path / "x", f"{bucket}/y")
    assert read_bytes(f"{bucket}/y") == CONTENT


def test_a_server_that_is_gone(bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a trace, an endless wait, and the same warnings at each of many attempts."""
    import s3fs

    waits: list[float] = []
    sleep, this_thread = time.sleep, get_ident()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(time, "sleep", lambda each: (waits.append if get_ident() == this_thread else sleep)(each))
    s3fs.S3FileSystem.clear_instance_cache()
    for _ in range(2):
        with pytest.raises(StorageError, match=f"^{bucket}/x: no success in 5 attempts: Could not connect to the"):
            read_bytes(f"{bucket}/x")
    assert [round(wait / expected) for wait, expected in zip(waits, storage._WAITS * 2, strict=True)] == [1] * 8
    assert caplog.messages[-1].endswith("; trying again")
    assert len(caplog.messages) == 1


def test_mistakes(bucket: str, tmp_path: Path) -> None:
    """Catches a message that does not say what is wrong."""
    with pytest.raises(StorageError, match=f"^{bucket}/x does not exist$"):
        open_url(f"{bucket}/x")
    with pytest.raises(StorageError, match=f"^{bucket}/x/\\*.txt"):
        list_files(f"{bucket}/x/*.txt")
    for use in (
        open_url,
        list_files,
        exists,
        list_folders,
        read_bytes,
        lambda url: write_bytes(url, b"1"),
        lambda url: list_files(f"{url}/*"),
    ):
        with pytest.raises(StorageError, match=r"^s3://no-such-one/x.*: there is no bucket 'no-such-one'$"):
            use("s3://no-such-one/x")
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(StorageError, match=f"^file://{tmp_path}/tokenizer.json is a file; expected a folder$"):
        local_folder(f"file://{tmp_path}/tokenizer.json", [".json"])
    with pytest.raises(StorageError, match=r"^ftp://h/x: unknown protocol 'ftp'; expected one of s3://, gs://, hf://"):
        open_url("ftp://h/x")
    with pytest.raises(StorageError, match=f"^file://{tmp_path}/x does not exist$"):
        open_url(f"file://{tmp_path}/x")


def test_a_folder_that_names_files_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bucket with names of objects that make a command write files anywhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = ["tokenizer.json", "sub/../../../../x"]
    monkeypatch.setattr(downloads, "list_files", lambda url: {f"{url}/{name}": FileInfo(4, "1") for name in names})
    monkeypatch.setattr(downloads, "download", lambda *_: pytest.fail("copies a part"))
    with pytest.raises(UserError, match=r"^s3://b/t: 'sub/../../../../x' is not in this folder$"):
        local_folder("s3://b/t", [])


def test_passwords_in_urls() -> None:
    """Catches a password that is written to manifests and reports, or shown in a message."""
    for use in (open_url, list_files, read_bytes, stat_file):
        with pytest.raises(
            StorageError, match=r"^https://h.org:8/a@b: a URL with a user and password is not read; set"
        ):
            use("https://user:secret@h.org:8/a@b")


def test_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an ImportError where an extra has to be installed."""
    import sys

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    message = r"^gs://b/x: gs:// needs a library that is missing; install the extra: pip install 'deepcloze\[gcs\]'$"
    with pytest.raises(StorageError, match=message):
        open_url("gs://b/x")


def test_credentials(bucket: str, faulty: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches retries, or an unclear message, for credentials that are missing or expired, and new ones that have no
    effect until the process ends."""
    import s3fs

    put(bucket, x=b"1")
    s3fs.S3FileSystem.clear_instance_cache()
    faulty.lasting = Fault(answer=EXPIRED)
    with pytest.raises(DeniedError, match=r"access denied \((The provided token.*|Forbidden)\): check the "):
        read_bytes(f"{bucket}/x")
    assert faulty.met == 1
    faulty.lasting = None
    with monkeypatch.context() as missing:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            missing.delenv(name)
        missing.setenv("AWS_EC2_METADATA_DISABLED", "true")
        missing.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
        for use in (read_bytes, open_url):
            with pytest.raises(StorageError, match=f"^{bucket}/x: no credentials: set AWS_ACCESS_KEY_ID and "):
                use(f"{bucket}/x")
    assert read_bytes(f"{bucket}/x") == b"1"


def test_nothing_is_logged_when_all_is_well(bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches warnings about attempts that have succeeded."""
    caplog.set_level(logging.WARNING)
    put(bucket, x=b"1")
    download(Download(f"{bucket}/x", tmp_path / "x", 1))
    assert caplog.messages == []
