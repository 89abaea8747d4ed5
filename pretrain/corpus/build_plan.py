"""Plan of the input and output of a corpus build."""

import os
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from experiment.errors import UserError, inform, readable_disk_errors
from experiment.files import fsync_tree, json_digest, read_json
from experiment.formatting import counted
from experiment.hub_data import HubData
from experiment.models.model_names import local_tokenizer
from experiment.models.tokenizer import load_tokenizer, save_tokenizer, tokenizer_fingerprint, vocabulary_size
from pretrain.corpus.documents import hub_data
from pretrain.corpus.manifest import Recipe
from pretrain.corpus.options import CorpusOptions, TextOptions
from pretrain.corpus.segmenter import SegmenterSpec, read_segmenter, segmenter_identity
from pretrain.corpus.sources import Source, find_sources, partial_folder
from pretrain.corpus.splits import Split, plan_splits
from pretrain.corpus.tokenization import TokenizerSpec, tokenizer_spec
from pretrain.corpus.word_boundaries import word_boundaries
from pretrain.corpus.workers import worker_pool

Part = Literal["main", "heldout"]
MAIN: Part = "main"
HELDOUT: Part = "heldout"
ARGUMENTS = "build.json"
"""The file of `BuildPlan.arguments` in the folder of an unfinished build."""
PART_CODES: tuple[Part | None, ...] = (None, MAIN, HELDOUT)
"""Meanings of the bytes of `Sampling.parts_of`."""


@dataclass(frozen=True)
class Sampling:
    """Draws by seed: `holdout` of all documents for the held-out corpus, `limit` of the rest for the main corpus."""

    seed: int
    limit: int | None
    holdout: int | None

    @property
    def enabled(self) -> bool:
        """Whether anything is drawn, which needs the number of documents in advance."""
        return self.limit is not None or self.holdout is not None

    @property
    def parts(self) -> tuple[Part, ...]:
        """The corpora that are built."""
        return (MAIN, HELDOUT) if self.holdout else (MAIN,)

    def assign(self, documents: int) -> Iterator[Part | None]:
        """Assign each of `documents` in turn to a part, or to None. Iterating raises UserError if there are too few.

        Selection sampling (Knuth, The Art of Computer Programming 2, 3.4.2, algorithm S): exact counts, constant
        memory, source order. The held-out documents do not depend on the limit.
        """
        holdout = self.holdout or 0
        if holdout >= documents:
            raise UserError(f"--holdout {holdout:,}: the source has only {counted(documents, 'document')} with text")
        rest, limit = documents - holdout, self.limit or documents
        holdout_random, limit_random = random.Random(f"holdout {self.seed}"), random.Random(f"limit {self.seed}")
        for left in range(documents, 0, -1):
            if holdout_random.random() * left < holdout:
                holdout -= 1
                yield HELDOUT
            elif limit_random.random() * rest < limit:
                rest, limit = rest - 1, limit - 1
                yield MAIN
            else:
                rest -= 1
                yield None

    def parts_of(self, documents: Sequence[int]) -> Iterator[bytes]:
        """Return the parts of each of some groups of documents, of these sizes: a byte per document. Empty if all
        documents are in the main corpus."""
        codes = map(PART_CODES.index, self.assign(sum(documents)) if self.enabled else ())
        return (bytes(islice(codes, count)) for count in documents)


@dataclass(frozen=True)
class BuildTokenizer:
    """The tokenizer of a build."""

    spec: TokenizerSpec
    fingerprint: str
    vocabulary_size: int
    files: Mapping[str, bytes]  # of its Hugging Face folder, by path in it

    def save(self, folder: Path) -> None:
        """Write the Hugging Face folder, and wait until it is on disk."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        fsync_tree(folder)


def load_build_tokenizer(name: str, segmenter: SegmenterSpec | None) -> BuildTokenizer:
    """Load a tokenizer, by a name that `local_tokenizer` takes, without importing torch. Raises UserError as
    `load_tokenizer`, and StoppedError if a worker process is killed."""
    path = local_tokenizer(name)
    if "transformers" in sys.modules:
        return _load(path, segmenter)
    with readable_disk_errors(), worker_pool(1, "free some, and run the same command again") as pool:
        return pool.submit(_load_without_torch, path, segmenter).result()


def _load_without_torch(path: Path, segmenter: SegmenterSpec | None) -> BuildTokenizer:
    """Load a tokenizer in a worker process."""
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would say that torch is missing
    sys.modules["torch"] = None  # type: ignore[assignment]
    return _load(path, segmenter)


def _load(path: Path, segmenter: SegmenterSpec | None) -> BuildTokenizer:
    tokenizer = load_tokenizer(path)
    where = f"the folder for temporary files, {tempfile.gettempdir()}: "
    with readable_disk_errors(where, "; set TMPDIR to another one"), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_tokenizer(tokenizer, folder)
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return BuildTokenizer(
        tokenizer_spec(tokenizer, segmenter), tokenizer_fingerprint(tokenizer), vocabulary_size(tokenizer), files
    )


@dataclass(frozen=True)
class BuildPlan:
    """A checked request for a corpus."""

    folder: Path
    sources: tuple[Source, ...]
    splits: Sequence[Split]
    options: CorpusOptions
    sampling: Sampling
    tokenizer: BuildTokenizer
    segmenter: str | None  # name and version

    @property
    def partial(self) -> Path:
        """The folder of an unfinished build."""
        return partial_folder(self.folder)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that an unfinished build must have in common to be resumed."""
        text = {name: getattr(self.options, name) for name in TextOptions.model_fields}
        names = [(source.kind, source.name, source.selection) for source in self.sources]
        data_sets = [hub_data(source) for source in self.sources if source.kind == "hub"]
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "segmenter": self.segmenter,
            "limit": self.sampling.limit,
            "holdout": self.sampling.holdout,
            "seed": self.seed,
            **text,
            "source": json_digest(names),
            "hub": [str(data) for data in data_sets if data.revision],
        }

    @property
    def seed(self) -> int | None:
        return self.sampling.seed if self.sampling.enabled else None

    def folder_of(self, part: Part) -> Path:
        """Return the folder of the main or the held-out corpus."""
        return self.folder if part == MAIN else self.folder.with_name(f"{self.folder.name}-{part}")

    def recipe(self, part: Part, source: str) -> Recipe:
        """Return the recipe of a part. `source`: the digest of all documents."""
        return Recipe(
            source=source,
            tokenizer=self.tokenizer.fingerprint,
            part=part,
            seed=self.seed,
            limit=self.sampling.limit,
            holdout=self.sampling.holdout,
            segmenter=self.segmenter,
        )


def _recorded_data(folder: Path) -> list[HubData]:
    """Return the data sets of the unfinished build of a corpus, with their commits."""
    try:
        return [HubData.parse(data) for data in read_json(partial_folder(folder) / ARGUMENTS)["hub"]]
    except (OSError, ValueError, LookupError):
        return []


def plan_build(options: CorpusOptions) -> BuildPlan:
    """Find the sources and open the tokenizer. Raises UserError if either cannot be used; reads no
    text."""
    assert options.source is not None
    assert options.tokenizer is not None
    assert options.output is not None
    pinned = _recorded_data(options.output)
    sources = find_sources(options.source, output=options.output, pinned=pinned)
    for source in sources:
        if source.kind == "hub" and (data := hub_data(source)) in pinned and str(data) not in str(options.source):
            inform(f"{partial_folder(options.output)} was begun with {data}; delete it to read a newer commit")
    segmenter = None if options.segmenter is None else read_segmenter(options.user_dictionary)
    tokenizer = load_build_tokenizer(options.tokenizer, segmenter)
    if segmenter is not None and word_boundaries(tokenizer.spec.tokenizer_json) is None:
        raise UserError(
            f"--segmenter {options.segmenter}: cannot tell where words begin for the tokenizer {options.tokenizer}"
        )
    return BuildPlan(
        folder=options.output.absolute(),
        sources=sources,
        splits=plan_splits(sources, options),
        options=options,
        sampling=Sampling(options.seed, options.limit, options.holdout),
        tokenizer=tokenizer,
        segmenter=None if segmenter is None else segmenter_identity(segmenter),
    )
