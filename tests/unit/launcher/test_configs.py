"""Which command a config is for."""

from pathlib import Path

import pytest

from launcher.configs import command_of


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("task: {}", "finetune"),
        ("rows: {}", "compare"),
        ("row: {}\ntasks: [a.yaml]", "compare"),  # with a typo
        ("source: a.txt", "clean"),
        ("corpus: {}", "pretrain"),
        ("corpus: {}\nschedule:\nsteps: 1000", "pretrain"),  # not indented
        ("tasks: {}\nmodel: {}\ntraining: {}", "finetune"),  # with a typo
        ("", "pretrain"),
        ("[", "pretrain"),
    ],
)
def test_the_command_of_a_config(tmp_path: Path, text: str, command: str) -> None:
    """Catches a config with a typo that is judged as one of another command."""
    config = tmp_path / "a.yaml"
    config.write_text(text)
    assert command_of(str(config)) == command
