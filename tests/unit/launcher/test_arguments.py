import re
from collections.abc import Callable
from typing import Any

import fire
import pytest

from experiment.errors import UserError
from launcher.arguments import Command, Overrides, arrange, command, flags_of, help_text, wants_help

calls: list[dict[str, Any]] = []


@command
def train(
    *, config: str, ranks: int | None = None, seed: int = 42, dry_run: bool = False, overrides: Overrides
) -> None:
    """Train a model.

    In many steps.

    Args:
        config (FILE): what
            to train
        ranks (N): how many
        seed (N): of the order
        dry_run: only tell
        overrides: any key

    Example:
        deepcloze train --config a.yaml
    """
    calls.append({"config": config, "ranks": ranks, "seed": seed, "dry_run": dry_run, "overrides": overrides})


@command
def show(run: str, *, deep: bool = False) -> None:
    """Show a run.

    Args:
        run (RUN): the folder
        deep: more of it

    Example:
        deepcloze show a
    """
    calls.append({"run": run, "deep": deep})


COMMANDS: dict[str, Command] = {"train": train, "show": show}


@pytest.fixture
def called() -> Callable[[str], dict[str, Any]]:
    """What a command's function receives, through Fire, from a line of words separated by |."""

    def call(line: str) -> dict[str, Any]:
        calls.clear()
        fire.Fire(COMMANDS, command=arrange(line.split("|"), COMMANDS), name="deepcloze")
        (received,) = calls
        return received

    return call


@pytest.mark.parametrize(
    "text",
    [
        "2024_01",
        "a,b",
        "run#1",
        "1e5",
        "0x10",
        "[1,2]",
        "None",
        "True",
        "'q'",
        '"',
        "a=b",
        "-1",
        "-",
        "",
        "a b",
        "ü",
        "{x: 1}",
    ],
)
def test_text_arrives_as_it_was_typed(called: Callable[[str], dict[str, Any]], text: str):
    """Catches Fire's reading of values as Python: 2024_01 as 202401, run#1 as run, a,b as a tuple."""
    assert called(f"train|--config={text}")["config"] == text
    assert called(f"train|--config|{text}")["config"] == text
    assert called(f"train|--config=c|--a.b={text}")["overrides"] == {"a.b": text}
    assert called(f"train|--config=c|--a.b|{text}")["overrides"] == {"a.b": text}


def test_numbers_switches_and_defaults(called: Callable[[str], dict[str, Any]]):
    """Catches a switch that swallows the next word, and numbers that arrive as text."""
    assert called("train|--dry_run|--ranks|2|--config|c") == {
        "config": "c",
        "ranks": 2,
        "seed": 42,
        "dry_run": True,
        "overrides": {},
    }
    assert called("train|--dry-run=false|--seed=7|--config=c") == {
        "config": "c",
        "ranks": None,
        "seed": 7,
        "dry_run": False,
        "overrides": {},
    }


def test_override_keys_stay_as_they_are(called: Callable[[str], dict[str, Any]]):
    """Catches Fire's `-` to `_`, which would rename a corpus, and a lost order of overrides."""
    overrides = called("train|--config=c|--corpus.eval.my-news=d|--a.b=1|--a.b=2")["overrides"]
    assert list(overrides.items()) == [("corpus.eval.my-news", "d"), ("a.b", "2")]


def test_a_positional_argument(called: Callable[[str], dict[str, Any]]):
    """Catches `deepcloze report RUN` not finding RUN, by place or by name."""
    assert called("show|a/b|--deep") == called("show|--deep|--run=a/b") == {"run": "a/b", "deep": True}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "unknown command 'trian'; did you mean 'train'?"),
        ("train|--config=c|--rank=2", "unknown flag '--rank'; did you mean '--ranks'?"),
        ("train|--config=c|--overrides={}", "unknown flag '--overrides'"),
        ("show|a|--x.y=1", "unknown flag '--x.y'"),
        ("train|--config=c|stray", "unexpected argument 'stray'"),
        ("train|--config=c|--dry_run|true", "unexpected argument 'true'"),
        ("train|--config=c|-x", "unexpected argument '-x'"),
        ("show|a|b", "unexpected argument 'b'"),
        ("show|--run=a|b", "unexpected argument 'b'"),
        ("train|--config", "--config needs a value"),
        ("train|--config|--dry_run", "--config needs a value"),
        ("train|--config=c|--a.b", "--a.b needs a value"),
        ("train|--dry_run", "missing: --config FILE"),
        ("show", "missing: RUN"),
        ("train|--config=c|--ranks=two", "--ranks: expected a whole number, found 'two'"),
        ("train|--config=c|--ranks=1_0", "--ranks: expected a whole number, found '1_0'"),
        ("train|--config=c|--dry_run=maybe", "--dry_run: expected nothing, true or false, found 'maybe'"),
        ("train|--config=c|--", "unknown flag '--'"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(called: Callable[[str], dict[str, Any]], line: str, message: str):
    """Catches Fire's own order: it calls the function first and complains about the rest of the line afterwards."""
    with pytest.raises(UserError, match=re.escape(message)):
        called(line)
    assert calls == []


def test_flags_come_from_signature_and_docstring():
    """Catches help that drifts from what the command takes: every parameter must be explained."""
    config, ranks, seed, dry_run = flags_of(train)
    assert (config.placeholder, config.meaning, config.required, config.kind) == ("FILE", "what to train", True, str)
    assert (ranks.required, ranks.kind, seed.default, seed.kind) == (False, int, 42, int)
    assert (dry_run.kind, dry_run.placeholder) == (bool, "")


@pytest.mark.parametrize("line", ["", "--help", "-h", "train|--help", "train|--config|c|-h"])
def test_asking_for_help(line: str):
    """Catches a command that runs although help was asked for."""
    assert wants_help(line.split("|") if line else [])
    assert not wants_help(["train", "--config", "c"])


def test_help_teaches():
    """Catches a flag, default or example missing from the help, and lines wider than the terminal."""
    page = help_text(["train", "--help"], COMMANDS, "about", width=60)
    assert page.splitlines()[0] == "usage: deepcloze train --config FILE [flags] [--section.key=value …]"
    for part in (
        "In many steps.",
        "what to train (required)",
        "of the order (default: 42)",
        "--section.key=value  any key",
    ):
        assert part in page
    assert page.endswith("example:\n  deepcloze train --config a.yaml")
    overview = help_text([], COMMANDS, "about " * 30, width=60)
    assert "  train  Train a model." in overview
    assert max(map(len, overview.splitlines())) <= 60
