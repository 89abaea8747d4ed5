"""The grid of a sweep: parsed from text, expanded to one set of config overrides per point."""

import itertools
import re
from collections.abc import Mapping, Sequence

from experiment.errors import UserError
from experiment.results.sweep_summary import short_names

Grid = Mapping[str, Sequence[str]]
"""Dotted config key -> the raw texts of its values."""

_CLOSING = {"[": "]", "{": "}"}
_QUOTES = ("'", '"')
_UNSAFE = re.compile(r"[^\w.+-]+")  # not allowed in a folder name


def parse_grid(text: str) -> dict[str, tuple[str, ...]]:
    """Parse `optimizer.lr=1e-4,5e-4 schedule.epochs=1,2`: spaces separate keys, commas values; lists need brackets.

    Raises UserError.
    """
    grid: dict[str, tuple[str, ...]] = {}
    for part in filter(None, _split(text, " \t\n")):
        key, equals, listed = part.partition("=")
        values = tuple(value.strip() for value in _split(listed, ","))
        if not (equals and key) or not all(values):
            raise UserError(f"--grid: expected SECTION.KEY=VALUE,VALUE,…, found '{part}'")
        if key == "run.dir":
            raise UserError("--grid: run.dir is set for each run; choose the folder of all runs with --output")
        if key in grid:
            raise UserError(f"--grid: '{key}' is given twice")
        if len(set(values)) < len(values):
            raise UserError(f"--grid: '{key}' has a duplicate value: {listed}")
        grid[key] = values
    if not grid:
        raise UserError("--grid: expected SECTION.KEY=VALUE,VALUE,…, found nothing")
    return grid


def grid_points(grid: Grid) -> dict[str, dict[str, str]]:
    """{readable unique name: {key: value}} for each point of the grid; the last key changes fastest."""
    labels = short_names(list(grid))
    points: dict[str, dict[str, str]] = {}
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        name = "_".join(f"{labels[key]}={_UNSAFE.sub('-', value).strip('-')}" for key, value in point.items())
        candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        points[next(candidate for candidate in candidates if candidate not in points)] = point
    return points


def _split(text: str, separators: str) -> list[str]:
    """Split at separators outside of brackets and quotes. Raises UserError for a missing bracket or quote."""
    parts, expected = [""], ""  # expected: the closing brackets and quotes still to come, innermost last
    for character in text:
        if expected and character == expected[-1]:
            expected = expected[:-1]
        elif character in _CLOSING and expected[-1:] not in _QUOTES:
            expected += _CLOSING[character]
        elif character in _QUOTES and expected[-1:] not in _QUOTES:
            expected += character
        elif not expected and character in separators:
            parts.append("")
            continue
        parts[-1] += character
    if expected:
        raise UserError(f"--grid: '{expected[-1]}' is missing in '{parts[-1]}'")
    return parts
