import pytest

from experiment.errors import UserError
from launcher.sweeps.sweep_grid import grid_points, parse_grid


def test_grid_syntax() -> None:
    """Catches lists split at their commas, and merged keys."""
    text = "optimizer.lr=1e-4,5e-4  optimizer.betas=[0.9, 0.98],[0.9,0.999] tracking.name='a, b'"
    assert parse_grid(text) == {
        "optimizer.lr": ("1e-4", "5e-4"),
        "optimizer.betas": ("[0.9, 0.98]", "[0.9,0.999]"),
        "tracking.name": ("'a, b'",),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found nothing"),
        ("optimizer.lr", "found 'optimizer.lr'"),
        ("optimizer.lr=", "found 'optimizer.lr='"),
        ("optimizer.lr=1,,2", "found 'optimizer.lr=1,,2'"),
        ("optimizer.lr=1 optimizer.lr=2", "'optimizer.lr' is given twice"),
        ("optimizer.lr=1,2,1", "has a duplicate value"),
        ("a.b=[1,2 c.d=3", "']' is missing"),
        ("run.dir=a,b", "--output"),
    ],
)
def test_malformed_grids_are_rejected(text: str, message: str) -> None:
    """Catches runs that are silently left out, repeated, or overwrite each other."""
    with pytest.raises(UserError, match="--grid") as rejected:
        parse_grid(text)
    assert message in str(rejected.value)


def test_every_point_has_a_unique_name() -> None:
    """Catches missing points, and two that share a folder."""
    points = grid_points(
        {"optimizer.lr": ("1e-4", "5e-4"), "corpus.train": ("a/b", "a-b"), "a.x": ("1",), "b.x": ("2",)}
    )
    assert list(points) == [
        "lr=1e-4_train=a-b_a.x=1_b.x=2",
        "lr=1e-4_train=a-b_a.x=1_b.x=2-2",
        "lr=5e-4_train=a-b_a.x=1_b.x=2",
        "lr=5e-4_train=a-b_a.x=1_b.x=2-2",
    ]
    assert points["lr=5e-4_train=a-b_a.x=1_b.x=2-2"]["corpus.train"] == "a-b"
