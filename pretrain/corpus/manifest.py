"""manifest.json: the contents of a corpus folder, with checksums."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AliasPath, ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError

from experiment.errors import UserError
from experiment.files import json_digest, write_json
from experiment.models.tokenizer import many_unknown

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)

_MAX_TOKENS_PER_WORD = 5.0  # higher values are rare in text that is written with spaces
_FEW_UNSPACED = 0.05  # characters per token
_NO_OTHER_KEYS = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Shard:
    """One Arrow file of a corpus, made of whole documents."""

    __pydantic_config__: ClassVar = _NO_OTHER_KEYS

    file: Annotated[str, Field(pattern=r"^data-\d+-of-\d+\.arrow$")]  # name inside the corpus folder
    rows: NonNegativeInt  # documents
    tokens: NonNegativeInt
    unknown_tokens: NonNegativeInt
    words: NonNegativeInt  # separated by whitespace
    text_bytes: NonNegativeInt  # UTF-8 bytes of the source documents
    bytes: NonNegativeInt  # file size
    sha256: str  # of the file
    content: str  # SHA-256 of document lengths, token ids and word starts, independent of the file layout


@dataclass(frozen=True)
class Recipe:
    """The inputs of a corpus. Equal recipes give the same documents in the same order; their shards, and with them the
    fingerprint, also depend on how the source is divided into files."""

    __pydantic_config__: ClassVar = _NO_OTHER_KEYS

    source: str  # digest of all documents read, in order
    tokenizer: str  # fingerprint
    part: str  # main | heldout
    seed: int | None  # for holdout and limit; None without either
    limit: int | None
    holdout: int | None
    segmenter: str | None = None  # name and version; it found the word starts. None: the corpus has none


@dataclass(frozen=True)
class SourceShare:
    """The share of one item of `--source`."""

    name: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json. Lengths are in tokens, without special tokens."""

    recipe: Recipe
    vocabulary_size: Annotated[int, Field(validation_alias=AliasPath("tokenizer", "vocabulary_size"))]
    token_type: str  # Arrow type of a token id: uint16 | uint32
    empty_documents: int  # dropped
    length_percentiles: dict[str, int]  # percentile -> document length in tokens
    shards: tuple[Shard, ...]
    decontaminated: dict[str, str] | None = None  # task -> digest of its texts; None: not known, see docs/cleaning.md
    sources: tuple[SourceShare, ...] = ()  # in order; empty: not known, or only one
    unknown_texts: dict[str, int] = field(default_factory=dict)  # the most frequent unknown ones of a sample
    unspaced_characters: int = 0  # without words, see `EncodedBatch`; 0: none, or not known

    @property
    def documents(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def unknown_token_rate(self) -> float:
        return sum(shard.unknown_tokens for shard in self.shards) / self.tokens

    def unknown_warnings(self, corpus: Path) -> Iterator[str]:
        """Yield a warning if many tokens are unknown."""
        for line in many_unknown(str(corpus), self.unknown_token_rate):
            yield (
                f"{line}, and nothing is learned from these tokens; train a tokenizer on the text, or add tokens to "
                "it, with `deepcloze tokenizer`"
            )

    @property
    def tokens_per_word(self) -> float:
        return self.tokens / max(1, sum(shard.words for shard in self.shards))

    @property
    def lacks_words(self) -> bool:
        """Whether text, or a part of it, seems to be written without spaces, and no segmenter has found its words."""
        has_few_spaces = self.tokens_per_word > _MAX_TOKENS_PER_WORD
        has_unspaced = self.unspaced_characters > _FEW_UNSPACED * self.tokens
        return self.recipe.segmenter is None and (has_few_spaces or has_unspaced)

    @property
    def fingerprint(self) -> str:
        """Identity of the tokens, their word starts and the tokenizer."""
        return json_digest(
            [self.recipe.tokenizer, *([shard.rows, shard.tokens, shard.content] for shard in self.shards)]
        )


@dataclass(frozen=True)
class _Head:
    """The fields that are checked before the rest."""

    format: int
    fingerprint: str = ""


_HEAD = TypeAdapter(_Head)
_MANIFEST = TypeAdapter(Manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `folder/manifest.json` atomically."""
    content = {
        "format": FORMAT,
        "fingerprint": manifest.fingerprint,
        "tokenizer": {"fingerprint": manifest.recipe.tokenizer, "vocabulary_size": manifest.vocabulary_size},
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "text_bytes": manifest.text_bytes,
        "empty_documents": manifest.empty_documents,
        "length_percentiles": manifest.length_percentiles,
        "unknown_token_rate": manifest.unknown_token_rate,
        "tokens_per_word": manifest.tokens_per_word,
        "token_type": manifest.token_type,
        "recipe": asdict(manifest.recipe),
        **({} if manifest.decontaminated is None else {"decontaminated": manifest.decontaminated}),
        **({"sources": [asdict(source) for source in manifest.sources]} if manifest.sources else {}),
        **({"unknown_texts": manifest.unknown_texts} if manifest.unknown_texts else {}),
        **({"unspaced_characters": manifest.unspaced_characters} if manifest.unspaced_characters else {}),
        "shards": [asdict(shard) for shard in manifest.shards],
    }
    write_json(folder / MANIFEST, content, indent=1)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a finished corpus. Raises UserError if it is missing or damaged, or has another format."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        problem = f"has no {MANIFEST}" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} is not a corpus: it {problem}; build one with `deepcloze corpus`") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return parse_manifest(content, str(path))


def parse_manifest(content: bytes, path: str) -> Manifest:
    """Return the manifest in the content of a file. Raises UserError, which names `path`, if it is damaged."""
    try:
        head = _HEAD.validate_json(content, strict=True)
        if head.format != FORMAT:
            raise UserError(f"{path}: found corpus format {head.format}, expected {FORMAT}; rebuild the corpus")
        manifest = _MANIFEST.validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is damaged{place and f' at {place}'}: {first['msg']}; rebuild the corpus") from None
    if manifest.fingerprint != head.fingerprint:
        raise UserError(f"{path} is damaged: its fingerprint does not match its shards; rebuild the corpus")
    return manifest


def percentiles(lengths: Iterable[tuple[int, int]]) -> dict[str, int]:
    """Return {percentile: document length}, by the nearest-rank definition, from one or more (length, count) pairs."""
    counts = sorted(lengths)
    ranks = list(accumulate(count for _, count in counts))  # of the last document of each length, from 1
    return {
        str(percentile): int(counts[bisect_left(ranks, -(-percentile * ranks[-1] // 100))][0])
        for percentile in PERCENTILES
    }
