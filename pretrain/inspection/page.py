"""The page of an inspection, and its summary on the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from experiment.decontamination import CLEAN_SUMMARY, CleanSummary
from experiment.formatting import counted
from experiment.results.page import (
    Bar,
    BarChart,
    BarCharts,
    Block,
    Fact,
    Heading,
    Headline,
    Page,
    SeenText,
    SeenTexts,
    Table,
    Text,
    write_page,
)
from experiment.run_files.fillings import spread
from pretrain.cleaning.report import describe as describe_cleaning
from pretrain.cleaning.report import summary_blocks
from pretrain.corpus.build import summary
from pretrain.corpus.manifest import Manifest
from pretrain.inspection.contents import SCRIPT_TOKENS
from pretrain.inspection.masked_documents import MAX_SEQ_LENGTH, token_text
from pretrain.inspection.near_duplicates import NGRAM, THRESHOLD, NearDuplicates
from pretrain.inspection.packing_efficiency import BATCH_TOKENS, BATCHES, PackingEfficiency
from pretrain.inspection.sample import Sample, SampledDocument

_FREQUENT_TOKENS = 20
_SUMMARY_TOKENS, _SUMMARY_SCRIPTS = 8, 5
_PAIRS = 6
_PAIR_TOKENS = 64  # of a document that are shown
_CLEANINGS = 10  # folders whose cleaning is described


@dataclass(frozen=True)
class Inspection:
    sample: Sample
    lengths: NDArray[np.int64]  # [L] of documents, in tokens
    documents: NDArray[np.int64]  # [L] how many have each length
    tokens: NDArray[np.int64]  # [V] how often each token occurs in the shards of the sample
    scripts: Sequence[tuple[str, float]]  # shares of the letters of the sampled documents
    packing: Sequence[PackingEfficiency]
    near_duplicates: NearDuplicates
    masked: Sequence[SeenText]
    cleanings: Sequence[CleanSummary]

    @property
    def manifest(self) -> Manifest:
        return self.sample.corpus.manifest


def write_inspection(path: Path, found: Inspection, tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = [
        *_length_blocks(found),
        *_packing_blocks(found),
        *_vocabulary_blocks(found, tokenizer),
        *_duplicate_blocks(found, tokenizer),
        Heading("Documents as the model sees them"),
        Text(
            f"The first sequences of documents drawn at random, at a maximum length of {MAX_SEQ_LENGTH} tokens. Each "
            "box is a token. Where a box has two, the model predicts the upper one and sees the lower one: mostly the "
            "mask token, sometimes a random token or the same one."
            + (" Words of the segmenter are apart, and masked as a whole." if found.manifest.recipe.segmenter else "")
        ),
        SeenTexts(found.masked),
        *_origin_blocks(found.manifest, found.cleanings),
    ]
    write_page(path, Page(found.sample.corpus.name, blocks, _headline(found)))


def describe(found: Inspection, tokenizer: PreTrainedTokenizerFast) -> str:
    manifest, duplicates = found.manifest, found.near_duplicates
    filled = ", ".join(f"{packing.filled['packed']:.1%} at {packing.max_seq_length:,}" for packing in found.packing)
    frequent = _frequent_tokens(found, tokenizer)[:_SUMMARY_TOKENS]
    scripts = ", ".join(f"{name} {share:.1%}" for name, share in found.scripts[:_SUMMARY_SCRIPTS])
    return "\n".join(
        [
            summary(found.sample.corpus.path, manifest),
            f"  {_bytes_per_token(manifest)} bytes per token, {_used(found):,} of {len(found.tokens):,} tokens of the "
            f"vocabulary occur{_where(found.sample)}",
            f"  most frequent: {' '.join(f'{bar.label} {bar.share:.1%}' for bar in frequent)}",
            f"  letters: {scripts or 'none'}",
            f"  near-duplicates: {duplicates.share:.1%} of {duplicates.documents:,} documents"
            f"{_where(found.sample)} ({_interval(duplicates)})",
            f"  slots filled by packing: {filled} tokens per sequence",
            *(
                f"  {_cleaning_title(cleaning).lower()}: {describe_cleaning(cleaning)}"
                for cleaning in found.cleanings[:_CLEANINGS]
            ),
        ]
    )


def _headline(found: Inspection) -> Headline:
    manifest, duplicates = found.manifest, found.near_duplicates
    shards, mean = len(manifest.shards), f"mean {manifest.tokens / manifest.documents:,.1f}"
    size = f"{sum(shard.bytes for shard in manifest.shards) / 1e6:,.1f} MB on disk"
    facts = [
        Fact("Documents", f"{manifest.documents:,}", f"{counted(manifest.empty_documents, 'empty one')} dropped"),
        Fact("Tokens", f"{manifest.tokens:,}", size),
        Fact("Bytes per token", _bytes_per_token(manifest), "of the text, in UTF-8"),
        Fact("Tokens per word", f"{manifest.tokens_per_word:.2f}"),
        Fact("Unknown tokens", f"{manifest.unknown_token_rate:.3%}"),
        Fact("Median document", f"{manifest.length_percentiles['50']:,} tokens", mean),
        Fact("Longest document", f"{manifest.length_percentiles['100']:,} tokens"),
        Fact("Vocabulary in use", f"{_used(found) / len(found.tokens):.1%}", f"of {len(found.tokens):,} tokens"),
        Fact("Near-duplicates", f"{duplicates.share:.1%}", _interval(duplicates)),
    ]
    return Headline(counted(shards, "shard"), "plain", str(found.sample.corpus.path), facts)


def _length_blocks(found: Inspection) -> list[Block]:
    labels, bins = _length_bins(found.lengths)
    documents = np.bincount(bins, weights=found.documents) / found.documents.sum()
    tokens = np.bincount(bins, weights=found.documents * found.lengths) / found.manifest.tokens
    return [
        Heading("Lengths of documents"),
        Text("In tokens, special tokens not counted. All documents."),
        BarCharts(
            [
                BarChart(title, list(map(Bar, labels, shares.tolist())))
                for title, shares in (("Share of the documents", documents), ("Share of the tokens", tokens))
            ]
        ),
        Table(
            ["percentile", *(f"{name} %" for name in found.manifest.length_percentiles)],
            [["tokens", *(f"{length:,}" for length in found.manifest.length_percentiles.values())]],
        ),
    ]


def _length_bins(lengths: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int64]]:
    """Return the labels of bins that double, and the bin of each length [L]."""
    powers = np.frexp(lengths.astype(np.float64))[1] - 1  # floor of log2
    first = int(powers.min())
    edges = [2**power for power in range(first, int(powers.max()) + 2)]
    labels = [f"{low:,} to {high - 1:,}" if low > 1 else "1" for low, high in pairwise(edges)]
    return labels, (powers - first).astype(np.int64)


def _packing_blocks(found: Inspection) -> list[Block]:
    rows = [
        [
            f"{packing.max_seq_length:,}",
            f"{packing.sequences:,}",
            f"{packing.split_documents:.1%}",
            f"{packing.special_tokens:.1%}",
            *(f"{packing.filled[kind]:.1%}" for kind in ("padded", "packed", "flat")),
        ]
        for packing in found.packing
    ]
    return [
        Heading("Packing"),
        Text(
            "Share of the slots of a batch that hold a token, special tokens included. Padded: a sequence per row, for "
            "models that cannot be packed. Packed in rows: on CPUs; a run may choose wider rows, which are fuller. "
            f"Flat: on GPUs. Measured on {BATCHES} random batches of about {BATCH_TOKENS:,} tokens, for one rank."
        ),
        Table(["length", "sequences", "documents split", "special tokens", "padded", "packed in rows", "flat"], rows),
    ]


def _vocabulary_blocks(found: Inspection, tokenizer: PreTrainedTokenizerFast) -> list[Block]:
    scripts = [Bar(name, share) for name, share in found.scripts]
    charts = [BarChart("Most frequent tokens, share of all", _frequent_tokens(found, tokenizer))]
    if scripts:
        charts.append(BarChart("Scripts, share of the letters", scripts))
    return [
        Heading("Tokens"),
        Text(
            f"{found.manifest.unknown_token_rate:.3%} of all tokens are unknown. {_used(found):,} of "
            f"{len(found.tokens):,} tokens of the vocabulary occur{_where(found.sample)}. Scripts: of "
            f"{len(found.sample.documents):,} documents drawn at random, up to their token {SCRIPT_TOKENS}."
        ),
        BarCharts(charts),
    ]


def _frequent_tokens(found: Inspection, tokenizer: PreTrainedTokenizerFast) -> list[Bar]:
    order = np.argsort(-found.tokens, kind="stable")[:_FREQUENT_TOKENS].tolist()
    shares = found.tokens / found.tokens.sum()
    return [Bar(token_text(tokenizer, token), float(shares[token])) for token in order if shares[token]]


def _duplicate_blocks(found: Inspection, tokenizer: PreTrainedTokenizerFast) -> list[Block]:
    duplicates = found.near_duplicates
    shown = spread(duplicates.pairs, _PAIRS)
    rows = [
        [f"{document.number + 1:,}", _beginning(document, tokenizer), similarity]
        for pair in shown
        for document, similarity in ((pair.document, ""), (pair.duplicate, f"{pair.similarity:.2f}"))
    ]
    return [
        Heading("Near-duplicates"),
        Text(
            f"{duplicates.share:.1%} of {duplicates.documents:,} documents "
            f"{'' if duplicates.is_complete else 'drawn at random '}have a near-duplicate{_where(found.sample)} "
            f"({_interval(duplicates)}). Near-duplicates share {THRESHOLD:.0%} of all their {NGRAM}-grams of tokens "
            "(Jaccard similarity), or all tokens if they are shorter."
            + ("" if found.sample.share == 1 else " With the other shards, it is at least this share.")
        ),
        *([Table(["document", "beginning", "similarity"], rows, labels=2)] if rows else []),
    ]


def _beginning(document: SampledDocument, tokenizer: PreTrainedTokenizerFast) -> str:
    text = str(tokenizer.decode(document.ids[:_PAIR_TOKENS].tolist()))
    return f"{text} …" if len(document.ids) > _PAIR_TOKENS else text


def _origin_blocks(manifest: Manifest, cleanings: Sequence[CleanSummary]) -> list[Block]:
    """Return shares of sources, and the effects of `deepcloze clean`; none if nothing is recorded."""
    blocks = list[Block]()
    if manifest.sources:
        totals = {"documents": manifest.documents, "tokens": manifest.tokens}
        charts = [
            BarChart(
                f"Share of the {unit}", [Bar(share.name, getattr(share, unit) / total) for share in manifest.sources]
            )
            for unit, total in totals.items()
        ]
        rows = [[source.name, f"{source.documents:,}", f"{source.tokens:,}"] for source in manifest.sources]
        blocks += [Heading("Sources"), BarCharts(charts), Table(["source", "documents", "tokens"], rows)]
    for cleaning in cleanings[:_CLEANINGS]:
        blocks += [Heading(_cleaning_title(cleaning)), Text(f"{describe_cleaning(cleaning)}.")]
        blocks += summary_blocks(cleaning)
    if len(cleanings) > _CLEANINGS:
        blocks.append(Text(f"{CLEAN_SUMMARY} describes {len(cleanings) - _CLEANINGS:,} more folders."))
    return blocks


def _cleaning_title(cleaning: CleanSummary) -> str:
    return f"Cleaning of {cleaning['folder']}" if cleaning["folder"] else "Cleaning"


def _bytes_per_token(manifest: Manifest) -> str:
    return f"{manifest.text_bytes / manifest.tokens:.2f}"


def _used(found: Inspection) -> int:
    return int((found.tokens > 0).sum())


def _where(sample: Sample) -> str:
    """Describe the part of the corpus that was read; empty if it was all."""
    shards = len(sample.corpus.manifest.shards)
    return "" if sample.share == 1 else f" in {len(sample.shards):,} of {shards:,} shards, drawn at random"


def _interval(duplicates: NearDuplicates) -> str:
    low, high = duplicates.interval
    return "all documents" if duplicates.is_complete else f"95 % interval {low:.1%} to {high:.1%}"
