"""Divide sources into splits, each of which one task reads, tokenizes and writes.

The plan depends on the files alone: their names, sizes, times of modification and, for a large file that is compressed,
an archive or Parquet, on its first or last bytes. docs/corpora_at_scale.md says how each format is divided.
"""

import itertools
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import xxhash

from experiment.hub_data import load_rows
from experiment.storage import StorageError, open_file
from pretrain.corpus.compression import estimate_content_bytes, has_several_members
from pretrain.corpus.documents import hub_data
from pretrain.corpus.formats import WHOLE, Range, Unit, UnreadableError, detect_format, explain_read_errors
from pretrain.corpus.options import TextOptions
from pretrain.corpus.sources import Source, Span

MIN_SPLIT_BYTES, MAX_SPLIT_BYTES = 1 << 20, 1 << 25
_SPLITS = 4096  # that are aimed at, so that a thousand cores have work until the end
_READ_TIMES = 16  # at most, a file whose ranges can only be reached by reading all bytes before them
_OPENED = 1024  # files at most that are opened for a plan, unless they are larger than this:
_OPENED_BYTES = 1 << 30
_HUB_ROWS = 20_000  # of a data set


@dataclass(frozen=True, slots=True)
class Split:
    """Parts of sources that one task reads."""

    key: str  # identifies them, with the sizes and versions of their files
    spans: tuple[Span, ...]  # of one item of --source, if items are counted
    bytes: int  # on disk; of a file that is divided, its share


def plan_splits(sources: Sequence[Source], options: TextOptions) -> list[Split]:
    """Divide large files, and join small ones that follow one another. Opens few files, and reads no text.

    Raises UserError for a hub data set that cannot be loaded, and a file that cannot be read. Takes time per source,
    not per byte.
    """
    total = sum(source.bytes or 0 for source in sources)
    size = MIN_SPLIT_BYTES
    while size < MAX_SPLIT_BYTES and size * _SPLITS < total:
        size *= 2  # few sizes: a file that grows does not move the borders of all splits
    opened = max(size, min(total // _OPENED, _OPENED_BYTES))
    return list(_group(sources, options, size, opened))


def _group(sources: Iterable[Source], options: TextOptions, size: int, opened: int) -> Iterator[Split]:
    """Divide and join. Files of an item of `--source` that follow one another share a split if they begin in the same
    `size` bytes of all: if one of them grows, few of the others come into another split."""
    waiting, slot, begin = list[Span](), 0, 0
    for source in sources:
        ranges, is_small = _divide(source, options, size, opened), source.bytes is not None and source.bytes <= size
        if waiting and (not is_small or begin // size != slot or source.item != waiting[0].source.item):
            yield _split(waiting)
            waiting = []
        if is_small:
            waiting.append(Span(source))
            slot = begin // size
        else:
            yield from (_split([Span(source, bounds)], len(ranges)) for bounds in ranges)
        begin += source.bytes or 0
    if waiting:
        yield _split(waiting)


def _split(spans: Sequence[Span], parts: int = 1) -> Split:
    """Make a split. `parts`: into how many the source is divided."""
    digest, size = xxhash.xxh3_128(), 0
    for source, bounds in spans:
        identity = source.kind, source.name, source.selection, source.bytes, source.version, bounds
        digest.update(repr(identity).encode())
        size += (source.bytes or 0) // parts
    return Split(digest.hexdigest(), tuple(spans), size)


def _divide(source: Source, options: TextOptions, size: int, opened: int) -> list[Range]:
    if source.kind == "hub":
        rows = len(load_rows(hub_data(source)))
        return _ranges("rows", rows, max(_HUB_ROWS, -(-rows // _SPLITS)))
    if source.bytes is None or source.bytes <= size:
        return [WHOLE]
    file_format, compression = detect_format(source.name)
    if source.kind == "file" and not compression and file_format in ("text", "jsonl", None):
        is_whole = options.document == "file" and file_format != "jsonl"
        return [WHOLE] if is_whole else _ranges("bytes", source.bytes, size)
    if source.kind == "file" and not compression and file_format in ("csv", "tsv"):
        return _reread_ranges(source.bytes, source.bytes, size)
    if source.bytes <= opened:
        return [WHOLE]
    try:
        with explain_read_errors(source.name):
            return _divide_opened(source, options, size)
    except (StorageError, UnreadableError):  # later it may be readable, and be divided in another way
        raise
    except ValueError:  # a UserError, or an error of pyarrow
        return [WHOLE]  # the task that reads it reports the error


def _divide_opened(source: Source, options: TextOptions, size: int) -> list[Range]:
    """Divide a file that must be opened to tell how."""
    assert source.bytes is not None
    file_format, compression = detect_format(source.name)
    with open_file(source.name) as file:
        if source.kind == "archive" and source.name.lower().endswith(".zip"):
            with zipfile.ZipFile(file) as archive:
                return _cut("members", [info.compress_size for info in archive.infolist()], size)
        if source.kind == "archive":
            content = estimate_content_bytes(file, compression, source.bytes)
            return _reread_ranges(content, source.bytes, size)
        if file_format == "parquet":
            return [WHOLE] if compression else _cut("row groups", _row_group_bytes(file), size)
        if file_format not in ("csv", "tsv"):
            if options.document == "file" and file_format != "jsonl":
                return [WHOLE]
            if has_several_members(file, compression):
                return _ranges("compressed", source.bytes, size)
        return _reread_ranges(estimate_content_bytes(file, compression, source.bytes), source.bytes, size)


def _row_group_bytes(file: IO[bytes]) -> list[int]:
    import pyarrow.parquet

    metadata = pyarrow.parquet.ParquetFile(file).metadata
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]


def _ranges(unit: Unit, total: int, size: int) -> list[Range]:
    """Divide `total` evenly, so that no part is larger than `size`."""
    count = max(1, -(-total // size))
    borders = [number * total // count for number in range(count + 1)]
    return [Range(unit, start, stop) for start, stop in itertools.pairwise(borders)]


def _reread_ranges(content: int, size_on_disk: int, size: int) -> list[Range]:
    """Divide a content of about that many bytes into few ranges. The last one is open: the number is an estimate."""
    count = min(_READ_TIMES, -(-size_on_disk // size), max(1, content))
    borders = [number * content // count for number in range(count)]
    return [Range("bytes", start, stop) for start, stop in itertools.zip_longest(borders, borders[1:])]


def _cut(unit: Unit, sizes: Sequence[int], size: int) -> list[Range]:
    """Join items that follow one another until they have `size` bytes."""
    borders, since = [0], 0
    for number, item in enumerate(sizes[:-1], 1):
        since += item
        if since >= size:
            borders.append(number)
            since = 0
    return [Range(unit, start, stop) for start, stop in itertools.zip_longest(borders, borders[1:])]
