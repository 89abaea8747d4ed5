"""The tables of a comparison as text."""

from experiment.results.comparison import FAILED, MODELS, SCORES, TESTS, as_markdown, score_charts, tables

CELL = {"metric": "accuracy", "split": "test", "values": [0.5], "mean": 0.5, "std": None, "collapsed": 0, "against": {}}


def test_names_are_plain_text_in_markdown() -> None:
    """Catches a name that ends a column, or that Markdown takes for HTML and hides."""
    table = as_markdown({"a|b <c> `d`": {"*toy*": CELL}}, {})
    assert r"| a\|b \<c\> \`d\` | 0.5000 ± – |" in table
    assert r"|  | \*toy\*, accuracy |" in table


def test_scores_of_validation_are_marked() -> None:
    """Catches scores by which epochs were chosen in the place of test scores, unless one reads the report."""
    table = as_markdown({"a": {"toy": {**CELL, "split": "validation"}, "other": CELL}}, {})
    assert "|  | toy, accuracy on validation | other, accuracy |" in table


def test_the_split_of_a_score_is_named() -> None:
    """Catches scores on MNLI's mismatched split that are taken for those on the matched one."""
    columns = {"mnli": "mismatched", "glue mismatched": "mismatched"}
    table = as_markdown({"a": {column: {**CELL, "split": split} for column, split in columns.items()}}, {})
    assert "|  | mnli, accuracy on mismatched | glue mismatched, accuracy |" in table


def test_the_steps_of_checkpoints_are_listed() -> None:
    """Catches a model of a run that has not finished beside finished ones, without a word in the tables."""
    checkpoint = {"init_from": "run/checkpoints/step-00060000/hf", "step": 60000}
    models = {"a": {**CELL, **checkpoint}, "b": {**CELL, "init_from": "random", "step": None}, "of 0.2.0": CELL}
    comparison = {row: {"toy": cell} for row, cell in models.items()}
    assert tables(comparison, {})[MODELS][1:] == [["a", "run/checkpoints/step-00060000/hf", "60,000"]]
    assert MODELS not in tables({"b": comparison["b"]}, {})


def test_a_task_whose_cells_have_all_failed_is_listed() -> None:
    """Catches a task that is in no table, as if it were not in the comparison, and tables with a header only."""
    failed = {"a/other": "failed (exit code 1)", "b/other": "not run: its pretraining failed"}
    assert list(tables({"a": {"toy": CELL}, "b": {}}, failed)) == [SCORES, FAILED]
    assert list(tables({"a": {}, "b": {}}, failed)) == [FAILED]
    assert list(tables({"a": {"toy": CELL}}, {})) == [SCORES]
    table = as_markdown({"a": {"toy": CELL}, "b": {}}, failed)
    assert "| a/other | failed (exit code 1) |\n| b/other | not run: its pretraining failed |\n" in table


def test_a_row_whose_seeds_have_all_collapsed_has_no_p_value() -> None:
    """Catches a difference that is called significant because the training of a row has failed; and one left out
    because a single seed has collapsed."""
    test = {"difference": 0.3, "interval": [0.2, 0.4], "p": 0.002}
    seeds = {**CELL, "values": [0.5, 0.5]}
    rows = {"a": {**seeds, "collapsed": 1}, "b": {**seeds, "collapsed": 2}, "c": seeds}
    against = {"a": {"b": test, "c": test}, "b": {"c": test}, "c": {}}
    comparison = {row: {"toy": {**cell, "against": against[row]}} for row, cell in rows.items()}
    _, *found = tables(comparison, {})[TESTS]
    assert [(row, other, p) for _, row, other, *_, p in found] == [
        ("a", "b", "–"),
        ("a", "c", "0.002"),
        ("b", "c", "–"),
    ]


def test_a_difference_without_a_test_is_shown() -> None:
    """Catches a traceback for a split with too few texts for a test."""
    test = {"difference": 0.3, "interval": None, "p": None}
    comparison = {"a": {"toy": {**CELL, "interval": None, "against": {"b": test}}}, "b": {"toy": CELL}}
    assert tables(comparison, {})[TESTS][1:] == [["toy", "a", "b", "+0.3000", "–", "–"]]


def test_the_title_of_differences_names_both_tests() -> None:
    """Catches a paper that cites the bootstrap for intervals and p-values that are often those of Welch's test, or that
    takes a difference of two checkpoints for one of two ways to pretrain."""
    test = {"difference": 0.3, "interval": [0.2, 0.4], "p": 0.002}
    table = as_markdown({"a": {"toy": {**CELL, "against": {"b": test}}}, "b": {"toy": CELL}}, {})
    assert "more cautious of the Multi-Bootstrap (Sellam et al. 2022) over seeds and records and of Welch" in table
    assert "they do not cover other seeds of pretraining" in table


def test_scores_are_charts_by_task() -> None:
    """Catches scores of another task, a row without a score that is drawn at zero, and a file of 0.2.0, which has no
    intervals."""
    first = {"toy": {**CELL, "interval": [0.4, 0.6]}, "other": {**CELL, "metric": "f1"}}
    toy, other = score_charts({"a": first, "b": {"toy": {**CELL, "mean": 0.7}}, "c": {}})
    assert (toy.title, other.title) == ("toy, accuracy", "other, f1")
    assert [(row.label, row.mean, row.interval) for row in toy.rows] == [("a", 0.5, [0.4, 0.6]), ("b", 0.7, None)]
    assert [row.label for row in other.rows] == ["a"]
    assert "](compare.png)" in as_markdown({"a": first}, {})
    assert "compare.png" not in as_markdown({"a": {}}, {"a/toy": "failed"})
