"""The tables of a comparison as text."""

from experiment.results.comparison import FAILED, SCORES, as_markdown, tables

CELL = {"metric": "accuracy", "split": "test", "values": [0.5], "mean": 0.5, "std": None, "collapsed": 0, "against": {}}


def test_names_are_plain_text_in_markdown() -> None:
    """Catches a name that ends a column, or that Markdown takes for HTML and hides."""
    table = as_markdown({"a|b <c> `d`": {"*toy*": CELL}}, {})
    assert r"| a\|b \<c\> \`d\` | 0.5000 ± – |" in table
    assert r"|  | \*toy\*, accuracy |" in table


def test_a_task_whose_cells_have_all_failed_is_listed() -> None:
    """Catches a task that is in no table, as if it were not in the comparison, and tables with a header only."""
    failed = {"a/other": "failed (exit code 1)", "b/other": "not run: its pretraining failed"}
    assert list(tables({"a": {"toy": CELL}, "b": {}}, failed)) == [SCORES, FAILED]
    assert list(tables({"a": {}, "b": {}}, failed)) == [FAILED]
    assert list(tables({"a": {"toy": CELL}}, {})) == [SCORES]
    table = as_markdown({"a": {"toy": CELL}, "b": {}}, failed)
    assert "| a/other | failed (exit code 1) |\n| b/other | not run: its pretraining failed |\n" in table
