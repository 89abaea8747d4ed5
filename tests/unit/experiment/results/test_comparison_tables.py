"""The tables of a comparison as text."""

from experiment.results.comparison import as_markdown

CELL = {"metric": "accuracy", "split": "test", "values": [0.5], "mean": 0.5, "std": None, "collapsed": 0, "against": {}}


def test_names_are_plain_text_in_markdown() -> None:
    """Catches a name that ends a column, or that Markdown takes for HTML and hides."""
    table = as_markdown({"a|b <c> `d`": {"*toy*": CELL}})
    assert r"| a\|b \<c\> \`d\` | 0.5000 ± – |" in table
    assert r"|  | \*toy\*, accuracy |" in table
