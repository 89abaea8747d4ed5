"""Scoring one checkpoint: what is started, and what is read from it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiment.config import load_config
from experiment.errors import StoppedError, UserError
from experiment.run_files.checkpoints import weights_digest
from experiment.run_files.run_folder import RunFolder
from experiment.tracking.config import TrackingConfig
from finetune.config import FinetuneConfig
from launcher.command_line import parse_command_line
from launcher.commands import COMMANDS
from launcher.options import FinetuneOptions
from launcher.run_sets import watched_task
from launcher.run_sets.child_run import DONE, ChildRun
from launcher.run_sets.watched_task import ScoringError, WatchedTask, read_watched_task, score_checkpoint

Save = Callable[..., Path]
WriteTask = Callable[..., Path]


@pytest.fixture
def write_task(tmp_path: Path) -> WriteTask:
    """Writes a task, with changes to its keys as `section__key=value`; returns the path."""

    def write(**changes: Any) -> Path:
        for split in ("train", "validation", "test"):
            (tmp_path / f"{split}.tsv").write_text("label\ttext\nlow\ta\nhigh\tb\n")
        splits = {split: str(tmp_path / f"{split}.tsv") for split in ("train", "validation", "test")}
        tree: dict[str, dict[str, Any]] = {"run": {"dir": "replaced"}, "model": {"init_from": "replaced"}}
        tree |= {"task": {**splits, "columns": {"label": "label", "text": "text"}}, "training": {"seeds": [1, 2]}}
        for dotted, value in changes.items():
            section, _, key = dotted.partition("__")
            tree[section][key] = value
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def test_scores_of_earlier_versions_stay_comparable(write_task: WriteTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a new key that makes the scores of all checkpoints so far those of another config."""
    files = {f"task__{split}": f"{split}.tsv" for split in ("train", "validation", "test")}
    path = write_task(**files)
    monkeypatch.chdir(path.parent)
    assert read_watched_task("toy.yaml", probe=False).config[:16] == "28c4a721718a7897"
    assert read_watched_task("toy.yaml", probe=True).config[:16] == "20faa15982566278"
    assert (
        read_watched_task(str(write_task(**files, model__pooling="mean")), probe=False).config[:16]
        != "28c4a721718a7897"
    )


def test_scores_on_other_drawn_rows_are_not_comparable(write_task: WriteTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a curve of the scores of version 0.2.0, which drew the validation split of multi-label tasks by other
    labels, and of later ones."""
    keys = {"task__kind": "multi_label", "task__columns": {"labels": "label", "text": "text"}}
    path = write_task(**keys, task__train="train.tsv", task__validation=None, task__test="test.tsv")
    monkeypatch.chdir(path.parent)
    assert read_watched_task("toy.yaml", probe=False).config[:16] != "90dbe9f17fcb4572"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ChildRun]:
    """The processes that were started. They write scores of both splits."""
    runs: list[ChildRun] = []

    def start(run: ChildRun) -> str:
        runs.append(run)
        run.folder.path.mkdir(parents=True, exist_ok=True)
        splits = {"validation": {"accuracy": {"mean": 0.7}}, "test": {"accuracy": {"mean": 0.1}}}
        (run.folder.path / "results.json").write_text(
            json.dumps({"splits": splits, "collapsed": {"2": ["validation"]}})
        )
        return DONE

    monkeypatch.setattr(watched_task, "start", start)
    return runs


def task_of(file: Path, probe: bool = False) -> WatchedTask:
    return read_watched_task(str(file), probe)


def test_validation_is_scored_and_test_is_not_read(
    run: RunFolder, save: Save, write_task: WriteTask, started: list[ChildRun]
) -> None:
    """Catches a curve of test scores, a child that trains on another model or keeps it, and leftovers on disk."""
    checkpoint = save(100)
    task, weights = task_of(write_task()), weights_digest(checkpoint)
    result = score_checkpoint(checkpoint, weights, task, run)
    assert (result.step, result.task, result.metrics, result.weights) == (100, "toy", {"accuracy": 0.7}, weights)
    assert result.collapsed == 1
    (child,) = started
    assert {"--task.test=null", "--run.keep=none", "--tracking.wandb=disabled"} <= set(child.argv)
    assert not (run.downstream / "toy" / "work").exists()


def test_a_checkpoint_with_the_name_of_another_step_is_not_scored(
    run: RunFolder, save: Save, write_task: WriteTask, started: list[ChildRun]
) -> None:
    """Catches scores that are drawn at the wrong step."""
    checkpoint = save(100)
    (checkpoint / "state.json").write_text('{"step": 200}')
    with pytest.raises(ScoringError, match=r"damaged: its state\.json is of step 200"):
        score_checkpoint(checkpoint, weights_digest(checkpoint), task_of(write_task()), run)
    assert not started


def test_the_child_accepts_its_command_line(
    run: RunFolder, save: Save, write_task: WriteTask, started: list[ChildRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a flag that `deepcloze finetune` rejects, and one that leaves a tracker or an alert of the task on."""
    file = write_task()
    alerts = {"email": "me@x", "webhook": True, "apprise": True, "wandb": True}
    tracking = {"wandb": "online", "tensorboard": True, "artifacts": True, "alerts": alerts}
    file.write_text(file.read_text() + yaml.safe_dump({"tracking": tracking}))
    write, configs = watched_task.start, []

    def parse_then_start(child: ChildRun) -> str:
        assert child.argv[1:4] == ("-P", "-m", "launcher")
        name, options = parse_command_line(child.argv[4:], COMMANDS)
        assert name == "finetune"
        assert isinstance(options, FinetuneOptions)
        configs.append(load_config(FinetuneConfig, options.config, options.overrides))
        return write(child)

    monkeypatch.setattr(watched_task, "start", parse_then_start)
    checkpoint = save(100)
    score_checkpoint(checkpoint, weights_digest(checkpoint), task_of(file), run)
    (config,), (child,) = configs, started
    assert config.tracking == TrackingConfig()
    assert config.task.test is None
    assert config.run.dir == str(child.folder.path)


@pytest.mark.parametrize("probe", [False, True])
def test_an_edit_of_the_task_does_not_change_its_scores(
    run: RunFolder, save: Save, write_task: WriteTask, monkeypatch: pytest.MonkeyPatch, probe: bool
) -> None:
    """Catches scores of other settings that have the digest of those that the watch has read."""
    checkpoint, task = save(100), task_of(write_task(), probe)
    edited, seen = write_task(task__columns={"label": "label", "text": "other"}), []

    def start(child: ChildRun) -> str:
        (file,) = (Path(text) for text in child.argv if text.endswith(".yaml"))
        overrides = {"run.dir": ".", "model.init_from": "."}
        seen.append((file.name, load_config(FinetuneConfig, file, overrides).task.columns.text))
        return "failed (exit code 1)"

    monkeypatch.setattr(watched_task, "start", start)
    with pytest.raises(ScoringError):
        score_checkpoint(checkpoint, weights_digest(checkpoint), task, run)
    assert seen == [(edited.name, "text")]


def test_the_checkpoint_may_be_deleted_while_it_is_scored(
    run: RunFolder, save: Save, write_task: WriteTask, started: list[ChildRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a fine-tuning run that reads from the checkpoint itself, or a file that does not belong to it, and a disk
    without hard links."""
    write = watched_task.start

    def delete_then_start(child: ChildRun) -> str:
        for path in sorted(checkpoint.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        checkpoint.rmdir()
        (model,) = (text.partition("=")[2] for text in child.argv if text.startswith("--model.init_from="))
        assert (Path(model) / "model.safetensors").read_text() == f"of step {checkpoint.name[-3:]}"
        assert not (Path(model) / "added_tokens.json").exists()
        return write(child)

    monkeypatch.setattr(watched_task, "start", delete_then_start)
    for step in (100, 200):
        checkpoint = save(step)
        (checkpoint / "hf" / "added_tokens.json").write_text("{}")
        assert score_checkpoint(checkpoint, weights_digest(checkpoint), task_of(write_task()), run).step == step

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError("no hard links here")

        monkeypatch.setattr(os, "link", refuse)


def test_an_edit_of_the_data_does_not_change_scores(
    run: RunFolder, save: Save, write_task: WriteTask, started: list[ChildRun]
) -> None:
    """Catches scores on other rows in one curve, which the next start takes for scores on the rows of before; and a
    disk that does not answer for a moment, taken for an edit."""
    file, checkpoint = write_task(), save(100)
    task, train = task_of(file), file.with_name("train.tsv")
    rows, weights = train.read_text(), weights_digest(checkpoint)
    train.write_text(f"{rows}low\tc\n")
    with pytest.raises(UserError, match=r"toy\.yaml: the data were changed after this watch had begun"):
        score_checkpoint(checkpoint, weights, task, run)
    assert not started
    assert not (run.downstream / "toy").exists()
    train.unlink()
    with pytest.raises(ScoringError, match="cannot read"):
        score_checkpoint(checkpoint, weights, task, run)
    train.write_text(rows)
    assert score_checkpoint(checkpoint, weights, task, run).step == 100


def test_a_damaged_checkpoint_is_not_scored(
    run: RunFolder, save: Save, write_task: WriteTask, started: list[ChildRun]
) -> None:
    """Catches scores of weights that a disk has changed."""
    checkpoint = save(100)
    weights = weights_digest(checkpoint)
    (checkpoint / "hf" / "model.safetensors").write_text("damaged")
    with pytest.raises(ScoringError, match=r"damaged: hf/model\.safetensors has checksum"):
        score_checkpoint(checkpoint, weights, task_of(write_task()), run)
    (checkpoint / "COMPLETE").write_text("[]")
    with pytest.raises(ScoringError, match="damaged: its COMPLETE file lists no checksums"):
        score_checkpoint(checkpoint, "damaged", task_of(write_task()), run)
    assert not started


def test_a_stopped_scoring_resumes(
    run: RunFolder, save: Save, write_task: WriteTask, started: list[ChildRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a restart that trains finished seeds again, and leftovers of other checkpoints that stay forever."""
    checkpoints = [save(100), save(200)]
    folders, resumed = [], []

    def stop(child: ChildRun) -> str:
        resumed.append(child.folder.path.exists())
        child.folder.path.mkdir(parents=True, exist_ok=True)
        folders.append(child.folder.path)
        raise StoppedError

    monkeypatch.setattr(watched_task, "start", stop)
    for checkpoint in (checkpoints[0], checkpoints[0], checkpoints[1]):
        with pytest.raises(StoppedError):
            score_checkpoint(checkpoint, weights_digest(checkpoint), task_of(write_task()), run)
    assert folders[0] == folders[1] != folders[2]
    assert resumed == [False, True, False]
    assert not folders[0].exists()
    assert folders[2].exists()
    with pytest.raises(StoppedError):  # an edited task has nothing to resume
        score_checkpoint(checkpoint, weights_digest(checkpoint), task_of(write_task(training__seeds=[3])), run)
    assert folders[3] != folders[2]


def test_what_failed_is_said(
    run: RunFolder, save: Save, write_task: WriteTask, monkeypatch: pytest.MonkeyPatch, started: list[ChildRun]
) -> None:
    """Catches a traceback for a child that fails, or that has no scores because its split has no labels."""
    checkpoint = save(100)
    monkeypatch.setattr(watched_task, "start", lambda child: "failed (exit code 1)")
    with pytest.raises(ScoringError, match=r"failed \(exit code 1\)"):
        score_checkpoint(checkpoint, weights_digest(checkpoint), task_of(write_task()), run)
    monkeypatch.setattr(watched_task, "start", lambda child: DONE)
    with pytest.raises(ScoringError, match="no scores on validation"):
        score_checkpoint(checkpoint, weights_digest(checkpoint), task_of(write_task()), run)


def test_settings_that_change_scores_identify_a_task(write_task: WriteTask) -> None:
    """Catches scores of other settings in one curve, a curve that a renamed test file ends, and one that an update with
    new keys ends."""
    before = task_of(write_task())
    assert task_of(write_task(training__grad_clip=1.0, training__parallel_seeds=2)) == before
    assert task_of(write_task(training__grad_clip=2.0)).config != before.config
    assert task_of(write_task(model__config={"hidden_dropout_prob": 0.0})).config != before.config
    assert task_of(write_task(task__test=None, run__dir="other", model__init_from="other")) == before
    assert task_of(write_task(training__seeds=[1])).config != before.config
    train = write_task().with_name("train.tsv")
    train.write_text(train.read_text() + "low\tc\n")
    assert task_of(train.with_name("toy.yaml")).config != before.config
    assert task_of(write_task(training__seeds=[1]), probe=True) == task_of(write_task(), probe=True)
    assert task_of(write_task(), probe=True).name == "toy-probe"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__fit_on": "train+validation"}, r"toy\.yaml: training\.fit_on: expected train"),
        ({"task__validation": "/nowhere.tsv"}, r"toy\.yaml: task\.validation: cannot read /nowhere\.tsv: No such file"),
        ({"task__name": "../.."}, r"toy\.yaml: task\.name: expected a name with letters"),
        ({"task__kind": "regression", "task__columns": {"text": "text"}}, "--probe needs a task of kind"),
        ({"training__lr": "fast"}, r"training\.lr"),
    ],
)
def test_mistakes_are_rejected_at_the_start(write_task: WriteTask, changes: dict[str, Any], message: str) -> None:
    """Catches a mistake that shows at the first checkpoint, after hours."""
    with pytest.raises(UserError, match=message):
        task_of(write_task(**changes), probe=True)
