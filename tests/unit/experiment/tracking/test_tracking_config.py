"""Values of `tracking:` that would fail when the run has started."""

from typing import Any

import pytest
import wandb

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
    "project", ["encoders", "a" * 128, "ü b-c_d.e", "a" * 129, *(f"a{sign}b" for sign in r"/\#?%:")]
)
def test_projects_are_those_of_wandb(project: str) -> None:
    """Catches a project that W&B rejects when the run has started: it would be off until the run ends."""
    try:
        wandb.Settings(project=project)
    except wandb.errors.UsageError:
        assert "name a team as WANDB_ENTITY" in problem({"project": project})
    else:
        assert not problem({"project": project})


@pytest.mark.parametrize("tag", ["base", "", "a" * 64, "a" * 65, "a/b"])
def test_tags_are_those_of_wandb(tag: str) -> None:
    """Catches a tag that W&B rejects when the run has started."""
    try:
        wandb.Settings(run_tags=("first", tag))
    except ValueError:
        assert "'tags.1': string should have at" in problem({"tags": ["first", tag]})
    else:
        assert not problem({"tags": ["first", tag]})


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
