"""Values of `tracking:` that would fail when the run has started."""

from typing import Any

import pytest

from experiment.config import build_config
from experiment.errors import UserError
from experiment.tracking.config import TrackingConfig


def problem(tree: dict[str, Any]) -> str:
    """The message about a rejected config; empty if it is accepted."""
    try:
        build_config(TrackingConfig, tree)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("email", "valid"),
    [
        ("me@x.org", True),
        (" me@x.org , you@localhost,", False),
        ("me@x.org, you@localhost", True),
        ("A. Name <me@x.org>, you@x.org", True),
        ("me@x.org;you@x.org", False),
        ("me@x.org; you@x.org", False),
        ("me@x.org you@x.org", False),
        ("me@x.org, you", False),
        ("me", False),
        ("", False),
    ],
)
def test_addresses_are_separated_by_commas(email: str, valid: bool) -> None:
    """Catches mail that reaches only the first address, or none."""
    assert ("'alerts.email': expected mail addresses" in problem({"alerts": {"email": email}})) != valid
