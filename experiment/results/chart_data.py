"""The data of charts as `page.js` takes them, in pieces, so that a followed page gets only those that have changed."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from experiment.results.charts import Charts
from experiment.results.history import NO_AXIS


class _Versioned(NamedTuple):
    """A piece, and the version of the page since which it is the same."""

    version: int
    value: object
    source: object  # equal ones give the same value


class ChartsData:
    """The data of charts, as `page.js` describes them, in pieces that change independently."""

    def __init__(self, charts: Charts, before: "ChartsData | None" = None, version: int = 0) -> None:
        """before: the data that a browser may have. version: of the page, which all differences from `before` get."""
        self._charts = [(panel.options, panel.drawn) for panel in charts.panels]
        self._axes = list(charts.axes) or [NO_AXIS]
        self._pieces: dict[object, _Versioned] = {}
        known = before._pieces if before else {}

        def add(name: object, source: object, make: Callable[[], object]) -> None:
            piece = known.get(name)
            if piece is None or piece.source != source:
                value = make()
                piece = _Versioned(piece.version if piece and piece.value == value else version, value, source)
            self._pieces[name] = piece

        marks = [vars(mark) for mark in charts.marks]
        add("marks", (marks, [[line.name for line in drawn] for _, drawn in self._charts]), lambda: marks)
        for number, axis in enumerate(self._axes):
            add(number, axis, partial(dict, axis))
        for number, (_, drawn) in enumerate(self._charts):
            for line in drawn:
                add((number, line.name), line, partial(getattr, line, "data"))

    def changes(self, since: int = -1) -> dict[str, Any] | None:
        """Return the changes after this version of the page, by default all of it; None if nothing has changed."""
        if all(piece.version <= since for piece in self._pieces.values()):
            return None

        def value(name: object, otherwise: str | None = None) -> object:
            piece = self._pieces[name]
            return piece.value if piece.version > since else otherwise

        axes = [value(number) for number in range(len(self._axes))]
        charts = [
            {**options, "lines": [value((number, line.name), line.name) for line in drawn]}
            for number, (options, drawn) in enumerate(self._charts)
        ]
        return {"axes": axes, "marks": self._pieces["marks"].value, "charts": charts}
