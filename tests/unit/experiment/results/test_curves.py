import numpy as np
import pytest

from experiment.results.curves import MAX_POINTS, Curve


def noise(points: int) -> np.ndarray:
    return np.random.default_rng(0).random(points)


def test_long_curves_keep_their_outliers() -> None:
    """Catches a page of gigabytes after weeks of training, and a spike that downsampling hides."""
    y = noise(100_003)
    y[[17, 50_001, 99_999]] = [9.0, -7.0, 8.0]
    curve = Curve.of(np.arange(len(y)), y)
    for limit in (MAX_POINTS, 100):
        x, shown = curve.points(limit)
        assert limit / 2 < len(x) <= limit
        assert {0, 17, 50_001, 99_999, 100_002} <= set(x.tolist())
        assert (np.diff(x) > 0).all()
        assert shown.tolist() == y[x.astype(int)].tolist(), "points of the curve"
    assert (curve.lowest, curve.highest, curve.last[0]) == ((50_001, -7.0), (17, 9.0), 100_002)
    assert sum(rows.nbytes for rows in curve._state[:2]) < 100_000
    assert np.median(curve.means) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("points", [1, 499, 500, 501, 999, 1000, 4099])
def test_a_curve_does_not_depend_on_how_it_grew(points: int) -> None:
    """Catches a page that shows other curves after a restart of its server."""
    y = noise(points)
    at_once, grown = Curve.of(np.arange(points), y), Curve()
    for start in range(0, points, 7):
        grown.extend(np.arange(start, min(start + 7, points)), y[start : start + 7])
    assert len(at_once) == len(grown) == points
    for limit in (MAX_POINTS, 100):
        for first, second in ((at_once.points, grown.points), (at_once.average, grown.average)):
            assert np.array_equal(first(limit), second(limit))


def test_short_curves_are_complete() -> None:
    """Catches points that are left out of a curve for which there is room, and values that are no numbers."""
    y = noise(999)
    x, shown = Curve.of(np.arange(999), y).points()
    assert (x.tolist(), shown.tolist()) == (list(range(999)), y.tolist())
    x, shown = Curve.of([1, 2, 3, 4], [1.0, None, float("nan"), float("inf")]).points()
    assert (x.tolist(), shown.tolist()) == ([1], [1.0])
    assert len(Curve.of([], []).points()[0]) == len(Curve().average()[0]) == 0


def test_the_moving_average_follows_a_start_and_smooths_an_end() -> None:
    """Catches a curve that lags behind a falling loss, or bends towards the last value at its end."""
    line = np.arange(80.0)  # 4 values on each side
    x, average = Curve.of(line, line).average()
    assert x.tolist() == line.tolist()
    assert average[:76] == pytest.approx(line[:76])
    assert average[76:] == pytest.approx([75.5, 76.0, 76.5, 77.0])
    _, average = Curve.of(range(20), [0.0, 3.0] * 9 + [0.0, 6.0]).average()
    assert average[:3] == pytest.approx([0.0, 1.0, 2.0])
    assert average[-2:] == pytest.approx([3.0, 3.0])


def test_the_moving_average_after_an_outlier() -> None:
    """Catches one exploding value whose rounding stays in the average of all values after it."""
    y = np.ones(400)
    y[30] = 1e20
    _, average = Curve.of(np.arange(400), y).average()
    assert average[100:] == pytest.approx(1.0)


def test_the_moving_average_of_a_long_curve() -> None:
    """Catches an average of the points that are shown, most of which are extremes."""
    y = noise(100_000) ** 8  # mean 1/9, and between the extremes 1/2
    _, average = Curve.of(np.arange(100_000), y).average()
    assert average[20:] == pytest.approx(1 / 9, abs=0.01)
