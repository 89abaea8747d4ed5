"""`deepcloze sweep` before the first run starts."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from finetune.kinds.classification import Kind
from finetune.task_kind import Direction
from launcher.cli import main
from launcher.options import SweepOptions
from launcher.sweeps.sweep_plan import plan_sweep

Reject = Callable[..., str]


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
def reject(
    pretraining: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Reject:
    """Call `deepcloze sweep`, which must reject the grid and start nothing; returns the message."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def command(grid: str, *arguments: str) -> str:
        assert main(["sweep", "--config", str(pretraining), "--grid", grid, *arguments]) == 2
        assert not list(tmp_path.glob("*-sweep"))
        return capsys.readouterr().err

    return command


def test_the_commands_of_a_sweep(pretraining: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches overrides or flags that do not reach the runs, and two runs in one folder."""
    grid = "optimizer.lr=1e-4,5e-4 optimizer.betas=[0.9,0.98],[0.9,0.999]"
    arguments = ["--config", str(pretraining), "--grid", grid, "--num_gpus", "1", "--schedule.steps=3", "--dry_run"]
    assert main(["sweep", *arguments]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4
    assert lines[1][1:] == [
        *("-P", "-m", "launcher", "pretrain", "--config", str(pretraining), "--num_gpus=1", "--schedule.steps=3"),
        *("--optimizer.lr=1e-4", "--optimizer.betas=[0.9,0.999]"),
        f"--run.dir={tmp_path}/run-sweep/lr=1e-4_betas=0.9-0.999",
    ]
    assert not (tmp_path / "run-sweep").exists()


def test_every_point_is_validated_before_the_first_run(reject: Reject) -> None:
    """Catches a typo in the last value that is found hours later, and a metric that no run reports."""
    assert "lr=fast: command line: 'optimizer.lr'" in reject("optimizer.lr=1e-4,fast")
    assert "unknown config key 'optimizer.rate'" in reject("optimizer.rate=1e-4")
    assert "max_seq_length=128" in reject("batch.max_seq_length=32,128 batch.microbatch_tokens=128")
    assert "'optimizer.lr' is given both in --grid and as an override" in reject(
        "optimizer.lr=1e-4", "--optimizer.lr=1e-3"
    )
    assert "did you mean 'eval/held/loss'" in reject("optimizer.lr=1e-4", "--metric=eval/hold/loss")


def test_the_run_folder_of_the_config_may_be_in_use(
    pretraining: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches points validated as resumes of a run made with the same config."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    arguments = ["--config", str(pretraining), "--grid", "batch.sequences=4,8", "--run.resume=never", "--dry_run"]
    assert main(["sweep", *arguments]) == 0
    assert f"--run.dir={tmp_path}/run-sweep/sequences=4" in capsys.readouterr().out


def test_launch_flags_are_rejected_for_fine_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches flags that are silently ignored, and a fine-tuning config taken for a pretraining config."""
    path = tmp_path / "task.yaml"
    tree = {"run": {"dir": "a"}, "task": {"train": "t.csv", "validation": "v.csv"}, "model": {"init_from": "none"}}
    path.write_text(yaml.safe_dump(tree))
    arguments = ["sweep", "--config", str(path), "--grid", "training.lr=1e-5,2e-5"]
    assert main([*arguments, "--num_gpus", "2"]) == 2
    assert "--num_gpus applies to pretraining only" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "lr=1e-5: model.init_from: none does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metric", "lower_is_better"),
    [("eval/held/loss", True), ("eval/held/perplexity", True), ("eval/held/accuracy", False)],
)
def test_the_direction_of_a_metric_of_pretraining(pretraining: Path, metric: str, lower_is_better: bool) -> None:
    """Catches a table with the worst run at its top."""
    plan = plan_sweep(SweepOptions(config=str(pretraining), grid="batch.sequences=4", metric=metric))
    assert (plan.metric, plan.lower_is_better) == (metric, lower_is_better)


@pytest.mark.parametrize("direction", Direction)
def test_the_direction_of_a_metric_of_a_task(
    tmp_path: Path, direction: Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an error rate that is sorted as if higher were better, whatever its kind declares."""
    monkeypatch.setattr(Kind, "metrics", {"accuracy": direction})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    tree = {"run": {"dir": "a"}, "task": {"train": "t.csv"}, "model": {"init_from": str(tmp_path / "model")}}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(tree))
    plan = plan_sweep(SweepOptions(config=str(tmp_path / "task.yaml"), grid="training.lr=1e-5"))
    assert (plan.metric, plan.lower_is_better) == ("accuracy", direction is Direction.LOWER)
