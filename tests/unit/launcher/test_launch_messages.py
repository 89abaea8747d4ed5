import json
import shutil
from pathlib import Path

import pytest

from experiment.run_files.checkpoints import checkpoint_path, completed_saves, mark_complete, write_best
from experiment.run_files.goodput import ActivityTimer
from experiment.run_files.run_folder import RunFolder, open_run_folder
from launcher.hosts.hostfile import Slots
from launcher.launch_messages import announce_checks, announce_done, announce_failure, announce_stop, has_diverged


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with a checkpoint of step 1,200."""
    folder = open_run_folder(str(tmp_path / "run"))
    checkpoint = checkpoint_path(folder.checkpoints, 1200)
    (checkpoint / "hf").mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    mark_complete(checkpoint)
    folder.metrics.write_text(
        '{"step": 1199, "loss": 3.0}\n{"step": 1200, "loss": 2.5}\n{"step": 1200, "eval/a/loss": 2}\n'
    )
    return folder


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"localhost": (0,)}, "checking my.yaml for 1 rank on this machine"),
        ({"localhost": (0, 1)}, "checking my.yaml for 2 ranks on this machine"),
        ({"192.0.2.1": (0, 1)}, "checking my.yaml for 2 ranks on 1 host"),
        ({"192.0.2.1": (0, 1), "192.0.2.2": (0,)}, "checking my.yaml for 3 ranks on 2 hosts"),
    ],
)
def test_a_launch_says_what_it_checks(slots: Slots, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    announce_checks("my.yaml", slots)
    assert capsys.readouterr().err == f"deepcloze: {message}\n"


def test_a_finished_run_says_where_its_model_is(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a run that ends without a message, and a loss of an earlier step."""
    announce_done(run, set(), seconds=75)
    printed = capsys.readouterr().err
    assert "deepcloze: done: 1,200 steps, loss 2.5000, 1m15s in this launch\n" in printed
    assert f"model: {run.checkpoints}/step-00001200/hf\n" in printed
    assert f"deepcloze finetune --config TASK --model.init_from={run.path}\n" in printed


def test_a_finished_run_names_its_best_checkpoint(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an overfitted model that is recommended after early stopping."""
    shutil.copytree(checkpoint_path(run.checkpoints, 1200), checkpoint_path(run.checkpoints, 900))
    write_best(run.checkpoints, 900)
    announce_done(run, set(), seconds=75)
    printed = capsys.readouterr().err
    assert f"model: {run.checkpoints}/step-00000900/hf\n" in printed
    assert f"deepcloze finetune --config TASK --model.init_from={run.checkpoints}/best\n" in printed


def test_a_run_whose_loss_has_risen_says_what_to_change(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches the advice to fine-tune a model that has diverged."""
    run.metrics.write_text('{"step": 10, "loss": 8.9}\n{"step": 20, "loss": 7.0}\n{"step": 1200, "loss": 20000.0}\n')
    announce_done(run, set(), seconds=75)
    printed = capsys.readouterr().err
    risen = "the loss has risen from 8.9000 to as much as 20000.0000"
    assert f"{risen}: lower optimizer.lr, and start in a new run.dir" in printed
    assert "finetune" not in printed


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([5.28, 30, 86.4, 20, 8, 5.9, 5.7, 5.6, 5.4, 5.37], True),  # with a learning rate of 1
        ([5.28, 6.3, 5.9, 5.0, 4.9, 4.8], False),  # of 0.1
        ([4.757, 5.067, 4.66, 4.7, 4.771], False),  # continued with small batches
        ([2.0, 3.5, 2.1, 1.9], False),
        ([2.0], False),
        ([], False),
    ],
)
def test_a_diverged_run_is_told_from_a_noisy_one(losses: list[float], diverged: bool) -> None:
    """Catches a run that has forgotten all, and ends not far above the loss of its random weights; and an alarm for
    noise."""
    assert has_diverged(losses) is diverged


def test_a_run_that_was_finished_says_so(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a launch that seems to have trained, and a run that stopped early without the key to continue it."""
    announce_done(run, completed_saves(run.checkpoints) or set(), seconds=9)
    printed = capsys.readouterr().err
    assert printed.startswith(f"deepcloze: {run.path} was finished already, at step 1,200; ")
    assert "`schedule`" in printed
    assert "`evaluation.patience`" in printed
    assert "done" not in printed


def test_a_damaged_checkpoint_that_is_trained_again_does_not_count(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a launch that has trained, and says nothing of it or that the run was finished."""
    before = completed_saves(run.checkpoints) or set()
    shutil.copytree(checkpoint_path(run.checkpoints, 1200), earlier := checkpoint_path(run.checkpoints, 1190))
    mark_complete(earlier)
    announce_stop(run, before)
    assert capsys.readouterr().err.startswith("deepcloze: stopped at step 1,190, saved")
    announce_done(run, before, seconds=9)  # as the config is shorter now
    assert capsys.readouterr().err.startswith("deepcloze: done: 1,190 steps")
    mark_complete(checkpoint_path(run.checkpoints, 1200))
    announce_done(run, before, seconds=9)
    assert capsys.readouterr().err.startswith("deepcloze: done: 1,200 steps")


def test_a_stopped_run_says_what_it_has_saved(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches the step of an earlier launch."""
    announce_stop(run, set())
    assert capsys.readouterr().err == "deepcloze: stopped at step 1,200, saved\n"
    announce_stop(run, completed_saves(run.checkpoints) or set())
    assert capsys.readouterr().err == ""


def test_a_stopped_run_says_what_it_could_not_save(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches steps that a full disk has cost, of which nothing is said."""
    with run.metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 1250, "loss": 2.0}) + "\n")
    announce_stop(run, set())
    assert capsys.readouterr().err == (
        "deepcloze: stopped at step 1,200, saved; step 1,250 was reached, but could not be saved\n"
    )


def test_a_failed_run_says_where_it_would_resume(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a failure after which nobody knows how much is lost, and what to look at; and the step of a damaged
    checkpoint."""
    announce_failure(run)
    assert capsys.readouterr().err == (
        f"deepcloze: the newest checkpoint is of step 1,200: the same command resumes from it; logs: {run.path}/logs\n"
    )
    shutil.copytree(checkpoint_path(run.checkpoints, 1200), checkpoint_path(run.checkpoints, 1190))
    ActivityTimer(0.0).open(run, step=1190, total_steps=None)  # the other one is damaged
    announce_failure(run)
    assert "the newest checkpoint is of step 1,190: " in capsys.readouterr().err
    announce_failure(open_run_folder(str(tmp_path / "other")))
    assert capsys.readouterr().err == f"deepcloze: no checkpoint was saved; logs: {tmp_path}/other/logs\n"
