"""What a corpus build is going to read and write."""

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from experiment.errors import UserError
from pretrain.corpus.build_tokenizer import BuildTokenizer, load_build_tokenizer
from pretrain.corpus.manifest import Recipe
from pretrain.corpus.options import CorpusOptions, TextOptions
from pretrain.corpus.sampling import MAIN, Part, Sampling
from pretrain.corpus.sources import Source, find_sources
from pretrain.corpus.tokenization import DocumentEncoder
from pretrain.corpus.words import segmenter_identity, word_boundaries


@dataclass(frozen=True)
class BuildPlan:
    """A checked request for a corpus."""

    folder: Path
    sources: tuple[Source, ...]
    text_options: TextOptions
    sampling: Sampling
    tokenizer: BuildTokenizer
    segmenter: str | None  # name and version
    workers: int

    @cached_property
    def encoder(self) -> DocumentEncoder:
        """Encodes in this process, without a segmenter, the few texts that may have no token."""
        return DocumentEncoder(replace(self.tokenizer.spec, segmenter=None))

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


def plan_build(options: CorpusOptions) -> BuildPlan:
    """Find the sources and open the tokenizer. Raises UserError if either cannot be used; reads no text."""
    assert options.source is not None
    assert options.tokenizer is not None
    assert options.output is not None
    sources = find_sources(options.source)
    tokenizer = load_build_tokenizer(options.tokenizer, options.segmenter)
    if options.segmenter is not None and word_boundaries(tokenizer.spec.tokenizer_json) is None:
        raise UserError(
            f"--segmenter {options.segmenter}: cannot tell where words begin for the tokenizer {options.tokenizer}"
        )
    return BuildPlan(
        folder=options.output.absolute(),
        sources=sources,
        text_options=options,
        sampling=Sampling(options.seed, options.limit, options.holdout),
        tokenizer=tokenizer,
        segmenter=None if options.segmenter is None else segmenter_identity(options.segmenter),
        workers=options.workers or len(os.sched_getaffinity(0)),
    )
