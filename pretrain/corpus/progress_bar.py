"""How far a long reading has come, on stderr: a bar on a terminal, a line every ten seconds in a log."""

import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from pretrain.corpus.formats import Reading
from pretrain.corpus.sources import Source

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts documents and megabytes of text while they are read; `with` shows and removes the bar."""

    def __init__(self, label: str, sources: Iterable[Source]) -> None:
        sizes = [source.bytes for source in sources]
        known = [size for size in sizes if size is not None]
        self._total = sum(known) if len(known) == len(sizes) else None
        self._label = label
        self._console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task(label, total=self._total, state="")
        self._began = time.monotonic()
        self._shown = self._began
        self.documents = 0
        self.text_bytes = 0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def advance(self, reading: Reading, text_bytes: int) -> None:
        """One more document has been read."""
        self.documents += 1
        self.text_bytes += text_bytes
        if self.documents % 64:
            return
        now = time.monotonic()
        if self._console.is_terminal:
            if now - self._shown > 0.2:
                self._shown = now
                self._bar.update(self._task, completed=reading.bytes if self._total else None, state=self._state())
        elif now - self._shown > _SECONDS_BETWEEN_LINES:
            self._shown = now
            share = f"{reading.bytes / self._total:.0%}, " if self._total else ""
            print(f"{self._label}: {share}{self._state()}, {self.seconds:.0f} s", file=sys.stderr, flush=True)

    def _state(self) -> str:
        megabytes = self.text_bytes / 1e6
        return (
            f"{self.documents:,} documents, {megabytes:,.1f} MB of text, {megabytes / max(self.seconds, 1e-9):.1f} MB/s"
        )
