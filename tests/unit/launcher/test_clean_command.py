"""`deepcloze clean` and `validate` on its configs: evaluation texts come from fine-tuning configs, keys from flags."""

import json
import os
import signal
from pathlib import Path

import pytest

from launcher.cli import main
from pretrain.cleaning import passes

TASK = """\
run: {dir: r}
model: {init_from: m}
task: {test: test.tsv, columns: {text: sentence}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("He said: the film was long, and it was good.\nAnother line.\n")
    (tmp_path / "test.tsv").write_text("sentence\tlabel\nThe film was long and it was good\t1\n")
    (tmp_path / "task.yaml").write_text(TASK)
    (tmp_path / "clean.yaml").write_text(
        "{source: in.txt, output: out, steps: [{decontaminate: {against: [task.yaml]}}]}"
    )
    return tmp_path


def test_texts_of_a_task_are_removed(folder: Path) -> None:
    """Catches a cleaning that does not get the texts, or that ignores keys without a section."""
    assert main(["clean", "--config", "clean.yaml", "--output=other", "--workers=1"]) == 0
    found = json.loads((folder / "other" / "clean.json").read_text())
    assert (found["read"], found["kept"]) == (2, 1)
    assert found["steps"][0]["matches"][0]["match"].startswith("task.yaml test, test.tsv:2: the film was long")
    assert not (folder / "out").exists()


def test_a_signal_to_stop(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a batch system that ends a cleaning without a message, and leaves its lock."""
    with monkeypatch.context() as patch:
        patch.setattr(passes, "_process", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert main(["clean", "--config", "clean.yaml", "--workers=1"]) == 75
    assert "interrupted; run the same command again to resume" in capsys.readouterr().err
    assert not list(folder.glob(".*"))
    # With another config: nothing was finished.
    assert main(["clean", "--config", "clean.yaml", "--workers=1", "--document=file"]) == 0


def test_validation_reads_the_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a source of another format that is found when the cleaning has begun, and one that does not exist."""
    config = (folder / "clean.yaml").read_text()
    (folder / "in.jsonl").write_text('{"text": 3}\n')
    for source, message in (
        ("none.txt", "source none.txt: no such file or folder"),
        ("in.jsonl", "in.jsonl:1: expected text in 'text', fou"),
    ):
        (folder / "clean.yaml").write_text(config.replace("in.txt", source))
        assert main(["validate", "clean.yaml"]) == 2
        assert message in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("against", "message"),
    [
        ("sst2", "decontaminate.against: sst2: cannot read data/SST-2/dev.tsv: No such file"),
        ("sst3", "decontaminate.against: sst3: there is no file and no recipe 'sst3'; did you mean 'sst2'?"),
        ("empty.yaml", "decontaminate.against: empty.yaml: it has no validation or test texts"),
    ],
)
def test_a_task_that_cannot_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str], against: str, message: str
) -> None:
    """Catches messages that do not say which task is meant."""
    assert main(["validate", "clean.yaml"]) == 0
    assert main(["validate", "clean.yaml", "--output=other", "--source", "in.txt"]) == 0
    (folder / "empty.yaml").write_text(TASK.replace("test.tsv", "empty.tsv"))
    (folder / "empty.tsv").write_text("sentence\tlabel\n \t1\n")
    config = (folder / "clean.yaml").read_text()
    (folder / "clean.yaml").write_text(config.replace("task.yaml", against))
    assert main(["validate", "clean.yaml"]) == 2
    assert message in capsys.readouterr().err
