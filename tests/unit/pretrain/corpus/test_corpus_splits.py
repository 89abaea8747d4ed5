import errno
import gzip
import io
import itertools
import json
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from experiment.errors import UserError
from experiment.hub_data import load_rows
from experiment.storage import StorageError
from pretrain.corpus import splits
from pretrain.corpus.compression import estimate_content_bytes
from pretrain.corpus.documents import locate_lines, read_documents
from pretrain.corpus.formats import Range, ReadStats, SourceDocument, parse_documents
from pretrain.corpus.options import TextOptions
from pretrain.corpus.sources import Span, find_sources
from pretrain.corpus.splits import plan_splits

TEXT = "".join(
    f"{'= ' * (i % 7 == 0)}line {i} {'of words ' * (i % 11)}\r\n"[i % 2 :] + "\n" * (i % 5) for i in range(90)
)


def csv_text() -> str:
    return "id,text\n" + "".join(
        f'{i},"row {i}\n, ""quoted"" {"x" * (i % 13)}\n"\n' + "\n" * (i % 4) for i in range(80)
    )


def gzip_members(data: bytes, size: int = 100) -> bytes:
    """Members that end anywhere in a line, with the magic number of a member in one of them, uncompressed."""
    cut = [data[first : first + size] for first in range(0, len(data), size)]
    return b"".join(gzip.compress(part, compresslevel=number % 2 * 9) for number, part in enumerate(cut)) + b"\0" * 9


def zstandard_frames(data: bytes, size: int = 100) -> bytes:
    """Frames, and between them skippable ones, as pzstd writes them."""
    frame = zstandard.ZstdCompressor().compress
    cut = [data[first : first + size] for first in range(0, len(data), size)]
    return b"".join(b"\x50\x2a\x4d\x18\x04\0\0\0size" + frame(part) for part in cut)


def streamed_zstandard(data: bytes) -> bytes:
    """A frame that does not tell the size of its content."""
    compressor = zstandard.ZstdCompressor().compressobj()
    return compressor.compress(data) + compressor.flush()


def parquet(path: Path) -> None:
    pq.write_table(pa.table({"text": [f"row {i}" if i % 6 else None for i in range(300)]}), path, row_group_size=20)


def members() -> dict[str, bytes]:
    return {f"{i % 3}/{i}.{'txt' if i % 4 else 'bin'}": f"member {i}\n\nof it\n".encode() * (i % 5) for i in range(40)}


def zip_file(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members().items():
            archive.writestr(name, data)


def tar_bytes(mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{mode}") as archive:  # type: ignore[call-overload]
        for name, data in members().items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


JSON_LINES = "".join(json.dumps({"text": f"é {i}\n" * (i % 5)}) + "\n" * (1 + i % 3) for i in range(150)).encode()
FILES: dict[str, bytes | Callable[[Path], None]] = {
    "a.txt": b"\xef\xbb\xbf" + TEXT.encode() + b"\xef\xbb\xbflast",
    "a.jsonl": JSON_LINES,
    "a.csv": csv_text().encode(),
    "a.csv.gz": gzip.compress(csv_text().encode()),
    "one.txt.gz": gzip.compress(TEXT.encode()),
    "padded.txt.gz": gzip.compress(TEXT.encode()) + b"\0" * 64,
    "members.txt.gz": gzip_members(TEXT.encode()),
    "members.jsonl.gz": gzip_members(JSON_LINES, 333),
    "one.txt.zst": zstandard.ZstdCompressor().compress(TEXT.encode()),
    "streamed.txt.zst": streamed_zstandard(TEXT.encode()),
    "frames.txt.zst": zstandard_frames(TEXT.encode()),
    "a.parquet": parquet,
    "a.zip": zip_file,
    "a.tar": tar_bytes(""),
    "a.tar.gz": tar_bytes("gz"),
}


TABLES = ("a.jsonl", "a.csv", "a.csv.gz", "members.jsonl.gz", "a.parquet")  # which the flags do not change
FLAGS: tuple[dict[str, Any], ...] = ({}, {"document": "blank_line"}, {"document_start": "^= "})
CASES = [
    (name, flags, size)
    for name, flags, size in itertools.product(FILES, FLAGS, (11, 64, 200))
    if name not in TABLES or not flags or size == 64
]


def small_splits(patch: pytest.MonkeyPatch, size: int) -> None:
    patch.setattr(splits, "MIN_SPLIT_BYTES", size)
    patch.setattr(splits, "MAX_SPLIT_BYTES", size)


@pytest.mark.parametrize(("name", "flags", "size"), CASES, ids=str)
def test_splits_give_the_documents_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, flags: dict[str, Any], size: int
) -> None:
    """Catches documents that are lost, repeated, cut or reordered at the border of two splits, and wrong lines."""
    written = FILES[name]
    if isinstance(written, bytes):
        (tmp_path / name).write_bytes(written)
    else:
        written(tmp_path / name)
    sources, options = find_sources(tmp_path / name), TextOptions(**flags)
    small_splits(monkeypatch, size)
    stats = ReadStats()
    expected = list(read_documents(map(Span, sources), options, stats))
    planned = plan_splits(sources, options)
    assert len(planned) > 2
    assert len({split.key for split in planned}) == len(planned)
    found, matches, archives = list[SourceDocument](), 0, 0
    for split in planned:
        part = ReadStats()
        found += read_documents(map(locate_lines, split.spans), options, part)
        matches += part.start_matches
        archives += sum(members.read for members in part.archives.values())
    assert found == expected
    assert matches == stats.start_matches
    assert archives == sum(members.read for members in stats.archives.values())


@given(
    text=st.text("ab \n\r", max_size=60),
    borders=st.sets(st.integers(1, 60), max_size=6),
    flags=st.sampled_from([{}, {"document": "blank_line"}, {"document_start": "^a"}]),
)
def test_any_borders_give_the_same_documents(text: str, borders: set[int], flags: dict[str, str]) -> None:
    """Catches a border at a line break, a blank line or the end of the file that is taken for another one."""
    options, content = TextOptions(**flags), text.encode()

    def read(part: Range) -> list[SourceDocument]:
        return list(parse_documents(io.BytesIO(content), "a.txt", "a.txt", options, ReadStats(), part))

    ends = [0, *sorted(borders), None]
    ranges = [
        Range("bytes", start or 0, stop, content[: start or 0].count(b"\n")) for start, stop in itertools.pairwise(ends)
    ]
    assert [document for part in ranges for document in read(part)] == read(Range())


def test_small_files_share_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a task for every small file, and a file that grows and moves the borders of all splits after it."""
    for number in range(200):
        (tmp_path / f"{number:03}.txt").write_text("x" * 30)
    small_splits(monkeypatch, 1000)
    before = plan_splits(find_sources(tmp_path), TextOptions())
    assert 5 <= len(before) <= 7
    assert [span.source for split in before for span in split.spans] == list(find_sources(tmp_path))
    (tmp_path / "050.txt").write_text("x" * 33)
    after = plan_splits(find_sources(tmp_path), TextOptions())
    assert len({split.key for split in after} - {split.key for split in before}) <= 2


@pytest.mark.parametrize(("mebibytes", "count", "size"), [(3, 3, 1), (5000, 2500, 2), (10**5, 3125, 32)])
def test_size_of_splits(mebibytes: int, count: int, size: int) -> None:
    """Catches thousands of splits of a small source, and splits of a large one that take hours."""
    source = splits.Source("file", "a.txt", bytes=mebibytes << 20)
    planned = plan_splits([source], TextOptions())
    assert (len(planned), planned[0].bytes) == (count, size << 20)


def test_document_of_a_whole_file_is_not_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a document that is cut."""
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "a.txt.gz").write_bytes(gzip_members(TEXT.encode()))
    small_splits(monkeypatch, 50)
    assert len(plan_splits(find_sources(tmp_path), TextOptions(document="file"))) == 2


def test_hub_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows of a data set that are lost or repeated."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(50)))
    monkeypatch.setattr(splits, "_HUB_ROWS", 7)
    load_rows.cache_clear()
    planned = plan_splits(find_sources(f"hub:{tmp_path}"), TextOptions())
    found = [list(read_documents(split.spans, TextOptions(), ReadStats())) for split in planned]
    assert len(found) == 8
    assert [(document.text, document.line) for part in found for document in part] == [
        (f"row {i}", i + 1) for i in range(50)
    ]


def test_a_folder_of_rows_that_changes(tmp_path: Path) -> None:
    """Catches an interrupted build that continues with splits of the rows as they were before."""
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "one"}\n')
    (before,) = find_sources(f"hub:{tmp_path}")
    path.write_text('{"text": "another"}\n')
    (after,) = find_sources(f"hub:{tmp_path}")
    assert before != after
    assert find_sources(f"hub:{tmp_path}") == (after,)


def test_a_damaged_member_at_a_border(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a member that is skipped because the search for the next one does not recognize it."""
    data = gzip_members(TEXT.encode())
    begins = [number for number in range(len(data)) if data.startswith(b"\x1f\x8b\x08", number)]
    for begin in begins[1:]:
        damaged = data[: begin + 2] + b"\x07" + data[begin + 3 :]
        path = tmp_path / "a.txt.gz"
        path.write_bytes(damaged)
        small_splits(monkeypatch, 90)
        spans = [span for split in plan_splits(find_sources(path), TextOptions()) for span in split.spans]
        assert len(spans) > 3
        with pytest.raises(UserError, match=r"a\.txt\.gz is damaged or truncated"):
            list(read_documents(spans, TextOptions(), ReadStats()))


@pytest.mark.parametrize("content", [b"no Parquet " * 20, b"PAR1" * 40, b"x" * 200 + b"\x14\0\0\0PAR1"])
def test_the_task_reports_a_damaged_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Catches a traceback of pyarrow when the build is planned."""
    (tmp_path / "a.parquet").write_bytes(content)
    small_splits(monkeypatch, 90)
    (split,) = plan_splits(find_sources(tmp_path / "a.parquet"), TextOptions())
    with pytest.raises(UserError, match=r"a\.parquet is not a Parquet file, or damaged|cannot read .*a\.parquet"):
        list(read_documents(split.spans, TextOptions(), ReadStats()))


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_lines_of_tables_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches a row group's number that is taken for bytes, and a damaged split that is read twice for the same
    message."""
    written = FILES[name]
    (tmp_path / name).write_bytes(written) if isinstance(written, bytes) else written(tmp_path / name)
    small_splits(monkeypatch, 64)
    spans = [span for split in plan_splits(find_sources(tmp_path / name), TextOptions()) for span in split.spans]
    assert len(spans) > 2
    assert list(map(locate_lines, spans)) == spans


@pytest.mark.parametrize("error", [StorageError("a.zip: no success"), OSError(errno.EIO, "Input/output error")])
@pytest.mark.parametrize("name", ["one.txt.gz", "frames.txt.zst", "a.parquet", "a.zip", "a.tar.gz"])
def test_a_file_that_cannot_be_read_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    """Catches an outage that makes one split of a large file, and so other shards."""
    written = FILES[name]
    (tmp_path / name).write_bytes(written) if isinstance(written, bytes) else written(tmp_path / name)
    small_splits(monkeypatch, 90)

    def open_file(_: str) -> io.BytesIO:
        file = io.BytesIO((tmp_path / name).read_bytes())
        monkeypatch.setattr(file, "read", Mock(side_effect=error))
        return file

    monkeypatch.setattr(splits, "open_file", open_file)
    with pytest.raises(UserError, match=r"no success|cannot read .*: Input/output error"):
        plan_splits(find_sources(tmp_path / name), TextOptions())


def test_a_member_inside_another_one(tmp_path: Path) -> None:
    """Catches a range that starts with a member that only looks like one, so that documents are lost or repeated."""
    inner = gzip.compress(b"inner\n")
    extra = len(inner).to_bytes(2, "little") + inner
    outer = gzip.compress(b"outer\n")
    outer = outer[:3] + b"\x04" + outer[4:10] + extra + outer[10:]  # FEXTRA, see RFC 1952
    first = gzip.compress(b"first\n")
    path = tmp_path / "a.txt.gz"
    path.write_bytes(first + outer + gzip.compress(b"last\n"))
    (source,) = find_sources(path)
    assert [document.text for document in read_documents([Span(source)], TextOptions(), ReadStats())] == [
        "first",
        "outer",
        "last",
    ]
    part = Range("compressed", 0, len(first) + 5)
    with pytest.raises(UserError, match=r"a\.txt\.gz is damaged or truncated: cannot tell where its parts begin"):
        list(read_documents([Span(source, part)], TextOptions(), ReadStats()))


@pytest.mark.parametrize(
    "end", [b"\0" * 64, gzip.compress(b""), gzip.compress(b"last")], ids=["padding", "empty", "member"]
)
def test_what_follows_a_large_member_does_not_tell_its_size(end: bytes) -> None:
    """Catches a first document that is read once for each split, and splits of which one has everything."""
    content = random.Random(0).randbytes(1000)
    file = gzip.compress(content) + end
    assert estimate_content_bytes(io.BytesIO(file), "gz", len(file)) >= len(content)
