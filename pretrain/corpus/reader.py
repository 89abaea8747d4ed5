"""A finished corpus folder, opened for training: memory-mapped, nothing read before it is asked for."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from experiment.errors import UserError
from experiment.files import sha256
from pretrain.corpus.manifest import TOKENIZER, Manifest, read_manifest
from pretrain.corpus.shards import MappedShard, map_shard, row_lengths
from pretrain.corpus.words import BoolArray


@dataclass(frozen=True)
class Corpus:
    """A corpus folder. Copies in other processes (fork or pickle) read the same files through maps of their own."""

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def fingerprint(self) -> str:
        """Of the tokens, their word starts and the tokenizer, wherever the corpus lies."""
        return self.manifest.fingerprint

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.manifest.recipe.tokenizer

    @cached_property
    def documents(self) -> int:
        return self.manifest.documents

    @cached_property
    def tokens(self) -> int:
        return self.manifest.tokens

    def document_lengths(self) -> Iterator[npt.NDArray[np.int32]]:
        """Tokens of each document, one array a shard, in order; none is empty."""
        for shard in self.manifest.shards:
            yield row_lengths(self.path / shard.file)

    def read(self, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Token ids of S spans, one after the other: [sum(lengths)].

        `starts` [S] count in the stream of all documents' tokens, in order. A span must lie within one document.
        """
        spans = self._spans(starts, lengths)
        out = np.empty(int(lengths.sum()), dtype=np.int32)
        at = 0
        # One copy a span is faster than fancy indexing, which needs an index per token.
        for shard, begin, end in spans:
            out[at : at + end - begin] = shard.ids[begin:end]
            at += end - begin
        return out

    def read_word_starts(self, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> BoolArray | None:
        """Which tokens of S spans (see `read`) begin a word: [sum(lengths)]; None: the corpus does not tell."""
        if self.manifest.recipe.segmenter is None:
            return None
        spans = self._spans(starts, lengths)
        out = np.empty(int(lengths.sum()), dtype=np.bool_)
        at = 0
        for shard, begin, end in spans:
            assert shard.word_starts is not None
            bits = np.unpackbits(shard.word_starts[begin // 8 : -(-end // 8)], bitorder="little")
            out[at : at + end - begin] = bits[begin % 8 :][: end - begin]
            at += end - begin
        return out

    def _spans(
        self, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
    ) -> Iterator[tuple[MappedShard, int, int]]:
        """(shard, begin, end) of each span, counted in its shard."""
        shards = np.searchsorted(self._starts[:-1], starts, side="right") - 1
        begins = starts - self._starts[shards]
        ends = begins + lengths
        if (starts < 0).any() or (lengths < 0).any() or (starts + lengths > self._starts[shards + 1]).any():
            raise ValueError("a span reaches out of its shard, so it is not within one document")
        mapped = [self._shards[shard] for shard in shards.tolist()]
        return zip(mapped, begins.tolist(), ends.tolist(), strict=True)

    def verify(self) -> None:
        """Read every shard and compare it with its checksum. Raises UserError that names the first damaged one."""
        for shard in self.manifest.shards:
            if sha256(self.path / shard.file) != shard.sha256:
                raise UserError(f"{self.path / shard.file} is damaged: it has not the sha256 that the manifest records")

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        """Where each shard begins in the stream of tokens, and where the last one ends: [shards + 1]."""
        return np.array(list(itertools.accumulate((shard.tokens for shard in self.manifest.shards), initial=0)))

    @cached_property
    def _shards(self) -> tuple[MappedShard, ...]:
        return tuple(map_shard(self.path / shard.file) for shard in self.manifest.shards)

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "manifest": self.manifest}  # maps don't cross to another process


def open_corpus(path: Path | str) -> Corpus:
    """The corpus in the folder `path`. Raises UserError for a folder that is no finished, whole corpus.

    Takes time per shard, not per token: sizes are compared with the manifest, contents by `Corpus.verify`.
    """
    folder = Path(path).absolute()
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        file = folder / shard.file
        try:
            size = file.stat().st_size
        except OSError as error:
            raise UserError(f"{folder} is not whole: cannot read its shard {shard.file}: {error.strerror}") from None
        if size != shard.bytes:
            raise UserError(f"{folder} is damaged: {shard.file} has {size:,} bytes, the manifest says {shard.bytes:,}")
    return Corpus(folder, manifest)
