import errno
import json
import os
from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.run_files.checkpoints import mark_complete
from finetune.kinds.classification import Config, Kind
from finetune.prediction import saved_task
from finetune.prediction.saved_task import SavedTask, find_model, read_saved_task, write_saved_task


def run_with(folder: Path, values: list[float], kept: list[int]) -> Path:
    """A run with seeds 1, 2, … and these accuracies on validation. kept: the seeds that have a model."""
    for seed in kept:
        (folder / f"seed-{seed}" / "model").mkdir(parents=True)
        (folder / f"seed-{seed}" / "model" / "config.json").touch()
    results = {
        "kind": "classification",
        "metric": "accuracy",
        "seeds": list(range(1, len(values) + 1)),
        "splits": {"validation": {"accuracy": {"values": values}}},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_the_best_seed_that_has_a_model(tmp_path: Path) -> None:
    """Catches a seed whose model was not kept, and the last of equals."""
    folder, description = find_model(run_with(tmp_path, [0.5, 0.7, 0.9, 0.7], kept=[1, 2, 4]))
    assert folder == tmp_path / "seed-2" / "model"
    assert description.endswith("(best of 4 seeds: accuracy 0.7000 on validation)")


def test_the_best_may_be_the_lowest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the worst seed being chosen by a metric of which less is better."""
    monkeypatch.setattr(Kind, "lower_is_better", ("accuracy",))
    assert find_model(run_with(tmp_path, [0.5, 0.7], kept=[1, 2]))[0] == tmp_path / "seed-1" / "model"


def test_a_run_without_models_is_a_user_error(tmp_path: Path) -> None:
    """Catches a traceback for a run that kept only its scores, or whose results are damaged."""
    with pytest.raises(UserError, match="has kept no model of its seeds"):
        find_model(run_with(tmp_path, [0.5], kept=[]))
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match=r"results\.json is damaged"):
        find_model(tmp_path)


def test_files_that_may_not_be_read_are_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a model that is trained again because it belongs to another user."""

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(saved_task, "read_json", refuse)
    with pytest.raises(UserError, match=r"deepcloze_task\.json cannot be read: Permission denied$"):
        read_saved_task(tmp_path)
    with pytest.raises(UserError, match=r"results\.json cannot be read: Permission denied$"):
        find_model(run_with(tmp_path, [0.5], kept=[1]))


@pytest.mark.parametrize("content", ["", '{"settings": {"task', "[]", "null"])
def test_a_seed_whose_complete_file_is_damaged_is_rejected(tmp_path: Path, content: str) -> None:
    """Catches a seed that is used although its folder was copied only in part."""
    seed = run_with(tmp_path, [0.5], kept=[1]) / "seed-1"
    (seed / "COMPLETE").write_text('{"settings": {}}')
    for path in (tmp_path, seed, seed / "model"):
        assert find_model(path)[0] == seed / "model"
    (seed / "COMPLETE").write_text(content)
    for path in (tmp_path, seed, seed / "model"):
        with pytest.raises(UserError, match=r"seed-1 is damaged: its COMPLETE file"):
            find_model(path)


def test_a_damaged_checkpoint_is_rejected(tmp_path: Path) -> None:
    """Catches weights of a pretraining run that are served without being verified."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    mark_complete(tmp_path)
    assert find_model(tmp_path / "hf")[0] == tmp_path / "hf"
    (tmp_path / "hf" / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"is damaged: hf/config\.json has checksum"):
        find_model(tmp_path / "hf")


def test_a_pretraining_run_or_a_checkpoint(tmp_path: Path) -> None:
    """Catches a server that refuses what `deepcloze evaluate` accepts, and an older checkpoint than the newest."""
    for step in (2, 4):
        checkpoint = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        (checkpoint / "hf").mkdir(parents=True)
        (checkpoint / "hf" / "config.json").write_text('{"architectures": ["BertForMaskedLM"], "model_type": "bert"}')
        mark_complete(checkpoint)
    for path in (tmp_path / "run", checkpoint, checkpoint / "hf"):
        assert find_model(path) == (checkpoint / "hf", str(checkpoint / "hf"))
    with pytest.raises(
        UserError, match=r"step-00000004/hf is a masked language model \(architecture: BertForMaskedLM\)"
    ):
        read_saved_task(checkpoint / "hf")


def test_a_task_is_written_again(tmp_path: Path) -> None:
    """Catches a folder that is called damaged because a run that was killed after an evaluation wrote it twice."""
    for length in (8, 16):
        write_saved_task(tmp_path, SavedTask(Kind(Config(train="f.csv"), ("a", "b")), length, padded=False))
    assert read_saved_task(tmp_path).max_seq_length == 16
