"""`deepcloze sweep`: what it makes of a config and a grid before the first run starts."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launcher.cli import main

Said = Callable[..., str]


@pytest.fixture
def pretraining(tmp_path: Path, wordpiece_corpus: Path, heldout_corpus: Path) -> Path:
    path = tmp_path / "run.yaml"
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"config": {"model_type": "bert", **sizes, "max_position_embeddings": 64}},
        "corpus": {"train": str(wordpiece_corpus), "eval": {"held": str(heldout_corpus)}},
        "batch": {"sequences": 8, "max_seq_length": 32, "microbatch_tokens": 64},
        "schedule": {"steps": 2},
        "engine": {"ds_config": "ds_configs/fp32_zero1.json"},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def refused(
    pretraining: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Said:
    """The message of a sweep that must be refused, with nothing started."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def command(grid: str, *arguments: str) -> str:
        assert main(["sweep", "--config", str(pretraining), "--grid", grid, *arguments]) == 2
        assert not list(tmp_path.glob("*-sweep"))
        return capsys.readouterr().err

    return command


def test_the_commands_of_a_sweep(pretraining: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches overrides or flags that the runs do not get, and two runs in one folder."""
    grid = "optimizer.lr=1e-4,5e-4 optimizer.betas=[0.9,0.98],[0.9,0.999]"
    arguments = ["--config", str(pretraining), "--grid", grid, "--num_gpus", "1", "--schedule.steps=3", "--dry_run"]
    assert main(["sweep", *arguments]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4
    assert lines[1][1:] == [
        *("-m", "launcher", "pretrain", "--config", str(pretraining), "--num_gpus=1", "--schedule.steps=3"),
        *("--optimizer.lr=1e-4", "--optimizer.betas=[0.9,0.999]"),
        f"--run.dir={tmp_path}/run-sweep/lr=1e-4_betas=0.9-0.999",
    ]
    assert not (tmp_path / "run-sweep").exists()


def test_what_is_wrong_with_any_point_is_said_first(refused: Said) -> None:
    """Catches a typo in the last value that is found hours later, and a metric that no run will have."""
    assert "lr=fast: command line: 'optimizer.lr'" in refused("optimizer.lr=1e-4,fast")
    assert "unknown config key 'optimizer.rate'" in refused("optimizer.rate=1e-4")
    assert "max_seq_length=128" in refused("batch.max_seq_length=32,128 batch.microbatch_tokens=128")
    assert "stands in --grid and on the command line" in refused("optimizer.lr=1e-4", "--optimizer.lr=1e-3")
    assert "did you mean 'eval/held/loss'" in refused("optimizer.lr=1e-4", "--metric=eval/hold/loss")


def test_the_run_that_the_config_names_may_be_there_already(
    pretraining: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches points that are checked as continuations of a run that was made with the same config."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    arguments = ["--config", str(pretraining), "--grid", "batch.sequences=4,8", "--run.resume=never", "--dry_run"]
    assert main(["sweep", *arguments]) == 0
    assert f"--run.dir={tmp_path}/run-sweep/sequences=4" in capsys.readouterr().out


def test_flags_of_pretraining_are_refused_for_fine_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches flags that are ignored in silence, and a fine-tuning that is taken for a pretraining."""
    path = tmp_path / "task.yaml"
    tree = {"run": {"dir": "a"}, "task": {"train": "t.csv", "validation": "v.csv"}, "model": {"init_from": "none"}}
    path.write_text(yaml.safe_dump(tree))
    arguments = ["sweep", "--config", str(path), "--grid", "training.lr=1e-5,2e-5"]
    assert main([*arguments, "--num_gpus", "2"]) == 2
    assert "--num_gpus belongs to pretraining" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "lr=1e-5: model.init_from: expected a Hugging Face folder" in capsys.readouterr().err
