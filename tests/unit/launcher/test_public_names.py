import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiment.config.reference import config_reference
from launcher.cli import COMMANDS, main
from launcher.command_line import flags_of, options_of
from launcher.reference import CONFIGS, config_page

ROOT = Path(__file__).parents[3]


def public_names() -> Iterator[str]:
    """All commands, flags and config keys, one per line."""
    for name, command in COMMANDS.items():
        yield f"deepcloze {name}"
        for flag in flags_of(options_of(command)).values():
            yield f"deepcloze {name} {flag.label}"
    for kind, config_type in CONFIGS.items():
        for section in config_reference(config_type):
            variant = f" ({section.variant})" if section.variant else ""
            yield from (f"{kind} config {key.name}{variant}" for key in section.keys)


def test_no_name_changes_by_accident() -> None:
    """Catches a renamed or removed command, flag or config key: scripts and configs of users have them.

    After an intended change, edit public_names.txt and name the change in CHANGELOG.md.
    """
    assert list(public_names()) == (Path(__file__).parent / "public_names.txt").read_text().splitlines()


def test_the_config_page_is_up_to_date() -> None:
    """Catches docs/config.md drifting from the docstrings of the fields, and a link to a page that does not exist."""
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == config_page(), "python -m launcher.reference config > docs/config.md"
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (ROOT / "docs" / link).is_file(), link


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_key_is_documented(kind: str) -> None:
    """Catches a key or section without a docstring, which the reference would show with no meaning."""
    for section in config_reference(CONFIGS[kind]):
        assert section.meaning or section.name == section.keys[0].name
        for key in section.keys:
            assert key.meaning.endswith("."), key.name


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("config pretrain", ["schedule: The learning-rate schedule", "optimizer.lr", "schedule.stages[].steps"]),
        ("config pretrain optimizer", ["optimizer: The update rule.", "optimizer.betas", "[0.9, 0.98]"]),
        ("config pretrain optimizer.lr", ["Peak learning rate", "(a number > 0; default: 0.0005)"]),
        ("config pretrain run.dir", ["Run folder", "(text; required)"]),
        ("config pretrain schedule.stages", ["a list of mappings", "schedule.stages[].steps"]),
        ("config compare rows", ["rows.NAME.init_from", "(text; required)"]),
        ("config finetune task.columns", ["task.columns.label", "task.columns.text_pair"]),
        ("config finetune task.metric", ["'accuracy', 'macro_f1', 'weighted_f1', 'uar' or 'matthews'"]),
    ],
)
def test_config_explains_keys(line: str, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a key that `deepcloze config` does not find, or shows without its type, default or meaning."""
    assert main(line.split()) == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in expected)
    assert max(map(len, printed.splitlines())) <= 100
    if line.endswith("optimizer.lr"):
        assert "optimizer.betas" not in printed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config pretrain lr", "unknown config key 'lr'; did you mean 'optimizer.lr'?"),
        ("config pretrain optimiser", "unknown config key 'optimiser'; did you mean 'optimizer'?"),
        ("config finetune schedule.steps", "unknown config key 'schedule.steps'"),
        ("config pretain", "expected 'pretrain', 'finetune' or 'compare', found 'pretain'; did you mean 'pretrain'?"),
        ("config", "missing: pretrain|finetune|compare"),
    ],
)
def test_config_suggests_a_key(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, or no help, for a misspelled key."""
    assert main(line.split()) == 2
    assert message in capsys.readouterr().err
