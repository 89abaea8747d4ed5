"""The files of a pass: documents, their observations and tallies, in parts of a few megabytes.

A part is finished if its tally exists, which is written last. Parts are numbered in the order of the collection.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from experiment.errors import UserError
from experiment.files import parse_record, write_file, write_json
from pretrain.cleaning.arrays import StoredArray
from pretrain.cleaning.step import Arrays, Document
from pretrain.cleaning.tally import PartTally

SUFFIX = ".jsonl.zst"
_LEVEL = 3  # of Zstandard
_FRAME_BYTES = 1 << 20  # of text: in smaller frames than `has_several_members` reads, files can be read in parallel


@dataclass(frozen=True)
class PassFolder:
    """The folder of one pass over the collection."""

    folder: Path

    def documents(self, part: int) -> Path:
        return self.folder / f"{part:06d}{SUFFIX}"

    def read(self, part: int) -> list[Document]:
        """Return the documents of a finished part. Raises UserError for a file that is damaged."""
        path = self.documents(part)
        try:
            found = list(read_documents(path))
        except (ValueError, zstandard.ZstdError):
            found = []
        if len(found) != self.tally(part).kept:
            raise UserError(f"{path} is damaged; delete {self.folder.parent} to start over")
        return found

    def write(self, part: int, documents: Sequence[Document], observed: Arrays, tally: PartTally) -> None:
        self._tally(part).unlink(missing_ok=True)  # of other documents
        for name, values in observed.items():
            _save(self.folder / f"{part:06d}.{name}.npy", values)
        write_documents(self.documents(part), documents)
        write_json(self._tally(part), asdict(tally))

    def is_finished(self, part: int) -> bool:
        return self._tally(part).exists()

    def tally(self, part: int) -> PartTally:
        """Read the tally of a finished part."""
        try:
            return parse_record(PartTally, self._tally(part).read_bytes())
        except ValueError:
            raise UserError(f"{self._tally(part)} is damaged; delete {self.folder.parent} to start over") from None

    def observed(self, parts: int, name: str) -> list[StoredArray]:
        """Return an array of each part of a finished pass."""
        return [StoredArray(self.folder / f"{part:06d}.{name}.npy") for part in range(parts)]

    def write_decisions(self, decisions: Sequence[NDArray[Any]]) -> None:
        for part, values in enumerate(decisions):
            _save(self._decisions(part), values)

    def decisions(self, part: int) -> NDArray[Any]:
        found: NDArray[Any] = np.load(self._decisions(part))
        return found

    def remove_documents(self) -> None:
        """Remove all but the tallies."""
        for path in self.folder.iterdir():
            if path.suffix != ".json":
                path.unlink()

    def _tally(self, part: int) -> Path:
        return self.folder / f"{part:06d}.json"

    def _decisions(self, part: int) -> Path:
        return self.folder / f"{part:06d}.decisions.npy"


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of a file, in order."""
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as stream:
        for line in io.TextIOWrapper(stream, encoding="utf-8", newline="\n"):
            row = json.loads(line)
            yield Document(row["id"], row["source"], row["text"], row.get("metadata", {}))


def write_documents(path: Path, documents: Sequence[Document]) -> None:
    """Write documents. Values of metadata that JSON lacks, such as dates, become text, NaN and infinity null."""
    lines = "".join(json.dumps(_row(document), ensure_ascii=False) + "\n" for document in documents)
    content, compressor = lines.encode(), zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    starts = range(0, max(len(content), 1), _FRAME_BYTES)
    write_file(path, b"".join(compressor.compress(content[start : start + _FRAME_BYTES]) for start in starts))


def _row(document: Document) -> dict[str, Any]:
    row: dict[str, Any] = {"id": document.id, "source": document.source, "text": document.text}
    if document.metadata:
        row["metadata"] = json.loads(json.dumps(document.metadata, default=str), parse_constant=lambda _: None)
    return row


def _save(path: Path, values: NDArray[Any]) -> None:
    content = io.BytesIO()  # to a file, numpy writes without saying that the disk is full
    np.save(content, values, allow_pickle=False)
    write_file(path, content.getvalue())  # not getbuffer: Python 3.12.1 crashes when it collects one
