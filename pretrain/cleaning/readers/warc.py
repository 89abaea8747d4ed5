"""Web archives (ISO 28500): pages of .warc files, texts of .wet files, as Common Crawl publishes them."""

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING

import zstandard

from experiment.errors import UserError, first_line
from experiment.storage import open_file
from pretrain.cleaning import markup
from pretrain.cleaning.markup import HTTP_ERROR
from pretrain.cleaning.readers import has_suffix
from pretrain.cleaning.readers.html import decode_page, too_large
from pretrain.cleaning.step import check_installed
from pretrain.corpus.compression import MemberReader
from pretrain.corpus.formats import SourceDocument, detect_format, explain_read_errors

if TYPE_CHECKING:
    from warcio.recordloader import ArcWarcRecord

_PAGES = ("text/html", "application/xhtml+xml")
_ERROR = re.compile(r"\S+[ \t]+([013-9]\d\d\b.*)")  # the status line of some servers has no code, or tabs
_BLOCK = 1 << 16  # bytes
_QUOTED = 100  # characters of a message of warcio, which quotes the file

PACKAGES = ("warcio", "trafilatura")


def matches(name: str) -> bool:
    return has_suffix(name, ".warc", ".wet")


def read(name: str) -> Iterator[SourceDocument]:
    """Yield a document for each page, with its `url`, and the status line in place of an error page; records of other
    kinds are skipped."""
    from warcio.archiveiterator import WARCIterator
    from warcio.bufferedreaders import BufferedReader

    BufferedReader.DECOMPRESSORS["zstd"] = lambda: zstandard.ZstdDecompressor().decompressobj(read_across_frames=True)
    BufferedReader.DECOMPRESSORS["br"] = _brotli_decompressor
    with open_file(name) as file:
        content = _Content(file, name)
        records = WARCIterator(content)
        try:
            while (record := next(records, None)) is not None:
                if not (record.rec_headers.get_header("Content-Length") or "").isdigit():
                    raise _damaged(content, "its header has no Content-Length")
                kind = _header(record, "Content-Type")
                is_response = record.rec_type == "response" and kind.startswith(_PAGES)
                error = _ERROR.match(str(record.http_headers)) if is_response else None
                is_page = is_response and error is None
                if is_page and _header(record, "Content-Encoding") == "br":
                    check_installed(content.place, ["brotli"])
                is_read = is_page or record.rec_type == "conversion"
                stream = record.content_stream() if is_page else record.raw_stream
                payload = stream.read(markup.MAX_PAGE_BYTES + 1) if is_read else b""
                while record.raw_stream.read(_BLOCK):  # what is skipped, or follows the body of the answer
                    pass
                if record.raw_stream.limit > 0:
                    raise _damaged(content, f"it lacks {record.raw_stream.limit:,} bytes")
                url = record.rec_headers.get_header("WARC-Target-URI") or ""
                if len(payload) > markup.MAX_PAGE_BYTES:
                    yield too_large(name, content.record, {"url": url})
                elif record.rec_type == "conversion":
                    yield SourceDocument(payload.decode("utf-8", "replace"), name, content.record, {"url": url})
                elif is_page:
                    charset = kind.partition("charset=")[2].partition(";")[0].strip(" \"'")
                    yield SourceDocument(decode_page(payload, charset), name, content.record, {"url": url}, "html")
                elif error is not None:
                    yield SourceDocument(error[1].rstrip(), name, content.record, {"url": url}, HTTP_ERROR)
                content.record += 1
        except UserError:
            raise
        except Exception as error:  # warcio takes missing headers for granted
            raise _damaged(content, first_line(error)[:_QUOTED]) from None
        if records.next_line:  # warcio takes a record whose headers are truncated for the end
            raise _damaged(content, "its headers have no end")
        if content.record == 1:
            raise UserError(f"{name}: expected a WARC file, found no record")


class _Content:
    """The decompressed content of a file. warcio takes a truncated file for one that ends there."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        _, compression = detect_format(name)
        # Not `decompress`, which reads ahead: the record of an error would not be known.
        self._stream = MemberReader(file, compression) if compression else file
        self._name = name
        self.record = 1  # that is read

    @property
    def place(self) -> str:
        return f"{self._name}: record {self.record:,}"

    def read(self, size: int = -1) -> bytes:
        with explain_read_errors(self.place):
            return self._stream.read(size) or b""


def _brotli_decompressor() -> SimpleNamespace:
    import brotli  # warcio's own decompressor is for another package of this name

    return SimpleNamespace(decompress=brotli.Decompressor().process, unused_data=b"")


def _header(record: "ArcWarcRecord", name: str) -> str:
    """Return the value of an HTTP header in lower case, empty if there is none."""
    headers = record.http_headers
    return "" if headers is None else (headers.get_header(name) or "").lower()


def _damaged(content: _Content, problem: str) -> UserError:
    return UserError(f"{content.place} is damaged or truncated: {problem}")
