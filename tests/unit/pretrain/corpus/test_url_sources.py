"""Corpora and cleanings of documents in object storage."""

import gzip
import json
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiment import storage
from experiment.config import build_config
from experiment.errors import UserError
from experiment.files import parse_json
from experiment.storage import delete, stat_file, upload, write_bytes
from launcher.cli import main
from pretrain.cleaning.config import CleanConfig
from pretrain.cleaning.run import clean
from pretrain.corpus import build as corpus_build
from pretrain.corpus import splits, tasks
from pretrain.corpus.build import build_corpus
from pretrain.corpus.options import CorpusOptions
from pretrain.corpus.sources import find_sources


@pytest.fixture
def lines(lines: list[str]) -> list[str]:
    """Fewer: each split takes several requests."""
    return lines[:100]


@pytest.fixture
def files(tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with each format, in files that become several splits."""
    monkeypatch.setattr(splits, "MIN_SPLIT_BYTES", 1300)
    monkeypatch.setattr(splits, "_OPENED", 1 << 20)  # small files are divided as large ones
    folder = tmp_path / "files"
    (folder / "below").mkdir(parents=True)
    text = "\n".join(lines) + "\n"
    records = "".join(f"{json.dumps({'text': line})}\n" for line in lines)
    (folder / "a.txt").write_text(text, encoding="utf-8")
    (folder / "below" / "b.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    (folder / "c.csv").write_text("text\n" + "\n".join(f'"{line}"' for line in lines) + "\n", encoding="utf-8")
    pq.write_table(pa.table({"text": lines}), folder / "d.parquet", row_group_size=40)
    with zipfile.ZipFile(folder / "e.zip", "w") as archive:
        for number in range(10):
            archive.writestr(f"{number}.txt", "\n".join(lines[number::10]))
    (folder / ".hidden.txt").write_text("not read\n", encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


def put(folder: Path, url: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            upload(path, f"{url}/{path.relative_to(folder)}")
    return url


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def build(source: Any, tokenizer: Any, output: Path, **flags: Any) -> Any:
    return build_corpus(CorpusOptions(source=source, tokenizer=tokenizer, output=output, **flags))


def test_a_url_gives_the_same_bytes_as_a_folder(
    bucket: str, files: Path, vocabulary_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches documents that are lost, doubled or in another order if splits are read as ranges of objects."""
    build(f"{files},{files}/e.zip", vocabulary_folder, tmp_path / "local", workers=1)
    url, tokenizer = put(files, f"{bucket}/files"), put(vocabulary_folder, f"{bucket}/tokenizer")
    build(f"{url},{url}/e.zip", tokenizer, tmp_path / "remote", workers=1)
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    assert f"{url}: skipping 2 files of other formats, such as {url}/e.zip" in capsys.readouterr().err


def test_names_of_objects(bucket: str, files: Path) -> None:
    """Catches a pattern, an archive or a file:// URL that finds other files than the same path."""
    url = put(files, f"{bucket}/text")

    def names(source: str) -> list[tuple[str, str]]:
        return [(found.name.removeprefix(f"{url}/"), found.selection) for found in find_sources(source)]

    for name in ("[1].txt", "folder/", "q?.txt"):
        write_bytes(f"{url}/{name}", b"" if name.endswith("/") else b"text")
    assert names(f"{url}/*.csv,{url}/a.txt") == [("c.csv", ""), ("a.txt", "")]
    assert names(f"{url}/pic*") == [("picture.png", "")]
    assert names(f"{url}/*.txt") == [("[1].txt", ""), ("a.txt", ""), ("q?.txt", "")]
    assert names(f"{url}/?.txt,{url}/?.csv") == [("a.txt", ""), ("c.csv", "")]
    assert [stat_file(f"{url}/{name}").size for name in ("[1].txt", "q?.txt")] == [4, 4]
    delete(f"{url}/q?.txt")
    assert names(f"{url}/e.zip::3*") == [("e.zip", "3*")]
    assert names(f"{url}/") == [(name, "") for name in ("[1].txt", "a.txt", "below/b.jsonl.gz", "c.csv", "d.parquet")]
    assert [found.name for found in find_sources(f"file://{files}/a.txt")] == [f"{files}/a.txt"]


MISTAKES = [
    ("{bucket}/none", r"s3://.*/none does not exist"),
    ("{bucket}/none/*.txt", r"s3://.*/none"),
    ("s3://no-such-bucket/a", "s3://no-such-bucket/a: there is no bucket 'no-such-bucket'"),
    ("{bucket}/a.pdf", r"--source s3://.*/a.pdf: .pdf files are not read"),
    ("{bucket}/b/", r"--source s3://.*/b/: the folder has no files of a known format"),
    ("{bucket}/a.pdf::x", r"expected a .zip"),
    ("http://a.org/c.txt?x=1", "a URL with a query does not tell the format"),
    ("https://u:p@a.org/c.txt?Signature=x", "--source https://a.org/c.txt: a URL with a query"),
    ("https://u:p@a.org/c.txt", "^https://a.org/c.txt: a URL with a user and password is not read"),
    ("{bucket}/c.txt,{bucket}/c.txt", r"--source names s3://.*/c.txt twice"),
]


def test_mistakes_in_urls(bucket: str, tmp_path: Path) -> None:
    """Catches a trace, or a message that does not name the URL."""
    (tmp_path / "x").write_bytes(b"1")
    for name in ("a.pdf", "b/a.png", "c.txt"):
        upload(tmp_path / "x", f"{bucket}/{name}")
    for source, message in MISTAKES:
        with pytest.raises(UserError, match=message):
            find_sources(source.format(bucket=bucket))


def test_a_missing_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an ImportError where an extra has to be installed."""
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert main(["corpus", "--source=gs://bucket/a.txt", "--tokenizer=t", "--output=c"]) == 2
    assert "pip install 'deepcloze[gcs]'" in capsys.readouterr().err


def test_a_bucket_that_vanishes_midway(
    bucket: str, files: Path, vocabulary_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches splits that are lost, or read again, when the storage is back."""
    url = put(files, f"{bucket}/text")
    build(url, vocabulary_folder, tmp_path / "whole", workers=1)
    read: list[str] = []
    original = tasks.read_documents

    def vanishing(spans: Any, *arguments: Any) -> Any:
        read.append(repr(spans))
        if len(read) == 5:
            delete(url)
        return original(spans, *arguments)

    monkeypatch.setattr(tasks, "read_documents", vanishing)
    monkeypatch.setattr(storage, "_WAITS", ())
    with pytest.raises(UserError, match=rf"{url}/.* does not exist"):
        build(url, vocabulary_folder, tmp_path / "c", workers=1)
    put(files, url)
    build(url, vocabulary_folder, tmp_path / "c", workers=1)
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")
    assert set(read[:4]).isdisjoint(read[5:])


@pytest.mark.parametrize("added", [[], ["b.txt"]], ids=["resumed", "extended"])
def test_a_server_that_does_not_tell_whether_a_file_has_changed(
    added: list[str],
    bucket: str,
    lines: list[str],
    vocabulary_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches text of before in a corpus that is resumed, and a refusal to add files to such a source."""
    monkeypatch.setattr(storage, "_VERSIONS", ())
    texts = ["\n".join(order).encode() for order in (lines, lines[::-1])]
    url = f"{bucket}/a.txt"
    write_bytes(url, texts[0])
    with monkeypatch.context() as patch:
        patch.setattr(corpus_build, "_write_metadata", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(url, vocabulary_folder, tmp_path / "c", workers=1)
    assert any(tmp_path.glob("c.partial/main/*.arrow"))
    source = ",".join([url, *(f"{bucket}/{name}" for name in added)])
    for name in ("a.txt", "b.txt"):
        write_bytes(f"{bucket}/{name}", texts[1])
    build(source, vocabulary_folder, tmp_path / "c", workers=1)
    build(source, vocabulary_folder, tmp_path / "whole", workers=1)
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_cleaning_reads_urls(bucket: str, files: Path, tmp_path: Path) -> None:
    """Catches readers that open objects as paths, and metadata that is lost."""
    (files / "page.html").write_text("<html><body><p>A page about actors.</p></body></html>", encoding="utf-8")
    with zipfile.ZipFile(files / "OpenSubtitles.zip", "w") as archive:
        archive.writestr("OpenSubtitles.en-zh.en", "one film\ntwo rivers\n")
        archive.writestr("OpenSubtitles.en-zh.zh", "一\n二\n")
    url = put(files, f"{bucket}/raw")

    def cleaned(source: str) -> Mapping[str, Any]:
        tree = {"source": source, "output": str(tmp_path / source.partition("://")[0].replace("/", "_"))}
        clean(build_config(CleanConfig, tree), lambda _: [], 1)
        return {
            **parse_json((Path(tree["output"]) / "clean.json").read_bytes()),
            "files": sorted(path.name for path in Path(tree["output"]).iterdir()),
        }

    found, expected = cleaned(url), cleaned(str(files))
    assert found["kept"] == expected["kept"] == 4 * 100 + 1 + 4
    assert found["files"] == expected["files"]
