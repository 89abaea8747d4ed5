"""Web archives (ISO 28500): pages of .warc files, texts of .wet files, as Common Crawl publishes them."""

from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

from experiment.errors import UserError, first_line
from experiment.storage import open_file
from pretrain.cleaning.readers import has_suffix
from pretrain.corpus.compression import decompress
from pretrain.corpus.formats import Document, explain_read_errors

if TYPE_CHECKING:
    from warcio.recordloader import ArcWarcRecord

_PAGES = ("text/html", "application/xhtml+xml")
_QUOTED = 100  # characters of a message of warcio, which quotes the file

PACKAGES: tuple[str, ...] = ("warcio", "trafilatura")


def matches(name: str) -> bool:
    return has_suffix(name, ".warc", ".wet")


def read(name: str) -> Iterator[Document]:
    """One document for each page, with its `url`; records of other kinds are skipped."""
    from warcio.archiveiterator import WARCIterator

    number = 0
    with open_file(name) as file:
        records = WARCIterator(_Content(file, name))
        try:
            for number, record in enumerate(records, 1):
                if not (record.rec_headers.get_header("Content-Length") or "").isdigit():
                    raise _damaged(name, number, "its header has no Content-Length")
                content = record.content_stream().read()
                if record.raw_stream.limit > 0:
                    raise _damaged(name, number, f"the record lacks {record.raw_stream.limit:,} bytes")
                url = record.rec_headers.get_header("WARC-Target-URI") or ""
                if record.rec_type == "conversion":
                    yield Document(content.decode("utf-8", "replace"), name, number, {"url": url})
                elif record.rec_type == "response" and _is_page(record):
                    yield Document(_decode(content, record), name, number, {"url": url}, "html")
        except UserError:
            raise
        except Exception as error:  # warcio takes missing headers for granted
            raise _damaged(name, number + 1, first_line(error)[:_QUOTED]) from None
        if records.next_line:  # warcio takes a record whose headers are truncated for the end
            raise _damaged(name, number + 1, "its headers have no end")
        if number == 0:
            raise UserError(f"{name}: expected a WARC file, found no record")


class _Content:
    """The decompressed content of a file. warcio takes a truncated file for one that ends there."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._stream, self._name = decompress(file, name.lower().rpartition(".")[2]), name

    def read(self, size: int = -1) -> bytes:
        with explain_read_errors(self._name):
            return self._stream.read(size)


def _is_page(record: "ArcWarcRecord") -> bool:
    headers = record.http_headers
    return headers is not None and (headers.get_header("Content-Type") or "").lower().startswith(_PAGES)


def _decode(content: bytes, record: "ArcWarcRecord") -> str:
    content_type = record.http_headers.get_header("Content-Type") or ""
    charset = content_type.lower().partition("charset=")[2].partition(";")[0].strip(" \"'") or "utf-8"
    try:
        return content.decode(charset, "replace")
    except LookupError:  # an unknown name
        return content.decode("utf-8", "replace")


def _damaged(name: str, number: int, problem: str) -> UserError:
    return UserError(f"{name}: record {number:,} is damaged or truncated: {problem}")
