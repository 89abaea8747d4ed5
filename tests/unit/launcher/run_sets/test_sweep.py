"""`deepcloze sweep`: the grid, the validation of its points, and runs with stand-ins for commands."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiment.config import flatten, load_config
from experiment.errors import StoppedError, UserError
from experiment.files import write_json
from experiment.run_files.checkpoints import checkpoint_path, mark_complete
from experiment.run_files.outcome_file import Outcome, write_outcome
from experiment.run_files.run_folder import RunFolder, open_run_folder
from experiment.run_files.run_lock import is_locked
from finetune.kinds.classification import Kind
from hub_server import HubServer
from launcher.cli import main
from launcher.command_line import parse_command_line
from launcher.commands import COMMANDS
from launcher.options import PretrainOptions, SweepOptions
from launcher.run_sets import child_run, run_set
from launcher.run_sets import sweep as sweep_module
from launcher.run_sets.child_run import DONE, ChildRun
from launcher.run_sets.run_set import PlannedRun, RunSet
from launcher.run_sets.sweep import SweepPlan, grid_points, parse_grid, plan_sweep, run_sweep
from pretrain.config import PretrainConfig
from pretrain.corpus.reader import open_corpus
from runs import small_tree
from waiting import wait_until

ROOT = Path(__file__).parents[4]
pytestmark = pytest.mark.usefixtures("empty_charts")

Reject = Callable[..., str]


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
    assert list(grid_points({"run.seed": ("-1", "1")})) == ["seed=-1", "seed=1"]


def test_long_values_make_names_that_file_systems_accept() -> None:
    """Catches a sweep that ends with "File name too long", or two points that share a folder."""
    paths = tuple(f"/{'数据' * 50}/{number}" for number in range(2))
    names = list(grid_points({"corpus.train": paths}))
    assert len(set(names)) == 2
    assert all(len(name.encode()) <= 240 for name in names)


@pytest.fixture
def pretraining(tmp_path: Path, wordpiece_corpus: Path, heldout_corpus: Path) -> Path:
    path = tmp_path / "run.yaml"
    corpora = {"train": str(wordpiece_corpus), "eval": {"held": str(heldout_corpus)}}
    path.write_text(yaml.safe_dump(small_tree(tmp_path / "run", wordpiece_corpus, corpus=corpora)))
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
    """Catches overrides or flags that do not reach the runs, two runs in one folder, and commands that a user would not
    type."""
    assert main(["sweep", "--config", str(pretraining), "--grid", "run.seed=1,2", "--dry_run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    grid = "optimizer.lr=1e-4,5e-4 optimizer.betas=[0.9,0.98],[0.9,0.999]"
    arguments = ["--config", str(pretraining), "--grid", grid, "--num_gpus", "1", "--schedule.steps=3", "--dry_run"]
    assert main(["sweep", *arguments]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4
    assert lines[1] == [
        *("deepcloze", "pretrain", "--config", str(pretraining), "--num_gpus=1", "--schedule.steps=3"),
        *("--optimizer.lr=1e-4", "--optimizer.betas=[0.9,0.999]"),
        f"--run.dir={tmp_path}/run-sweep/lr=1e-4_betas=0.9-0.999",
    ]
    assert not (tmp_path / "run-sweep").exists()


def test_every_point_is_validated_before_the_first_run(reject: Reject) -> None:
    """Catches a typo in the last value that is found hours later, two equal runs, and a metric that no run reports."""
    assert "lr=0.001: same config as lr=1e-3" in reject("optimizer.lr=1e-4,1e-3,0.001")
    assert "lr=fast: command line: 'optimizer.lr'" in reject("optimizer.lr=1e-4,fast")
    assert "unknown config key 'optimizer.rate'" in reject("optimizer.rate=1e-4")
    short = reject("model.config.max_position_embeddings=64,16")
    assert "max_position_embeddings=16: batch.max_seq_length is 32, but the model has 16 positions" in short
    assert "--grid: 'optimizer.lr' is set to 1e-3 for all points" in reject("optimizer.lr=1e-4", "--optimizer.lr=1e-3")
    assert "did you mean 'eval/held/loss'" in reject("optimizer.lr=1e-4", "--metric=eval/hold/loss")


def test_points_of_pretraining_are_evaluated_alike(reject: Reject, pretraining: Path) -> None:
    """Catches a sweep whose best point is the one whose held-out tokens are the easiest to predict, and one over
    schedules of the masking rate, which evaluations do not depend on, that is rejected."""
    message = "rate=0.3: masking.rate is 0.3, but 0.15 in rate=0.15: the metrics depend on it"
    assert message in reject("masking.rate=0.15,0.3")
    assert "`deepcloze compare`" in reject("masking.unit=token,span")
    assert "batch.max_seq_length is 16, but 32 in" in reject("batch.max_seq_length=32,16", "--metric=loss")
    corpus = load_config(PretrainConfig, pretraining).corpus.train
    for flag in ("--corpus.eval={}", "--metric=loss"):
        assert "corpus.train is other, but " in reject(f"corpus.train={corpus},other", flag)
    overrides = {"masking.rate": "[0.3, 0.15]"}
    options = SweepOptions(config=str(pretraining), grid="masking.schedule=linear,stepped", overrides=overrides)
    assert len(plan_sweep(options).runs.runs) == 2


def test_the_run_folder_of_the_config_may_be_in_use(
    pretraining: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches points validated as resumes of a run made with the same config, those that cannot be resumed, and those
    that take over a run which the sweep has not started."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    arguments = ["--config", str(pretraining), "--grid", "batch.sequences=4,8", "--run.resume=never", "--dry_run"]
    assert main(["sweep", *arguments]) == 0
    first, _ = capsys.readouterr().out.splitlines()
    assert f"--run.dir={tmp_path}/run-sweep/sequences=4" in first
    assert "--run.resume=never" in first
    used = open_run_folder(tmp_path / "run-sweep" / "sequences=4")
    used.provenance.touch()
    used.metrics.touch()
    assert main(["sweep", *arguments]) == 2
    assert "sequences=4: run.resume is 'never', but" in capsys.readouterr().err
    write_json(tmp_path / "run-sweep" / "sweep.json", {"runs": {"sequences=4": {"config": {}}}})
    assert main(["sweep", *arguments]) == 0
    flags = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert ["--run.resume=auto" in command for command in flags] == [True, False]
    used.metrics.unlink()
    used.provenance.unlink()  # it was rejected, as for what its mirror holds
    assert main(["sweep", *arguments]) == 0
    assert "--run.resume=auto" not in capsys.readouterr().out


def test_a_finished_point_may_lack_its_checkpoints(
    pretraining: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a sweep that must train a point again before another one can be added, also if the run that it forked has
    deleted the checkpoint since; and one that shows the score of a finished run of another config, which it did not
    start."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    point = open_run_folder(tmp_path / "run-sweep" / "lr=1e-4")
    point.saved.touch()
    arguments = ["sweep", "--config", str(pretraining), "--grid", "optimizer.lr=1e-4,5e-4", "--dry_run"]
    assert main(arguments) == 2
    assert "lr=1e-4: there is no checkpoint in" in capsys.readouterr().err
    write_outcome(point, Outcome.DONE)
    assert main(arguments) == 2
    write_json(point.path.parent / "sweep.json", {"runs": {point.path.name: {"config": {}}}})
    assert main(arguments) == 0
    forks = [*arguments[:4], "optimizer.lr=1e-4", "--dry_run", f"--run.resume={tmp_path}/checkpoints/step-00000002"]
    assert main(forks) == 0
    capsys.readouterr()
    checkpoint_path(point.checkpoints, 2).mkdir(parents=True)  # copied without its files
    assert main(arguments) == 0
    assert f"--run.dir={point.path}\n" in capsys.readouterr().out


def test_launch_flags_are_rejected_for_fine_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches flags that are silently ignored, and a fine-tuning config taken for a pretraining config."""
    path = tmp_path / "task.yaml"
    tree = {"run": {"dir": "a"}, "task": {"train": "t.csv", "validation": "v.csv"}, "model": {"init_from": "none"}}
    path.write_text(yaml.safe_dump(tree))
    arguments = ["sweep", "--config", str(path), "--grid", "training.lr=1e-5,2e-5"]
    assert main([*arguments, "--num_gpus", "2"]) == 2
    assert "--num_gpus applies to pretraining only" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "lr=1e-5: model.init_from: none: no such folder, and no such model in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metric", "lower_is_better"),
    [("eval/held/loss", True), ("eval/held/perplexity", True), ("eval/held/accuracy", False)],
)
def test_the_direction_of_a_metric_of_pretraining(pretraining: Path, metric: str, lower_is_better: bool) -> None:
    """Catches a table with the worst run at its top."""
    plan = plan_sweep(SweepOptions(config=str(pretraining), grid="batch.sequences=4", metric=metric))
    assert (plan.metric, plan.lower_is_better) == (metric, lower_is_better)


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_the_direction_of_a_metric_of_a_task(
    tmp_path: Path, lower_is_better: bool, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an error rate that is sorted as if higher were better, whatever its kind declares."""
    monkeypatch.setattr(Kind, "lower_is_better", ("accuracy",) if lower_is_better else ())
    data = tmp_path / "t.csv"
    data.touch()
    tree = {"run": {"dir": "a"}, "task": {"train": str(data)}, "model": {"init_from": str(encoder)}}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(tree))
    plan = plan_sweep(SweepOptions(config=str(tmp_path / "task.yaml"), grid="training.lr=1e-5"))
    assert (plan.metric, plan.lower_is_better) == ("accuracy", lower_is_better)


# Stands for a run: it logs an event with the given loss, sleeps and reports that it is done, or fails.
RUN = r"""
import json, sys, time
from pathlib import Path
folder, loss, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
(folder / "logs").mkdir(parents=True, exist_ok=True)
with (folder / "metrics.jsonl").open("a") as file:
    file.write(json.dumps({"step": 1, "eval/held/loss": 9.9}) + "\n")
    if loss == "fail":
        sys.exit(1)
    time.sleep(seconds)
    file.write(json.dumps({"step": 2, "eval/held/loss": float(loss)}) + "\n")
(folder / "logs" / "outcome.json").write_text(json.dumps({"outcome": "done", "message": "", "cause": None}))
"""

# Stands for a run that a killed sweep has left: when told to end, it reports {outcome}, or nothing.
LEFT = r"""
import sys, time
from pathlib import Path
from experiment.run_files.outcome_file import Outcome, write_outcome
from experiment.run_files.run_folder import open_run_folder
from experiment.run_files.run_lock import lock_run
folder = open_run_folder(sys.argv[1])
with lock_run(folder):
    (folder.path / "ready").touch()
    while not (folder.path / "end").exists():
        time.sleep(0.02)
    if sys.argv[2] != "none":
        write_outcome(folder, Outcome(sys.argv[2]))
        folder.metrics.write_text('{"step": 2, "eval/held/loss": 1.5}\n')
"""


def plan(output: Path, losses: dict[str, str], seconds: float = 0.0) -> SweepPlan:
    """One run for each learning rate; `losses` are their final losses."""
    runs = [
        PlannedRun(
            f"lr={rate}",
            (sys.executable, "-c", RUN, str(output / f"lr={rate}"), loss, str(seconds)),
            {"optimizer.lr": rate, "run.seed": 1},
            values={"optimizer.lr": rate},
        )
        for rate, loss in losses.items()
    ]
    return plan_of(runs, output)


def plan_of(runs: Sequence[PlannedRun], output: Path, metric: str = "eval/held/loss") -> SweepPlan:
    header = {"metric": metric, "lower_is_better": True}
    run_set = RunSet("sweep", RunFolder(output), "--output", "sweep.json", tuple(runs), header)
    return SweepPlan(run_set, metric, lower_is_better=True)


def test_a_sweep_with_a_failure_run_twice(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a failed run that ends the sweep or is hidden, and finished ones that run again."""
    monkeypatch.undo()  # of `empty_charts`
    sweep = plan(tmp_path, {"1e-4": "4.5", "1e-3": "fail", "1e-2": "3.5"})
    with pytest.raises(SystemExit, match=r"1 of 3 runs failed: lr=1e-3"):
        run_sweep(sweep)
    said = capfd.readouterr()
    assert "[2/3] lr=1e-3: failed (exit code 1)" in said.err
    assert said.out.index("3.5000") < said.out.index("4.5000") < said.out.index("failed")
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["optimizer.lr", "eval/held/loss", "state", "folder", "collapsed", "std"]
    assert [row[0] for row in rows[1:]] == ["1e-2", "1e-4", "1e-3"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert report.index("3.5000") < report.index("4.5000") < report.index("failed")

    attempt = {"versions": {"deepcloze": "0.1.9"}}
    write_json(tmp_path / "lr=1e-4" / "provenance.json", {"run_id": "1", "ancestors": [], "attempts": [attempt]})
    repaired = plan(tmp_path, {"1e-4": "fail", "1e-3": "2.5", "1e-2": "fail", "1e-1": "6.5"})
    run_sweep(repaired)
    said = capfd.readouterr()
    assert "[1/4] lr=1e-4: already finished" in said.err
    assert said.err.count("sweep: kept from another version of deepcloze: lr=1e-4 (0.1.9); runs of") == 1
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert {name: run["value"] for name, run in record["runs"].items()} == {
        "lr=1e-4": 4.5,
        "lr=1e-3": 2.5,
        "lr=1e-2": 3.5,
        "lr=1e-1": 6.5,
    }


def test_runs_of_another_version_are_named_if_others_are_added(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches cells of two versions in one table without a word, also cells that are sweeps; a line for each of them,
    or if all are of one version; and the advice to remove a pretraining."""
    old = json.dumps({"run_id": "1", "ancestors": [], "attempts": [{"versions": {"deepcloze": "0.1.9"}}]})
    for name in ("a", "pre", "b"):
        write_outcome(open_run_folder(tmp_path / name), Outcome.DONE)
    write_json(tmp_path / "a" / "sweep.json", {"runs": {"lr=1": {"config": {}}}})
    for name in ("a/lr=1", "pre", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "provenance.json").write_text(old)
    argv = (sys.executable, "-c", RUN, str(tmp_path / "c"), "1.5", "0")
    runs = [PlannedRun("a", (), {}), PlannedRun("pre", (), {}), PlannedRun("b", (), {}, "pre")]
    for planned, said in ((runs, 0), ([*runs, PlannedRun("c", argv, {})], 1)):
        run_set = RunSet("compare", RunFolder(tmp_path), "run.dir", "record.json", tuple(planned))
        with run_set.opened() as records:
            run_set.finish(records)
        line = "compare: kept from another version of deepcloze: a (0.1.9), b (0.1.9); runs of this version may have"
        error = capfd.readouterr().err
        assert (error.count(line), error.count("another version")) == (said, said)


@pytest.mark.parametrize(
    ("best_metrics", "value"),
    [(["eval/held/accuracy"], 12.5), (["eval/held/loss"], 9.9), (["eval/held/loss", None], 12.5)],
)
def test_points_are_compared_by_their_best_checkpoints(
    tmp_path: Path, best_metrics: list[str | None], value: float
) -> None:
    """Catches a point that is listed with the loss of its last checkpoint although it has kept a better one, and points
    that are measured in another way if the grid has another order."""
    runs = plan(tmp_path, dict.fromkeys(["1e-4", "1e-3"][: len(best_metrics)], "12.5")).runs.runs
    pairs = zip(runs, best_metrics, strict=True)
    changed = [replace(run, config={**run.config, "evaluation.best_metric": metric}) for run, metric in pairs]
    run_sweep(plan_of(changed, tmp_path))
    found = json.loads((tmp_path / "sweep.json").read_text())["runs"]
    assert [each["value"] for each in found.values()] == [value] * len(best_metrics)


def test_scores_of_a_fine_tuning_name_their_split(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a table of validation scores that are taken for those of the test split."""
    (run,) = plan(tmp_path, {"1e-4": "4.5"}).runs.runs
    run = replace(run, config={**run.config, "task.kind": "regression"})
    run_sweep(plan_of([run], tmp_path, "loss"))
    assert "validation loss" in capfd.readouterr().out
    assert "validation loss" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), UserError("nothing to report")])
def test_a_report_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    """Catches a sweep whose runs are all done, and that fails because of its report."""

    def fail(output: Path) -> Path:
        raise error

    monkeypatch.setattr("launcher.report.write_report", fail)
    run_sweep(plan(tmp_path, {"1e-4": "4.5"}))
    assert (
        f"warning: sweep: no report: {error}; to write it, run: deepcloze report {tmp_path}" in capsys.readouterr().err
    )
    assert (tmp_path / "sweep.csv").is_file()


def test_points_have_the_same_data_and_encoder(
    task: Path, pretraining: Path, wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches one table of runs that were trained or evaluated on other data, or start from other files, of the same
    names."""

    def config(file: Path, grid: str, **overrides: str) -> dict[str, object]:
        named = {key.replace("__", "."): text for key, text in overrides.items()}
        (run,) = plan_sweep(SweepOptions(config=str(file), grid=grid, overrides=named)).runs.runs
        return dict(run.config)

    first = config(task, "training.lr=1e-5")
    (tmp_path / "t.csv").write_text("text,label")
    model = tmp_path / "model" / "config.json"
    model.write_text(model.read_text() + "\n")
    second = config(task, "training.lr=1e-5")
    assert {key for key in first if first[key] != second[key]} == {"data.train", "encoder.config.json"}
    found = config(pretraining, "engine.ds_config=bf16_zero1")
    corpus = open_corpus(yaml.safe_load(pretraining.read_text())["corpus"]["train"])
    assert (found["corpus.fingerprint"], found["engine.ds_config.bf16.enabled"]) == (corpus.fingerprint, True)
    assert not [key for key in found if "zero_optimization" in key]  # it changes no result

    held, both = tmp_path / "held", []
    for evaluated in (heldout_corpus, wordpiece_corpus):
        held.unlink(missing_ok=True)
        held.symlink_to(evaluated)
        model.write_text(model.read_text() + "\n")
        continued = {"model__init_from": str(model.parent), "model__config": "null", "corpus__eval__held": str(held)}
        both.append(config(pretraining, "optimizer.lr=1e-5", **continued))
    first, second = both
    assert {key for key in first if first[key] != second[key]} == {"corpus.eval_fingerprints", "encoder.config.json"}


def test_a_sweep_is_beside_the_folder_of_the_config(
    pretraining: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a sweep in the folder of a run, where `status` and `report` do not find it."""
    arguments = ["--config", str(pretraining), "--grid", "run.seed=1", f"--run.dir={tmp_path}/run/", "--dry_run"]
    assert main(["sweep", *arguments]) == 0
    assert f"--run.dir={tmp_path}/run-sweep/seed=1" in capsys.readouterr().out


def test_an_edit_of_the_config_reaches_no_run_of_a_sweep(
    pretraining: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches points that are trained with other settings than sweep.json records, and a sweep that then continues
    with neither config."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    before, trained = pretraining.read_text(), []

    def start(run: ChildRun) -> str:
        _, options = parse_command_line(run.argv[4:], COMMANDS)
        assert isinstance(options, PretrainOptions)
        trained.append(load_config(PretrainConfig, options.config, options.overrides).batch.sequences)
        pretraining.write_text(before.replace("sequences: 8", "sequences: 4"))
        write_outcome(open_run_folder(run.folder.path), Outcome.DONE)
        return DONE

    monkeypatch.setattr(run_set, "start", start)
    options = SweepOptions(config=str(pretraining), grid="optimizer.lr=1e-4,5e-4")
    run_sweep(plan_sweep(options))
    assert trained == [8, 8]
    record = json.loads((tmp_path / "run-sweep" / "sweep.json").read_text())
    assert {run["config"]["batch.sequences"] for run in record["runs"].values()} == {8}
    with pytest.raises(UserError, match=r"was started with another batch\.sequences: 8, now 4"):
        run_sweep(plan_sweep(options))
    smaller = before.replace("microbatch_tokens: 64", "microbatch_tokens: 32")  # as after a lack of memory
    assert smaller != before
    pretraining.write_text(smaller)
    run_sweep(plan_sweep(options))
    assert len(trained) == 2, "finished"


def test_one_sweep_at_a_time_uses_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two sweeps that write one sweep.json, and a folder that stays locked after a sweep."""
    sweep = plan(tmp_path / "new", {"1e-4": "4.5"})
    refused = []

    def notify(message: str) -> None:
        if message.endswith("running"):
            with pytest.raises(UserError, match=r"^--output: another deepcloze process is using .*new$"):
                run_sweep(sweep)
            assert is_locked(sweep.runs.folder), "a comparison waits for the sweep that a killed one has left"
            refused.append(message)

    monkeypatch.setattr(run_set, "inform", notify)
    run_sweep(sweep)
    assert len(refused) == 1
    run_sweep(sweep)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_the_points_are_checked_exits_with_75(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Catches a queue system that does not submit a sweep again because it was stopped while it was checked."""
    monkeypatch.setattr(sweep_module, "plan_sweep", lambda _: os.kill(os.getpid(), number))
    assert main(["sweep", "--config", "run.yaml", "--grid", "run.seed=1,2"]) == 75


def test_a_signal_while_a_run_starts_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that is left behind because the signal came before its process was known."""
    popen, started = subprocess.Popen, []

    def start_and_signal(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start_and_signal)
    with pytest.raises(StoppedError, match=r"stopped at \[1/1\] lr=1e-4"):
        run_sweep(plan(tmp_path, {"1e-4": "4.5"}, seconds=3600.0))
    assert started[0].poll() == -signal.SIGTERM


def test_a_signal_stops_the_sweep_after_the_run_has_stopped(tmp_path: Path) -> None:
    """Catches a run that is left behind, and others that start after Ctrl-C."""
    sweep = plan(tmp_path, {"1e-4": "4.5", "1e-3": "3.5"}, seconds=3600.0)

    def interrupt() -> None:
        wait_until(RunFolder(tmp_path / "lr=1e-4").metrics.exists)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(StoppedError, match=r"stopped at \[1/2\] lr=1e-4"):
        run_sweep(sweep)
    assert not (tmp_path / "lr=1e-3").exists()


@pytest.fixture
def left_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a process that uses the folder of the first run and ends as told, when the sweep says that it waits."""
    processes = []

    def start(outcome: str, when_waiting: Callable[[], object] | None = None) -> subprocess.Popen[bytes]:
        folder = tmp_path / "lr=1e-4"
        process = subprocess.Popen([sys.executable, "-c", LEFT, str(folder), outcome], cwd=ROOT)
        processes.append(process)
        wait_until((folder / "ready").exists, process)

        def notify(message: str) -> None:
            if "waiting for the process" in message:
                assert str(folder) in message
                (when_waiting or (folder / "end").touch)()

        monkeypatch.setattr(child_run, "notify", notify)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("outcome", "value"), [("done", 1.5), ("failed", 4.5), ("none", 4.5)])
def test_a_run_left_by_a_killed_sweep_is_taken_over(
    tmp_path: Path, left_run: Callable[..., subprocess.Popen[bytes]], outcome: str, value: float
) -> None:
    """Catches a point that counts as failed because its run still runs, and the next one started beside it."""
    process = left_run(outcome)
    run_sweep(plan(tmp_path, {"1e-4": "4.5"}))
    assert process.wait(60) == 0
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert record["runs"]["lr=1e-4"]["value"] == value, "4.5: run again"


def test_a_left_run_that_was_stopped_stops_the_sweep(
    tmp_path: Path, left_run: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """Catches a run that the user has stopped, and that the sweep starts again."""
    left_run("stopped")
    with pytest.raises(StoppedError, match=r"stopped at \[1/1\] lr=1e-4"):
        run_sweep(plan(tmp_path, {"1e-4": "4.5"}))


def test_a_signal_to_a_waiting_sweep(tmp_path: Path, left_run: Callable[..., subprocess.Popen[bytes]]) -> None:
    """Catches a waiting sweep that cannot be stopped, and a signal that reaches a run of which it knows nothing."""
    process = left_run("done", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError, match="still runs"):
        run_sweep(plan(tmp_path, {"1e-4": "4.5"}))
    assert process.poll() is None


def test_a_full_disk_stops_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback after a run has finished, which the next attempt has to skip."""
    sweep = plan(tmp_path, {"1e-4": "4.5", "1e-3": "3.5"})
    calls = iter(range(9))

    def full(path: Path, value: object) -> None:
        if next(calls) == 1:
            raise OSError(28, "No space left on device", str(path))
        write_json(path, value)

    monkeypatch.setattr("launcher.run_sets.run_set.write_json", full)
    with pytest.raises(StoppedError, match=r"^sweep: .*sweep\.json: disk full; the same command resumes$"):
        run_sweep(sweep)
    run_sweep(sweep)
    lines = (tmp_path / "lr=1e-4" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2, "the finished run is skipped"


def test_all_points_start_from_one_commit(
    hub: HubServer, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches runs of one table whose models differ because someone has pushed to the Hub between them."""
    commit = hub.repository("org/model").push_folder(encoder)
    config = tmp_path / "task.yaml"
    data = tmp_path / "t.csv"
    data.touch()
    tree = {"run": {"dir": str(tmp_path / "run")}, "task": {"train": str(data)}, "model": {"init_from": "org/model"}}
    config.write_text(yaml.safe_dump(tree))

    def models(grid: str) -> list[str]:
        assert main(["sweep", "--config", str(config), "--grid", grid, "--dry_run"]) == 0
        commands = map(shlex.split, capsys.readouterr().out.splitlines())
        return [argument for command in commands for argument in command if "init_from" in argument]

    pinned = f"--model.init_from=org/model@{commit}"
    assert models("training.lr=1e-5,2e-5") == [pinned] * 2
    recorded = {"lr=1e-5": {"config": {"model.init_from": f"org/model@{commit}"}}}
    write_json(tmp_path / "run-sweep" / "sweep.json", {"runs": recorded})
    (tmp_path / "run-sweep" / "lr=1e-5").mkdir()
    new = hub.repository("org/model").push_folder(encoder, notes__txt=b"new")
    assert models("training.lr=1e-5,2e-5") == [pinned] * 2
    (tmp_path / "run-sweep" / "sweep.json").unlink()
    assert models("training.lr=1e-5") == [f"--model.init_from=org/model@{new}"]


def dry_run(capsys: pytest.CaptureFixture[str], config: Path, grid: str, *overrides: str) -> list[list[str]]:
    """The flags of each run that set the model, the data or its parent."""
    assert main(["sweep", "--config", str(config), "--grid", grid, "--dry_run", *overrides]) == 0
    commands = map(shlex.split, capsys.readouterr().out.splitlines())
    keys = ("--model.", "--task.", "--run.resume")
    return [[flag for flag in command if flag.startswith(keys)] for command in commands]


@pytest.fixture
def task(tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fine-tuning config. Its data are not parsed."""
    monkeypatch.chdir(tmp_path)
    Path("t.csv").touch()
    path = tmp_path / "task.yaml"
    model = shutil.copytree(encoder, tmp_path / "model")
    tree = {"run": {"dir": str(tmp_path / "run")}, "task": {"train": "t.csv"}, "model": {"init_from": str(model)}}
    path.write_text(yaml.safe_dump(tree))
    return path


def test_all_points_read_one_commit_of_the_data(
    hub: HubServer, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches runs of one table that are trained on other rows because someone has pushed to the Hub between them."""
    data = hub.repository("org/reviews", "dataset")
    commit = data.push({"train.csv": b"text,label"})
    overrides = ("--task.train=hub:org/reviews", "--task.test={a: 'hub:org/reviews:test', b: t.csv}")
    tests = json.dumps({"a": f"hub:org/reviews@{commit}:test", "b": str(Path("t.csv").absolute())})
    pinned = [f"--task.train=hub:org/reviews@{commit}:train", f"--task.test={tests}"]
    for flags in dry_run(capsys, task, "training.lr=1e-5,2e-5", *overrides):
        assert set(pinned) <= set(flags)
    for flags in dry_run(capsys, task, "training.lr=1e-5,2e-5", "--task.test.a=hub:org/reviews:test"):
        tests = json.dumps({"a": f"hub:org/reviews@{commit}:test"})
        assert [flag for flag in flags if "task.test" in flag] == [f"--task.test={tests}"]
    recorded = {"lr=1e-5": {"config": {"task.train": f"hub:org/reviews@{commit}:train"}}}
    write_json(tmp_path / "run-sweep" / "sweep.json", {"runs": recorded})
    (tmp_path / "run-sweep" / "lr=1e-5").mkdir()
    data.push({"train.csv": b"text,label,more"})
    for flags in dry_run(capsys, task, "training.lr=1e-5,2e-5,3e-5", *overrides):
        assert set(pinned) <= set(flags)


@pytest.mark.parametrize(
    ("kind", "key", "rate"),
    [
        ("task", "model.init_from", "training.lr"),
        ("pretraining", "model.init_from", "optimizer.lr"),
        ("pretraining", "run.resume", "optimizer.lr"),
    ],
)
@pytest.mark.parametrize("in_grid", [False, True])
def test_all_points_start_from_one_checkpoint(
    kind: str,
    key: str,
    rate: str,
    in_grid: bool,
    encoder: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches points that start from, or fork, the checkpoint that is the newest one when they begin, and a sweep that
    cannot be resumed because its run has saved another one, because a value was added in front, because version 0.2.0
    recorded the run for pretraining, or which keeps a checkpoint after its points were removed."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)
    run, config = tmp_path / "pretrained", request.getfixturevalue(kind)
    if key == "run.resume":
        run = Path(run.name)  # relative: the project may be moved
    grid, overrides = (f"{key}={run} ", []) if in_grid else ("", [f"--{key}={run}"])
    (name,) = grid_points(parse_grid(f"{grid}{rate}=1e-5"))
    if key == "run.resume":  # the checkpoints have no state
        loaded = flatten(load_config(PretrainConfig, config))
        monkeypatch.setattr(sweep_module, "validate_pretraining", lambda *_: loaded)
    elif kind == "pretraining":
        overrides.append("--model.config=null")

    def save(step: int) -> str:
        checkpoint = checkpoint_path(run / "checkpoints", step)
        shutil.copytree(encoder, checkpoint / "hf")
        mark_complete(checkpoint)
        return str(checkpoint) if key == "run.resume" else f"{checkpoint}/hf"

    def models(rates: str) -> list[str]:
        found = dry_run(capsys, config, f"{grid}{rate}={rates}", *overrides)
        return [flag.removeprefix(f"--{key}=") for flags in found for flag in flags if key in flag]

    def record(began: str) -> None:
        write_json(tmp_path / "run-sweep" / "sweep.json", {"runs": {name: {"config": {key: began}}}})

    first, point = save(1), tmp_path / "run-sweep" / name
    assert models("1e-5,2e-5") == [first] * 2
    record(first)
    point.mkdir()
    second = save(2)
    assert models("2e-5,1e-5") == [first] * 2
    if kind == "pretraining":
        record(str(run))
        assert models("1e-5,2e-5") == [str(run)] * 2
    point.rmdir()
    assert models("1e-5") == [second]
    if key == "run.resume":
        shutil.copytree(run, "best")
        Path("link").symlink_to(first)  # may name another one later
        expected = {first: first, "best": f"best/{Path(second).relative_to(run)}", "link": first}
        for name, checkpoint in expected.items():
            found = dry_run(capsys, config, f"{rate}=1e-5", f"--run.resume={name}")
            assert found == [[f"--run.resume={checkpoint}"]]


def test_the_model_of_all_points_is_checked(task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a sweep whose last points do not start, or none of them."""
    arguments = ["sweep", "--config", str(task), "--grid", "model.max_seq_length=128,1024"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert f"max_seq_length=1024: {task}: model.max_seq_length is 1024, the model in" in said
    (tmp_path / "model" / "model.safetensors").write_text("garbage")
    assert main(arguments) == 2
    assert f"max_seq_length=128: {task}: cannot load the weights in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--training.fit_on=train+validation"], "training.fit_on: expected train, found train+validation: the points"),
        (["--task.kind=cloze", "--task.scoring=zero_shot", "--task.test=t.jsonl", "--task.train=null"], "is missing"),
    ],
)
def test_points_that_cannot_be_compared_are_rejected(
    task: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    """Catches a sweep that ends with a traceback after its first run has been trained."""
    assert main(["sweep", "--config", str(task), "--grid", "model.max_seq_length=64,128", *overrides]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "values", "validation"),
    [
        ("split_seed", "0,1", "null"),
        ("train", "t.csv,b.csv", "null"),
        ("columns.context", "None,text", "null"),
        ("columns.label", "label,other", "null"),
        ("dialogue.group", "a,b", "null"),
        ("columns.negative", "None,other", "t.csv"),
        ("validation", "t.csv,b.csv", ""),
        ("quoting", "0,3", "t.csv"),
    ],
)
def test_points_with_other_validation_rows_are_rejected(
    task: Path, capsys: pytest.CaptureFixture[str], key: str, values: str, validation: str
) -> None:
    """Catches a sweep whose best point is the one with the easiest validation rows, also those that are drawn because
    rows with the same context, or of the same dialogue, stay together, or the one with the fewest texts to rank."""
    flags = [f"--task.validation={validation}"] if validation else []
    if key == "columns.context":
        flags += ["--task.kind=multiple_choice", "--task.columns={choices: [a, b], question: question, label: label}"]
    if key == "columns.negative":
        flags += ["--task.kind=embedding", "--task.columns={text: text, text_pair: label}", "--task.metric=mrr"]
    flags += ["--task.special_tokens_in_text=true"] if key.startswith("dialogue") else []
    written = values.replace("None", "null")
    command = ["sweep", "--config", str(task), "--grid", f"task.{key}={written}", *flags]
    assert main(command) == 2
    (first, second), (name, _, _) = values.split(","), written.partition(",")
    message = f"task.{key} is {second}, but {first} in {key.rpartition('.')[2]}={name}: the points would be scored on "
    assert message in (said := capsys.readouterr().err)
    assert (", or set task.validation to a file" in said) == (validation == "null")
    if key == "columns.negative":
        command.append("--task.metric=spearman")
        assert main([*command, "--metric=mrr"]) == 2
        assert main([*command, "--dry_run"]) == 0  # of scores, which have no negatives
        for metrics in ("mrr,uniformity", "uniformity,mrr"):
            grid = ["--grid", f"task.metric={metrics}", *flags[:-1], "--task.columns.negative=other"]
            assert main([*command[:3], *grid, "--dry_run"]) == 0  # all are compared by the first one
    elif "." in key:  # a file has the same rows for each
        assert main([*command, f"--task.validation={task.parent / 't.csv'}", "--dry_run"]) == 0


def test_each_point_has_a_mirror_of_its_own(
    pretraining: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches points that are restored from the mirror of the first one, and are done with its result."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    arguments = ["--config", str(pretraining), "--checkpoint.mirror=s3://bucket/sweep", "--dry_run"]
    assert main(["sweep", *arguments, "--grid", "optimizer.lr=1e-4,5e-4"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    mirrors = [flag for line in lines for flag in line if flag.startswith("--checkpoint.mirror=")]
    assert mirrors == [f"--checkpoint.mirror=s3://bucket/sweep/lr={lr}" for lr in ("1e-4", "5e-4")]
