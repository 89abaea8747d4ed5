"""Where the documents come from: shares of sources, and what `deepcloze clean` did, as the corpus records it."""

from collections.abc import Sequence

from experiment.decontamination import CLEAN_SUMMARY
from experiment.results.page import Bar, BarChart, BarCharts, Block, Heading, Table, Text
from pretrain.cleaning.report import describe, summary_blocks
from pretrain.corpus.manifest import Manifest
from pretrain.corpus.origins import Cleaning

_CLEANINGS = 10  # folders whose cleaning is described


def origin_blocks(manifest: Manifest, cleanings: Sequence[Cleaning]) -> list[Block]:
    """Sections of the page; none if nothing is recorded."""
    blocks = list[Block]()
    if manifest.sources:
        charts = [
            BarChart(title, [Bar(source.name, getattr(source, unit) / total) for source in manifest.sources])
            for title, unit, total in (
                ("Share of the documents", "documents", manifest.documents),
                ("Share of the tokens", "tokens", manifest.tokens),
            )
        ]
        rows = [[source.name, f"{source.documents:,}", f"{source.tokens:,}"] for source in manifest.sources]
        blocks += [Heading("Sources"), BarCharts(charts), Table(["source", "documents", "tokens"], rows)]
    for cleaning in cleanings[:_CLEANINGS]:
        blocks += [Heading(_title(cleaning)), Text(f"{describe(cleaning)}."), *summary_blocks(cleaning)]
    if len(cleanings) > _CLEANINGS:
        blocks.append(Text(f"{CLEAN_SUMMARY} describes {len(cleanings) - _CLEANINGS:,} more folders."))
    return blocks


def describe_cleanings(cleanings: Sequence[Cleaning]) -> list[str]:
    """Lines of the summary on the terminal."""
    return [f"  {_title(cleaning).lower()}: {describe(cleaning)}" for cleaning in cleanings[:_CLEANINGS]]


def _title(cleaning: Cleaning) -> str:
    return f"Cleaning of {cleaning['folder']}" if cleaning["folder"] else "Cleaning"
