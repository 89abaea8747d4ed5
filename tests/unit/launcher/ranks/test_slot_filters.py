import re

import pytest

from experiment.errors import UserError
from launcher.ranks.slot_filters import parse_filter, select_slots

TWO_HOSTS = {"a": (0, 1, 2, 3), "b": (0, 1)}


def test_reads_filters():
    """Catches misparsed filters: slots are sorted and unique, a bare host means all its slots."""
    assert parse_filter("a:2,0,2@b", "--include") == {"a": (0, 2), "b": None}


@pytest.mark.parametrize("text", ["", "a:", "a:x", "a:0,", "a:-1", "a@", "@a", "a b", "a:0:1", "0,1,", "a:0 @b"])
def test_rejects_malformed_filters(text: str):
    """Catches a malformed filter that selects something."""
    with pytest.raises(UserError, match=r"--exclude: expected HOST\[:SLOT"):
        parse_filter(text, "--exclude")


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, TWO_HOSTS),
        ("b:1@a:3,0", None, {"a": (0, 3), "b": (1,)}),
        ("b", None, {"b": (0, 1)}),
        (None, "a:0,1", {"a": (2, 3), "b": (0, 1)}),
        (None, "a", {"b": (0, 1)}),
        (None, "b:0,1", {"a": (0, 1, 2, 3)}),
    ],
)
def test_selects_slots(include: str | None, exclude: str | None, expected: dict[str, tuple[int, ...]]):
    """Catches a filter that keeps or drops the wrong slots, or hosts in the filter's order, not the hostfile's."""
    chosen = select_slots(TWO_HOSTS, include, exclude)
    assert list(chosen.items()) == list(expected.items())


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("c", None, "--include: unknown host 'c'; known: a, b"),
        ("b:0,2", None, "--include: b has no slot 2; it has 0, 1"),
        (None, "b:7", "--exclude: b has no slot 7"),
        (None, "a@b", "leaves no slots"),
        ("a", "b", "--include cannot be combined with --exclude"),
        ("a:0@a:1", None, "a appears twice"),
    ],
)
def test_rejects_filters_that_do_not_fit(include: str | None, exclude: str | None, message: str):
    """Catches a filter for a missing host or slot, which would run fewer ranks than requested."""
    with pytest.raises(UserError, match=re.escape(message)):
        select_slots(TWO_HOSTS, include, exclude)
