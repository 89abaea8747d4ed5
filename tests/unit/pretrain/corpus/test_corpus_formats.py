import gzip
import io
import json
import os
import re
import tarfile
import tempfile
import tracemalloc
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import ValidationError

from experiment.errors import UserError
from launcher.cli import main
from pretrain.corpus import formats
from pretrain.corpus.compression import decompress
from pretrain.corpus.documents import check_read, read_documents
from pretrain.corpus.formats import ReadStats, SourceDocument
from pretrain.corpus.options import SourceName, TextOptions
from pretrain.corpus.sources import Span, find_sources
from small_disk import SmallDisk


def read(source: SourceName, **flags: Any) -> list[SourceDocument]:
    sources, options, stats = find_sources(source), TextOptions(**flags), ReadStats()
    found = list(read_documents(map(Span, sources), options, stats))
    check_read(sources, options, stats.start_matches, stats.archives)
    return found


def texts(source: SourceName, **flags: Any) -> list[str]:
    return [document.text for document in read(source, **flags)]


def test_lines_keep_all_but_their_end(tmp_path: Path) -> None:
    """Catches stripped spaces, lines split at Unicode separators or lone carriage returns, and a BOM read as text."""
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff  one \u2028 still\x85one\t\r\ntwo\rtwo\n \t\n\n last".encode())
    found = read(path)
    assert [document.text for document in found] == ["  one \u2028 still\x85one\t", "two\rtwo", " last"]
    assert [document.place for document in found] == [f"{path}:1", f"{path}:2", f"{path}:5"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"document": "blank_line"}, ["intro", " = A = \none", "two\n = B = \nthree"]),
        ({"document": "file"}, ["intro\n\n = A = \none\n \ntwo\n = B = \nthree"]),
        ({"document_start": "^ = [^=]"}, ["intro\n", " = A = \none\n \ntwo", " = B = \nthree"]),
    ],
)
def test_documents_of_several_lines(tmp_path: Path, flags: dict[str, str], expected: list[str]) -> None:
    """Catches documents split or joined at the wrong line, and lost text before the first start."""
    path = tmp_path / "a.txt"
    path.write_text("intro\n\n = A = \none\n \ntwo\n = B = \nthree\n")
    assert texts(path, **flags) == expected


def test_a_document_larger_than_memory_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a large file without blank lines that is collected into one document until memory runs out."""
    monkeypatch.setattr(formats, "_MAX_DOCUMENT", 10)
    path = tmp_path / "a.txt"
    path.write_text("1234\n6789\n\n" + "ab\n" * 4)
    with pytest.raises(UserError, match=r"a\.txt:4: the document has more than 10 characters"):
        texts(path, document="blank_line")


def test_little_memory_suffices_for_compressed_text(tmp_path: Path) -> None:
    """Catches a part of a Zstandard file whose content, ten thousand times larger, is made in memory at once."""
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress((b"a " * 499 + b"a\n") * 300_000))
    stream = decompress(path.open("rb"), "zst")
    tracemalloc.start()
    assert stream.readline() == b"a " * 499 + b"a\n"
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()


def test_document_start_has_a_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a build that never ends, because the pattern tries all ways to split a line."""
    monkeypatch.setattr(formats, "_MATCH_SECONDS", 0.1)
    path = tmp_path / "a.txt"
    path.write_text("a\n" + "a" * 100 + "b\n")
    with pytest.raises(
        UserError, match=r"a\.txt:2: --document_start '\(a\|aa\)\+\$' takes longer than 0 s on this line"
    ):
        texts(path, document_start="(a|aa)+$")


def test_document_start_without_match_is_rejected(tmp_path: Path) -> None:
    """Catches a mistyped pattern that silently makes each file one document."""
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n")
    with pytest.raises(UserError, match="matches no line"):
        texts(path, document_start="^=")


def test_invalid_utf8_names_file_and_line(tmp_path: Path) -> None:
    """Catches replacement characters in the corpus, and a message without file and line."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\nba\xffd\n")
    with pytest.raises(UserError, match=r"a\.txt:2: not UTF-8 text \(byte 0xff at column 3\).*`deepcloze clean`"):
        texts(path)


def test_json_lines(tmp_path: Path) -> None:
    """Catches a wrong column, wrong line numbers, and values that are not text."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\nb", "n": 1}\n\n{"text": null}\n{"text": "c"}\n')
    assert [(document.text, document.line) for document in read(path)] == [("a\nb", 1), ("c", 4)]
    with pytest.raises(UserError, match=r"a\.jsonl:1: no column 'body'; found: text, n"):
        texts(path, column="body")
    with pytest.raises(UserError, match=r"a\.jsonl:1: expected text in 'n', found 1"):
        texts(path, column="n")
    path.write_text('{"text": "a"}\n[1]\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: expected one JSON object per line"):
        texts(path)


def test_csv_with_quotes_and_line_ends_inside(tmp_path: Path) -> None:
    """Catches a CSV read line by line, and places that count rows instead of lines."""
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,"a, ""b""\nc"\n\n2,d\n', newline="")
    assert [(document.text, document.line) for document in read(path)] == [('a, "b"\nc', 2), ("d", 5)]


@pytest.mark.parametrize("row", ["3,d,e", "3", '3,"d', '3,"d"e'])
def test_bad_csv_rows_name_file_and_line(tmp_path: Path, row: str) -> None:
    """Catches accepted rows with too many or too few fields, or stray quotes."""
    path = tmp_path / "a.csv"
    path.write_text(f"id,text\n1,b\n{row}\n4,f\n")
    with pytest.raises(UserError, match=r"a\.csv:3: "):
        texts(path)


def test_csv_flags(tmp_path: Path) -> None:
    """Catches options with pandas' names that do not do what pandas does."""
    path = tmp_path / "a.tsv"
    path.write_text('1|"a\n2|b"\n')
    for none in ("none", "null", None):  # null: in a config of `deepcloze clean`
        assert texts(path, sep="|", quoting=3, header=none, column="1") == ['"a', 'b"']
    with pytest.raises(ValidationError, match="expected one character"):
        texts(path, sep="||")
    path.write_text('text|n\n"a|b"|2\n')
    for quoting in (0, 1, 2):
        assert texts(path, sep="|", quoting=quoting, header="0") == ["a|b"]
    assert texts(path, sep="|", header=0) == ["a|b"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"document_start": "("}, "'\\(' is not a regular expression"),
        ({"document_start": "a", "document": "file"}, "exclude each other"),
        ({"quoting": 4}, "quoting"),
        ({"header": "first"}, "header"),
    ],
)
def test_invalid_text_options(flags: dict[str, Any], message: str) -> None:
    """Catches invalid options that are found late or never."""
    with pytest.raises(ValidationError, match=message):
        TextOptions(**flags)


def test_parquet_plain_and_inside_an_archive(tmp_path: Path) -> None:
    """Catches nulls read as text, wrong row numbers, and Parquet read from a stream that cannot seek."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None, "b"], "n": [1, 2, 3]}), path)
    assert [(document.text, document.line) for document in read(path)] == [("a", 1), ("b", 3)]
    with pytest.raises(UserError, match=r"no column 'body'; found: text, n"):
        texts(path, column="body")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, "a.parquet")
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert texts(f"{tmp_path}/a.zip,{tmp_path}/b.parquet.gz") == ["a", "b", "a", "b"]


def test_members_of_a_zip_are_read_in_large_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches lines that zipfile divides, in Python and several times as slowly."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "a\nb\n")
    monkeypatch.setattr(zipfile.ZipExtFile, "readline", None)
    assert texts(tmp_path / "a.zip") == ["a", "b"]


def test_no_space_for_a_copy_of_a_table(tmp_path: Path, small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a full disk that is taken for an error of the source."""
    content = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["a"]}), content)
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(content.getvalue()))
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk.path))
    small_disk.fill()
    with pytest.raises(
        UserError, match=rf"cannot copy .*/a.parquet.gz to the temporary folder {small_disk.path}: No space left"
    ):
        texts(tmp_path / "a.parquet.gz")


def test_a_small_parquet_file_takes_little_memory(tmp_path: Path) -> None:
    """Catches rows that are decoded together although each has a megabyte."""
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 1000), ["a" * (1 << 20)])
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 21
    documents = read_documents(map(Span, find_sources(f"{tmp_path}/a.parquet")), TextOptions(), ReadStats())
    tracemalloc.start()
    try:
        assert len(next(documents).text) == 1 << 20
        assert tracemalloc.get_traced_memory()[1] < 1 << 27
    finally:
        tracemalloc.stop()


def test_a_column_of_parquet_is_read_in_blocks(tmp_path: Path) -> None:
    """Catches workers that each hold the text of a whole row group."""
    path, stats = tmp_path / "a.parquet", ReadStats()
    table = pa.table({"text": [f"{number:01000}" for number in range(8000)]})
    pq.write_table(table, path, compression="NONE", use_dictionary=False)
    documents = read_documents(map(Span, find_sources(str(path))), TextOptions(), stats)
    next(documents)
    assert stats.file_position() < path.stat().st_size / 2


def test_the_parquet_row_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Catches a traceback for text that is not UTF-8, and the number of a row within its row group."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([b"a", b"b", b"\xe9"]).view(pa.string())}), path, row_group_size=2)
    with pytest.raises(UserError, match=r"a\.parquet:3: cannot read 'text': 'utf-8' codec can't decode byte 0xe9"):
        texts(path)


def test_a_damaged_parquet_page_gives_one_line(tmp_path: Path) -> None:
    """Catches a message in pyarrow's several lines, the last of them empty."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"]}), path)
    damaged = bytearray(path.read_bytes())
    damaged[4] ^= 0xFF  # in the header of the first page
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"^cannot read \S+/a\.parquet: Couldn't deserialize thrift.*$") as error:
        texts(path)
    assert "\n" not in str(error.value)


def test_a_parquet_column_must_be_there_once(tmp_path: Path) -> None:
    """Catches the first of two columns of one name taken for the one that is meant."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([["a"], ["b"], [1]], names=["text", "text", "n"]), path)
    with pytest.raises(UserError, match=r"a\.parquet: 2 columns are called 'text' \(--column names the column\)"):
        texts(path)


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix == "gz":
        return gzip.compress(data[:9]) + gzip.compress(data[9:])
    frame = zstandard.ZstdCompressor().compress
    return frame(data[:9]) + frame(data[9:])


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_files_of_several_members(tmp_path: Path, suffix: str) -> None:
    """Catches reading only the first gzip member or Zstandard frame."""
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(compressed(b'{"text": "a"}\n{"text": "b"}\n', suffix))
    assert texts(path) == ["a", "b"]


def test_windows_of_two_gibibytes_are_read(tmp_path: Path) -> None:
    """Catches files of `zstd --long=31` that are rejected."""
    compressor = zstandard.ZstdCompressor().compressobj()
    frame = bytearray(compressor.compress(b"a\nb\n") + compressor.flush())
    frame[5] = (31 - 10) << 3  # the window descriptor, see RFC 8878, 3.1.1.1.2
    path = tmp_path / "a.txt.zst"
    path.write_bytes(frame)
    assert texts(path) == ["a", "b"]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_truncated_file_is_rejected(tmp_path: Path, suffix: str) -> None:
    """Catches a partial download that gives a partial corpus."""
    data = "\n".join(str(i * i) for i in range(20000)).encode()
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(compressed(data, suffix)[:-5])
    with pytest.raises(UserError, match="damaged or truncated"):
        texts(path)


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_no_member_of_an_archive_is_skipped_silently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Catches members whose names leave the archive's folder and that are left out or unpacked there, and members of
    other formats that are left out silently."""
    outside = {"../up.txt": b"up\n", "/abs.txt": b"abs\n", "a/../../b.txt": b"b\n"}
    members = {**outside, ".hidden.txt": b"no\n", "x/notes.bin": b"no", "x/image.png": b"no"}
    path = tmp_path / "below" / f"a.{kind}"
    path.parent.mkdir()
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    else:
        path.write_bytes(tar_of(members))
    assert texts(path) == ["up", "abs", "b"]
    assert capsys.readouterr().err == f"{path}: skipping 2 files of other formats, such as x/image.png\n"
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]
    assert texts(f"{path}::../*") == ["up"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("pattern", "is_closed"),
    [
        ("", True),
        ("/**", True),
        ("/**/*.txt", True),
        ("/**/b/*.txt", True),
        ("/*/*.txt", True),
        ("/*/b/*.txt", True),
        ("/*/a.txt", True),
        ("/a/**/*.txt", False),
        ("/[ab]/b/*.txt", False),
    ],
)
def test_a_folder_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, is_closed: bool
) -> None:
    """Catches a corpus without the files below it, which nothing tells, and a pattern that is refused because of a
    folder where it does not look."""
    for name in ("a/b", "a", "closed/b", "closed"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "a.txt").write_text("text\n")

    def refuse(function: Any, path: Any) -> Any:  # root may read all folders
        if str(path).startswith((f"{tmp_path}/closed", f"{tmp_path}/lost+found")):
            raise PermissionError(13, "Permission denied", path)
        return function(path)

    for function in (os.scandir, os.lstat):
        monkeypatch.setattr(os, function.__name__, partial(refuse, function))
    if is_closed:
        problem = re.escape(f"--source {tmp_path}{pattern}: cannot read {tmp_path}/closed")
        with pytest.raises(UserError, match=rf"^{problem}(/b|/a\.txt)?: Permission denied$"):
            find_sources(f"{tmp_path}{pattern}")
    else:
        assert find_sources(f"{tmp_path}{pattern}")
    (tmp_path / "closed").rename(tmp_path / "lost+found")  # of the disk
    monkeypatch.undo()
    for function in (os.scandir, os.lstat):
        monkeypatch.setattr(os, function.__name__, partial(refuse, function))
    assert find_sources(f"{tmp_path}{pattern}")


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in members.items():
            if "/" in name:
                folder = tarfile.TarInfo(name.rpartition("/")[0])
                folder.type = tarfile.DIRTYPE
                archive.addfile(folder)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_members_of_archives(tmp_path: Path) -> None:
    """Catches members out of order, patterns that stop at a slash, and compressed members that are not decompressed."""
    members = {"z/b.txt": b"b\n", "a.txt": b"a\n", "c.txt.gz": gzip.compress(b"c\n"), "notes.bin": b"\xff"}
    (tmp_path / "a.tar.gz").write_bytes(tar_of(members))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    for archive_name in ("a.tar.gz", "a.zip"):
        path = tmp_path / archive_name
        assert texts(f"{path}::*.txt") == ["b", "a"]
        assert texts(path) == ["b", "a", "c"]
        assert read(f"{path}::a.txt")[0].place == f"{path}::a.txt:1"
        with pytest.raises(UserError, match="no member matches"):
            texts(f"{path}::*.csv")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:200])
    with pytest.raises(UserError, match="damaged or truncated"):
        texts(tmp_path / "cut.zip")


def test_archives_of_a_folder_name_their_members_with_a_dot(tmp_path: Path) -> None:
    """Catches members that count as hidden files, as `tar cf a.tar .` names them."""
    (tmp_path / "a.tar.gz").write_bytes(tar_of({"./a.txt": b"a\n", "./x/b.txt": b"b\n", "./.hidden.txt": b"no\n"}))
    assert texts(tmp_path / "a.tar.gz") == ["a", "b"]


def test_a_damaged_header_in_a_tar_is_not_its_end(tmp_path: Path) -> None:
    """Catches documents that are lost in silence, because `tarfile` takes a damaged header for the end."""
    whole = gzip.decompress(tar_of({"a.txt": b"a\n", "b.txt": b"b\n", "c.txt": b"c\n"}))
    cut, flipped = whole[:1100], bytearray(whole)
    flipped[1024 + 100] ^= 0xFF
    for damaged in (cut, bytes(flipped)):
        (tmp_path / "a.tar").write_bytes(damaged)
        with pytest.raises(UserError, match="damaged or truncated"):
            texts(tmp_path / "a.tar")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_tars_that_follow_one_another_are_one(tmp_path: Path, suffix: str) -> None:
    """Catches documents after the end of the first archive of a file, and a damaged header there, lost in silence."""
    parts = [tar_of({name: name.encode()}) for name in ("a.txt", "b.txt")]
    parts = parts if suffix == "tar.gz" else [*map(gzip.decompress, parts)]
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"".join(parts))
    assert texts(path) == ["a.txt", "b.txt"]
    whole = bytearray(b"".join(map(gzip.decompress, [tar_of({"a.txt": b"a"}), tar_of({"b.txt": b"b"})])))
    whole[len(whole) // 2 + 100] ^= 0xFF
    path.write_bytes(gzip.compress(whole) if suffix == "tar.gz" else whole)
    with pytest.raises(UserError, match="damaged or truncated"):
        texts(path)


def test_a_damaged_header_after_the_end_of_a_tar_in_newer_pythons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches documents that are lost in silence, because TarInfo.fromtarfile no longer calls frombuf (gh-141707)."""
    frombuf = tarfile.TarInfo.frombuf.__func__  # type: ignore[attr-defined]

    def fromtarfile(kind: type[tarfile.TarInfo], archive: tarfile.TarFile) -> Any:
        member = frombuf(kind, archive.fileobj.read(tarfile.BLOCKSIZE), archive.encoding, archive.errors)
        member.offset = archive.fileobj.tell() - tarfile.BLOCKSIZE
        return member._proc_member(archive)

    monkeypatch.setattr(tarfile.TarInfo, "fromtarfile", classmethod(fromtarfile))
    two = bytearray(b"".join(gzip.decompress(tar_of({name: b"text"})) for name in ("a.txt", "b.txt")))
    two[len(two) // 2 + 100] ^= 0xFF
    (tmp_path / "a.tar").write_bytes(two)
    with pytest.raises(UserError, match="damaged or truncated"):
        texts(tmp_path / "a.tar")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
@pytest.mark.parametrize("trailer", [b"\n", b"0cc175b9c0f1b6a831c399e269772661  a.tar\n" * 20, bytes(100)])
def test_what_follows_the_end_of_a_tar_is_ignored(
    tmp_path: Path, suffix: str, trailer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a line end or a checksum after an archive that makes it unreadable."""
    whole = gzip.decompress(tar_of({"a.txt": b"a\n"})) + trailer
    (tmp_path / f"a.{suffix}").write_bytes(gzip.compress(whole) if suffix == "tar.gz" else whole)
    assert texts(tmp_path / f"a.{suffix}") == ["a"]
    assert f"a.{suffix}: what follows the end of the archive is no archive" in caplog.text


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    """Catches a folder on another disk that is left out, one that is read twice, and a link to a folder above it."""
    for name in ("data/a", "other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text(f"{name}\n")
    (tmp_path / "data" / "z.txt").write_text("data\n")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "other")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "other")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    assert sorted(texts(tmp_path / "data")) == ["data", "data/a", "other"]
    with pytest.raises(UserError, match="is in this folder; name one outside it"):
        find_sources(tmp_path / "data", output=tmp_path / "other" / "out")


def test_a_link_to_a_missing_file_is_named(tmp_path: Path) -> None:
    """Catches a corpus that lacks a file silently. Links of other formats, and hidden ones, do not matter."""
    (tmp_path / "a.txt").write_text("a\n")
    for name in (".b.txt", "b.png"):
        (tmp_path / name).symlink_to("nowhere")
    assert texts(tmp_path) == ["a"]
    (tmp_path / "b.txt").symlink_to("nowhere")
    for source in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(UserError, match=r"--source .*/b\.txt: a link to nowhere, which does not exist"):
            find_sources(source)


def test_folders_and_globs_sorted_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches file-system order, hidden files that are read, and other formats skipped silently."""
    for name in ("b.txt", "a/z.jsonl", "c.csv", ".hidden.txt", "notes.doc"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text({"jsonl": json.dumps({"text": "z"}), "csv": "text\nc\n"}.get(name.split(".")[-1], "b\n"))
    assert texts(tmp_path) == ["z", "b", "c"]
    assert "notes.doc" in capsys.readouterr().err
    assert texts(f"{tmp_path}/*.txt,{tmp_path}/c.csv") == ["b", "c"]


@pytest.mark.parametrize("source", ["", "nowhere.txt", "no*.txt", "hub:", "empty", "a.txt,a.txt", "a.txt::x"])
def test_unusable_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Catches a missing, ambiguous or repeated source that is found late or never."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("a.txt").write_text("a\n")
    with pytest.raises(UserError, match="--source"):
        find_sources(source)


@pytest.mark.parametrize("name", ["page.html", "crawl.warc.gz", "crawl.warc.wet", "films.xml.gz", "pages.xml.bz2"])
def test_markup_is_not_read_as_text(tmp_path: Path, name: str) -> None:
    """Catches a corpus of HTTP headers and tags."""
    (tmp_path / name).write_bytes(b"<p>text</p>")
    with pytest.raises(
        UserError, match=f"{name}: \\..* files are not read; (read it with `deepcloze clean`|decompress)"
    ):
        find_sources(tmp_path / name)


def test_the_output_in_the_source(tmp_path: Path) -> None:
    """Catches a build that cannot be resumed, or that reads its own output, because it finds it in the source."""
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"--source .*: the output .*/out is in this folder; name one outside it"):
        find_sources(tmp_path, output=tmp_path / "out")
    sources = find_sources(tmp_path / "a.txt", output=tmp_path / "out")
    (tmp_path / ".link").symlink_to(tmp_path)
    for name in ("out/b.txt", "out.partial/pass-0/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("b\n")
    assert find_sources(f"{tmp_path}/**/*.txt", output=tmp_path / ".link" / "out") == sources
    assert len(find_sources(f"{tmp_path}/**/*.txt", output=tmp_path / "other")) == 3


def test_a_file_name_that_is_not_utf8(tmp_path: Path) -> None:
    """Catches a UnicodeEncodeError when such a name is printed or written."""
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("a\n")
    with pytest.raises(UserError, match=r"caf\\xe9.txt': the name of the file is not UTF-8"):
        find_sources(tmp_path)


@pytest.mark.parametrize("command", ["corpus --source=a --tokenizer=t", "tokenizer --source=a --vocab_size=9", "clean"])
def test_an_output_by_url(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    """Catches a local folder with the name s3:."""
    (tmp_path / "clean.yaml").write_text("source: a\noutput: b\nsteps: []\n")
    config = [f"--config={tmp_path}/clean.yaml"] if command == "clean" else []
    assert main([*command.split(), *config, "--output=s3://bucket/a"]) == 2
    assert "expected a path on a disk, found the URL s3://bucket/a" in capsys.readouterr().err


def test_hub_source(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches `hub:` sources with the wrong order, column or split, and progress bars of `datasets` in a pipe."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "a", "n": 1}\n{"text": "b", "n": 2}\n')
    assert texts(f"hub:{tmp_path / 'set'}:train") == ["a", "b"]
    assert "\r" not in capfd.readouterr().err
    with pytest.raises(UserError, match="no column 'body'"):
        texts(f"hub:{tmp_path / 'set'}", column="body")


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    """Catches empty documents that are dropped without being counted."""
    path = tmp_path / "a.txt"
    path.write_text("a\n\n \t\nb\n")
    stats = ReadStats()
    assert len(list(read_documents(map(Span, find_sources(path)), TextOptions(), stats))) == 2
    assert stats.empty_documents == 2
    assert stats.bytes_read == path.stat().st_size


def test_a_member_of_a_format_that_is_not_read(tmp_path: Path) -> None:
    """Catches tags of a page, or a compressed document, that become text of a corpus."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "text")
        archive.writestr("b/a.html", "<p>text</p>")
    assert texts(tmp_path / "a.zip") == ["text"]
    with pytest.raises(UserError, match=r"a\.zip::b/a\.html: \.html files are not read; read it with"):
        texts(f"{tmp_path / 'a.zip'}::*.html")


@pytest.mark.parametrize("name", ["b.tar", "b.tgz", "b.tar.zst", "b.zip"])
def test_an_archive_in_an_archive(tmp_path: Path, name: str) -> None:
    """Catches headers of a tar that become text of a corpus."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, "text")
    with pytest.raises(UserError, match=rf"a\.zip::{name}: \.(tar|zip) files are not read; unpack it"):
        texts(f"{tmp_path / 'a.zip'}::b*")
