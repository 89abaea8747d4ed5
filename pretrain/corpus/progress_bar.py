"""Progress of reading text, on stderr: a bar on a terminal, otherwise a line every ten seconds."""

import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiment.tracking.console import terminal
from pretrain.corpus.formats import ReadStats
from pretrain.corpus.sources import Source

_SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """Shows how many documents and megabytes of text have been read, while its `with` block runs."""

    def __init__(self, label: str, sources: Iterable[Source]) -> None:
        sizes = [source.bytes for source in sources]
        known = [size for size in sizes if size is not None]
        self._total = sum(known) if len(known) == len(sizes) else None
        self._label = label
        self._console = terminal()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task(label, total=self._total, state="")
        self._started_at = time.monotonic()
        self._shown_at = self._started_at
        self.documents = 0
        self.text_bytes = 0

    def __enter__(self) -> Self:
        if self._console.is_interactive:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_interactive:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started_at

    def advance(self, stats: ReadStats, text_bytes: int) -> None:
        """Count one more document of `text_bytes`."""
        self.documents += 1
        self.text_bytes += text_bytes
        if self.documents % 64:
            return
        now = time.monotonic()
        if self._console.is_interactive:
            if now - self._shown_at > 0.2:
                self._shown_at = now
                self._bar.update(self._task, completed=stats.bytes_read if self._total else None, state=self._state())
        elif now - self._shown_at > _SECONDS_BETWEEN_LINES:
            self._shown_at = now
            share = f"{stats.bytes_read / self._total:.0%}, " if self._total else ""
            print(f"{self._label}: {share}{self._state()}, {self.seconds:.0f} s", file=sys.stderr, flush=True)

    def _state(self) -> str:
        megabytes = self.text_bytes / 1e6
        return (
            f"{self.documents:,} documents, {megabytes:,.1f} MB of text, {megabytes / max(self.seconds, 1e-9):.1f} MB/s"
        )
