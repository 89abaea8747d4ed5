from benchmarks.corpus import Runs, _rows


def test_a_ratio_is_that_of_each_round() -> None:
    """Catches the ratio of two medians, which may be of different rounds, and one without its spread."""
    seconds = {"deepcloze corpus": (1.0, 4.0, 2.0), "datasets.map": (3.0, 8.0, 8.0)}
    runs: Runs = {name: [{"total": s, "encoding": s, "memory": 1e9} for s in of] for name, of in seconds.items()}
    assert "3.00 (2.00 – 4.00)" in [cell for row in _rows(runs) for cell in row]
