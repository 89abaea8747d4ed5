"""The hint for a path that is relative to its config, not to the working directory."""

from pathlib import Path

import pytest

from launcher.relative_paths import hint

MEANT = "; relative paths begin at the working directory: did you mean configs/{}?"


@pytest.fixture
def argv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line with a config whose folder has what it names, and whose tokenizer is in both folders."""
    monkeypatch.chdir(tmp_path)
    for folder in ("configs/run", "configs/data", "configs/tokenizer", "tokenizer"):
        Path(folder).mkdir(parents=True)
    Path("configs/my.yaml").write_text("run: {dir: run}\ncorpus: {train: [{path: data}]}\ntokenizer: tokenizer\n")
    return ["pretrain", "--config=configs/my.yaml"]


def test_the_path_that_was_meant_is_named(argv: list[str], tmp_path: Path) -> None:
    """Catches a path in a list, an absolute one in the message, and a config that is the value of the next argument."""
    message = f"corpus.train: {tmp_path}/data is not a corpus: it does not exist"
    assert hint(message, argv) == hint(message, ["pretrain", "--config", "configs/my.yaml"]) == MEANT.format("data")


@pytest.mark.parametrize(
    "message",
    [
        "unknown config key 'run.directory'; did you mean 'run.dir'?",
        "the run has only 2 steps",
        "tokenizer does not exist",
        "data-2 does not exist",
        "/data.old/x: No such file or directory",
    ],
)
def test_other_mistakes_get_no_hint(argv: list[str], message: str) -> None:
    """Catches a hint in messages that only have a word of the config, or name a path that exists."""
    assert hint(message, argv) == ""
