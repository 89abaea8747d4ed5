"""Announce the sources of a build."""

import sys
from collections.abc import Sequence
from itertools import islice

from experiment.errors import UserError, escape_controls, is_quiet
from experiment.formatting import counted
from pretrain.corpus.documents import read_documents
from pretrain.corpus.formats import ReadStats, detect_format
from pretrain.corpus.options import TextOptions
from pretrain.corpus.sources import Source, Span

_LISTED = 10  # sources
_SAMPLE = 1000  # documents
_FEWEST = 50
_LONGEST_LINE = 120  # characters of wrapped text
_SHORTEST_LINE = 40
_SENTENCE_ENDS = tuple(".!?…:;\"'”’)]。！？；：”")


def announce_sources(sources: Sequence[Source], options: TextOptions) -> None:
    """List the sources; warn if the first file looks as if its lines were parts of paragraphs."""
    if not is_quiet():
        _list(sources)
    first = sources[0]
    is_text = first.kind == "file" and detect_format(first.name)[0] in ("text", None)
    reads_lines = is_text and options.document == "line" and options.document_start is None
    if reads_lines and is_hard_wrapped(_first_documents(first, options)):
        print(
            f"warning: the lines of {escape_controls(first.name)} look like parts of paragraphs; with "
            "`--document line` each is a document of its own; if blank lines separate paragraphs, use "
            "`--document blank_line`",
            file=sys.stderr,
        )


def _list(sources: Sequence[Source]) -> None:
    size = sum(source.bytes or 0 for source in sources)
    total = f", {size / 1e6:,.1f} MB" if size else ""
    print(f"reading {counted(len(sources), 'source')}{total}:")
    for source in sources[:_LISTED]:
        print(escape_controls(f"  {source.name}{f'::{source.selection}' if source.selection else ''}"))
    if len(sources) > _LISTED:
        print(f"  … and {len(sources) - _LISTED:,} more")


def is_hard_wrapped(lines: Sequence[str]) -> bool:
    """Return whether lines were broken to fit a width: most are about as long as the longest ones, and end
    in the middle of a sentence."""
    if len(lines) < _FEWEST:
        return False
    width = sorted(len(line) for line in lines)[int(0.98 * len(lines))]
    if not _SHORTEST_LINE <= width <= _LONGEST_LINE:
        return False
    full = [line for line in lines if len(line) >= 0.75 * width]
    open_ended = sum(not line.rstrip().endswith(_SENTENCE_ENDS) for line in full)
    return len(full) >= 0.6 * len(lines) and open_ended >= 0.7 * len(full)


def _first_documents(source: Source, options: TextOptions) -> list[str]:
    try:
        return [document.text for document in islice(read_documents([Span(source)], options, ReadStats()), _SAMPLE)]
    except UserError:
        return []  # the build says it, with its line
