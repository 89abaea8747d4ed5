"""Read a finished corpus through memory maps."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiment.config.field_types import expand_home
from experiment.errors import HostError, UserError
from experiment.files import sha256
from experiment.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from experiment.storage import is_url
from pretrain.corpus.manifest import TOKENIZER, Manifest, Shard, read_manifest
from pretrain.corpus.shards import MappedShard, map_shard
from pretrain.corpus.word_boundaries import BoolArray

_BLOCK = 2**20  # tokens that are counted at once
_ADVICE = "restore it from a copy, or build the corpus again"


@dataclass(frozen=True)
class Corpus:
    """An open corpus folder. It can be pickled or forked; each process memory-maps the files again."""

    path: Path
    manifest: Manifest

    def __repr__(self) -> str:
        return f"Corpus({str(self.path)!r}, {self.documents:,} documents, {self.tokens:,} tokens)"

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the tokens, their word starts and the tokenizer, independent of the path."""
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

    def document_lengths(self) -> Iterator[NDArray[np.int32]]:
        """Yield the length in tokens of each document, one array per shard, in order. No document is empty."""
        for shard in self._mapped_shards:
            yield np.diff(shard.offsets)

    def read(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the token ids of S spans, concatenated: [sum(lengths)].

        Raises ValueError if a span crosses the end of a shard.

        Args:
            starts: offset of each span in the token stream of the whole corpus, [S].
            lengths: tokens of each span, [S]. A span must lie within one document.
        """
        spans = (shard.ids[begin:end] for shard, begin, end in self._locate(starts, lengths))
        # One copy per span is faster than fancy indexing, which needs an index per token.
        return np.concatenate([np.empty(0, np.int32), *spans], dtype=np.int32, casting="same_kind")

    def read_word_starts(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> BoolArray | None:
        """Mark the tokens of S spans (see `read`) that begin a word. None: the corpus was built without a segmenter."""
        if self.manifest.recipe.segmenter is None:
            return None
        spans = (shard.word_flags(begin, end) for shard, begin, end in self._locate(starts, lengths))
        return np.concatenate([np.empty(0, np.bool_), *spans])

    def count_tokens(
        self, shards: Iterable[int], advance: Callable[[float], None] = lambda _: None
    ) -> NDArray[np.int64]:
        """Count how often each token of the vocabulary occurs in some shards: [V].

        Args:
            shards: indices in the manifest.
            advance: called with the number of tokens counted since the last call.

        Raises UserError if a shard has a token that is not in the vocabulary.
        """
        counts = np.zeros(self.manifest.vocabulary_size, dtype=np.int64)
        for index in shards:
            path = self.path / self.manifest.shards[index].file
            ids = map_shard(path).ids
            for start in range(0, len(ids), _BLOCK):
                block = ids[start : start + _BLOCK]
                found = np.bincount(block, minlength=len(counts))
                if len(found) > len(counts):
                    raise UserError(
                        f"{path} is damaged: it has a token with id {len(found) - 1}, expected less than {len(counts)}"
                    )
                counts += found
                advance(len(block))
        return counts

    def _locate(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Iterator[tuple[MappedShard, int, int]]:
        """Return (shard, begin, end) of each span; begin and end count from the start of the shard."""
        shards = np.searchsorted(self._shard_starts[:-1], starts, side="right") - 1
        begins = starts - self._shard_starts[shards]
        ends = begins + lengths
        if (starts < 0).any() or (lengths < 0).any() or (starts + lengths > self._shard_starts[shards + 1]).any():
            raise ValueError("a span crosses the end of its shard, so it is not within one document")
        mapped = [self._mapped_shards[shard] for shard in shards.tolist()]
        return zip(mapped, begins.tolist(), ends.tolist(), strict=True)

    def map_shards(self) -> None:
        """Map the shards now, not when they are first read: the corpus keeps these tokens from then on, even if its
        files are replaced."""
        _ = self._mapped_shards

    def find_damage(self, shard: Shard) -> str | None:
        """Compare a shard with its checksum, and its token ids with the vocabulary. Returns the damage, or None."""
        path = self.path / shard.file
        try:
            found = sha256(path)
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}; {_ADVICE}"
        if found != shard.sha256:
            return f"{path} is damaged: its SHA-256 is {found}, expected {shard.sha256}; {_ADVICE}"
        largest, size = int(map_shard(path).ids.max()), self.manifest.vocabulary_size
        if largest >= size:
            return f"{path} has a token with id {largest}, expected less than {size}; build the corpus again"
        return None

    def find_tokenizer_damage(self) -> str | None:
        """Compare the tokenizer with its fingerprint. Returns the damage, or None."""
        path, expected = self.tokenizer_path, self.tokenizer_fingerprint
        if not path.is_dir():
            return f"{path} is missing; {_ADVICE}"
        try:
            found = tokenizer_fingerprint(load_tokenizer(path))
        except UserError as error:
            return str(error) if isinstance(error, HostError) else f"{error}; {_ADVICE}"
        return None if found == expected else f"{path} has the fingerprint {found}, expected {expected}; {_ADVICE}"

    @cached_property
    def _shard_starts(self) -> NDArray[np.int64]:
        """Offset of each shard in the token stream, and the end of the last one: [shards + 1]."""
        return np.array(list(itertools.accumulate((shard.tokens for shard in self.manifest.shards), initial=0)))

    @cached_property
    def _mapped_shards(self) -> tuple[MappedShard, ...]:
        return tuple(map_shard(self.path / shard.file) for shard in self.manifest.shards)

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "manifest": self.manifest}  # memory maps cannot be pickled


def open_corpus(path: Path | str) -> Corpus:
    """Open a corpus folder. Raises UserError if it is not a finished corpus, or if a shard is missing or truncated.

    Compares file sizes with the manifest, which takes time per shard, not per token; `Corpus.find_damage` reads them.
    """
    folder = Path(expand_home(str(path))).absolute()
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        file = folder / shard.file
        try:
            size = file.stat().st_size
        except OSError as error:
            raise UserError(f"{folder} is incomplete: cannot read shard {shard.file}: {error.strerror}") from None
        if size != shard.bytes:
            raise UserError(f"{folder} is damaged: {shard.file} has {size:,} bytes, expected {shard.bytes:,}")
    return Corpus(folder, manifest)


def unique_names(corpora: Sequence[str]) -> list[str]:
    """Return the names of folders or URLs, with as many parent folders as make them unique."""
    paths = [Path(name) if is_url(name) else Path(name).resolve() for name in corpora]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names
