"""Which checkpoints `deepcloze watch` scores, logs and announces, with a stand-in for scoring."""

import errno
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from experiment.errors import UserError, inform
from experiment.files import write_json, write_text
from experiment.run_files.checkpoints import checkpoint_step
from experiment.run_files.downstream import DownstreamLog, DownstreamResult, drop_results, read_results, write_result
from experiment.run_files.goodput import TRAINING, AttemptTime
from experiment.run_files.metrics_file import JsonlTracker, read_events
from experiment.run_files.outcome_file import Outcome, write_outcome
from experiment.run_files.run_folder import RunFolder, open_run_folder
from experiment.run_files.run_life import Life, read_life
from experiment.run_files.run_lock import lock_run
from experiment.tracking.notification import Message, Service
from finetune.kinds.classification import Config
from launcher.cli import main
from launcher.run_sets.watch import Announcement, Watch, describe_scores
from launcher.run_sets.watched_task import ScoringError, TaskRejectedError, WatchedTask

RESULT = DownstreamResult(100, "toy", "accuracy", False, {"accuracy": 0.9}, "weights", "config", 2.0)
TASK = WatchedTask("toy.yaml", "toy", False, "accuracy", False, "config", Config(), {}, b"")

Save = Callable[..., Path]
End = Callable[..., None]


class Scorer:
    """Scores a checkpoint by its step, and keeps the steps. before: is called with each step first."""

    def __init__(self, before: Callable[[int], object] = lambda step: None) -> None:
        self.steps: list[int] = []
        self._before = before

    def __call__(self, checkpoint: Path, weights: str, task: WatchedTask, run: RunFolder) -> DownstreamResult:
        step = checkpoint_step(checkpoint)
        self.steps.append(step)
        self._before(step)
        return DownstreamResult(step, task.name, task.metric, False, {"accuracy": step / 1000}, weights, "config", 1.0)


def watch(run: RunFolder, scorer: Scorer, *while_idle: Callable[[], object], task: WatchedTask = TASK) -> list[int]:
    """Watch until the run is done. Whenever there is nothing to do, the next of `while_idle` happens."""
    happens = iter(while_idle)
    return Watch(run, task, Announcement(), scorer, lambda: next(happens)()).finish()


def logged(run: RunFolder) -> list[tuple[int, float]]:
    """(step, score) of the events, in their order in the file."""
    key = "downstream/toy/accuracy"
    return [(event["step"], event[key]) for event in read_events(run.metrics) if key in event]


def test_each_complete_checkpoint_is_scored_once(run: RunFolder, save: Save, end: End) -> None:
    """Catches a checkpoint that is scored twice, never, or before its save has finished, and the newest one first."""
    save(100)
    save(200)
    save(300, complete=False)
    scorer = Scorer()
    assert watch(run, scorer, lambda: save(300), end) == []
    assert scorer.steps == [100, 200, 300]
    assert [(result.step, result.value) for result in read_results(run)] == [(100, 0.1), (200, 0.2), (300, 0.3)]
    assert logged(run) == [(100, 0.1), (200, 0.2), (300, 0.3)]
    assert [event["loss"] for event in read_events(run.metrics) if "loss" in event] == [5.0, 4.0]


def test_a_restart_scores_only_what_is_new(run: RunFolder, save: Save, end: End) -> None:
    """Catches a restart that scores everything again, or logs it twice."""
    save(100)
    end()
    watch(run, Scorer())
    save(200)
    scorer = Scorer()
    watch(run, scorer)
    assert scorer.steps == [200]
    assert logged(run) == [(100, 0.1), (200, 0.2)]


def test_other_weights_of_a_step_are_scored(run: RunFolder, save: Save, end: End) -> None:
    """Catches the scores of a run that was rewound shown for the checkpoints that it saves later."""
    save(100)
    scorer = Scorer()
    watch(run, scorer, lambda: save(100, "others"), end)
    assert scorer.steps == [100, 100]
    save(100, "others")  # saved again, the same
    watch(run, scorer)
    assert scorer.steps == [100, 100]


@pytest.mark.parametrize(("errors", "missing"), [(1, []), (4, [100])])
def test_a_checkpoint_that_fails_and_is_saved_again(
    run: RunFolder, save: Save, end: End, errors: int, missing: list[int]
) -> None:
    """Catches a watch that fails for a damaged checkpoint although the run has replaced it, or names it twice."""
    left = iter([ScoringError("damaged")] * errors)

    def fail(_step: int) -> None:
        for error in left:
            raise error

    save(100)
    assert watch(run, Scorer(fail), lambda: save(100, "others"), end) == missing


def test_a_checkpoint_that_is_deleted_is_skipped(
    run: RunFolder, save: Save, end: End, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a watch that ends, or says nothing, because retention deletes what it has not scored yet."""
    paths = [save(step) for step in (100, 200, 300)]

    def delete(step: int) -> None:
        if step == 100:
            shutil.rmtree(paths[1])
        if step == 300:
            shutil.rmtree(paths[2])
            raise FileNotFoundError(paths[2])

    scorer = Scorer(delete)
    assert watch(run, scorer, end) == []
    assert scorer.steps == [100, 300]
    said = capsys.readouterr().err
    for step in (200, 300):
        assert said.count(f"toy: step {step}: skipped: the checkpoint was deleted before it was scored") == 1


def test_a_run_that_ends_while_its_checkpoint_is_scored(run: RunFolder, save: Save, end: End) -> None:
    """Catches the last checkpoint lost because it is saved, and the run ends, while an earlier one is scored."""
    save(100)

    def finish(step: int) -> None:
        if step == 100:
            save(200)
            end()

    scorer = Scorer(finish)
    watch(run, scorer)
    assert scorer.steps == [100, 200]
    assert logged(run) == [(100, 0.1), (200, 0.2)]


def test_failures_are_tried_once_more(run: RunFolder, save: Save, end: End, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a failure that ends the watch, is tried forever, never again, or hidden at the end."""
    save(100)

    def fail(step: int) -> None:
        if step == 100 or scorer.steps.count(step) == 1:
            raise ScoringError("out of memory")

    scorer = Scorer(fail)
    assert watch(run, scorer, lambda: save(200), end) == [100]
    assert scorer.steps == [100, 100, 200, 200]
    assert [result.step for result in read_results(run)] == [200]
    said = capsys.readouterr().err
    assert said.count("step 100: cannot be scored, is tried once more later: out of memory") == 1
    assert said.count("step 100: cannot be scored: out of memory") == 1


def test_a_run_that_resumes_from_an_earlier_step_is_scored_again(
    run: RunFolder, save: Save, end: End, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches the score of a checkpoint that is deleted while it is scored, taken for one of the weights that the run
    trains then; a checkpoint without a score because it has the weights of a deleted one; and the score of a damaged
    checkpoint that the run has skipped."""

    def resume_from_100(step: int) -> None:
        if step == 200 and not resumed:
            resumed.append(step)
            shutil.rmtree(run.checkpoints / "step-00000200")
            write_json(run.provenance, {"run_id": "abc", "attempts": [{"step": 100}], "ancestors": []})
            drop_results(run, 100)

    def resume_without_300() -> None:
        drop_results(run, 200)
        finish_step(200)

    def save_300_again() -> None:
        assert scorer.steps[-1] == 300
        assert scorer.steps.count(300) == 1
        finish_step(300)

    def finish_step(step: int) -> None:
        write_text(run.goodput, json.dumps(asdict(AttemptTime(1.0, 2.0, step, 300, 500, TRAINING, {}))))

    # Another host has continued the run without this attempt.
    write_json(run.provenance, {"run_id": "abc", "attempts": [{"step": 0}], "ancestors": []})
    resumed: list[int] = []
    for step in (100, 200):
        save(step)
    scorer = Scorer(resume_from_100)
    watch(
        run,
        scorer,
        lambda: save(200),
        lambda: save(300),
        resume_without_300,
        save_300_again,
        end,
    )
    assert scorer.steps == [100, 200, 200, 300, 300]
    assert [result.step for result in read_results(run)] == [100, 200, 300]
    assert capsys.readouterr().err.count("step 200: dropped: the run has resumed from an earlier step") == 1


def test_what_is_printed(run: RunFolder, save: Save, end: End, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches the data described again for each checkpoint, a score twice, and an end without the scores."""
    assert describe_scores(run, TASK) == "toy: no checkpoint is scored"
    for step in (100, 200):
        save(step)
    end()
    watch(run, Scorer(lambda step: inform(f"data of step {step}")))
    assert capsys.readouterr().err.splitlines() == [
        "deepcloze: watch: toy: step 100: scoring",
        "deepcloze: data of step 100",
        "deepcloze: watch: toy: step 100: accuracy 0.1000 on validation, 1 s",
        "deepcloze: watch: toy: step 200: scoring",
        "deepcloze: watch: toy: step 200: accuracy 0.2000 on validation, 1 s",
    ]
    assert describe_scores(run, TASK) == (
        "toy: accuracy on validation: best 0.2000 at step 200, last 0.2000 at step 200; scored checkpoints: 2; "
        f"see deepcloze report {run.path}"
    )
    write_result(run, replace(RESULT, collapsed=2))
    assert "best 0.9000 (2 seeds collapsed) at step 100, last 0.2000 at step 200" in describe_scores(run, TASK)


def test_a_run_folder_that_is_gone_ends_the_watch(run: RunFolder, save: Save) -> None:
    """Catches a watch that waits forever for a run that was deleted."""
    with pytest.raises(UserError, match=r"the run folder .*/run is gone"):
        watch(run, Scorer(), lambda: shutil.rmtree(run.path))


def test_a_run_that_is_deleted_while_it_is_scored_is_gone(run: RunFolder, save: Save) -> None:
    """Catches a message about the task, whose model is gone with the run."""
    save(100)

    def delete(_step: int) -> None:
        shutil.rmtree(run.path)
        raise TaskRejectedError("rejected")

    with pytest.raises(UserError, match=r"the run folder .*/run is gone"):
        watch(run, Scorer(delete))


def test_a_stopped_run_is_waited_for(run: RunFolder, save: Save, end: End, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a watch that ends with a run that will resume, scores of it that nobody logs, and a watch that writes
    the metrics of a running one that `deepspeed` has started, which holds no lock."""
    save(100)
    seen: list[list[tuple[int, float]]] = []

    def look() -> None:
        seen.append(logged(run))

    watch(run, Scorer(), look, look, partial(end, Outcome.STOPPED), look, end)
    assert seen == [[], [], [(100, 0.1)]]
    assert [line for line in capsys.readouterr().err.splitlines() if "waiting" in line] == [
        "deepcloze: watch: toy: waiting for checkpoints",
        f"deepcloze: watch: toy: waiting until {run.path} is resumed: it has ended before its last step",
    ]


def test_the_metrics_of_a_run_that_has_not_ended_are_not_read(
    run: RunFolder, save: Save, end: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a long metrics.jsonl that is read every few seconds until a killed run is resumed."""
    read: list[RunFolder] = []

    def read_log(folder: RunFolder) -> DownstreamLog:
        read.append(folder)
        return DownstreamLog(folder)

    def look() -> None:
        assert not read

    monkeypatch.setattr("launcher.run_sets.watch.DownstreamLog", read_log)
    save(100)
    watch(run, Scorer(), look, look, end)
    assert read
    assert logged(run) == [(100, 0.1)]


def test_a_run_that_ends_while_its_results_are_logged(
    run: RunFolder, end: End, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a message that a run is not finished, which has just ended."""

    def log_results(_watch: Watch, _state: str) -> bool:
        end()
        return True

    monkeypatch.setattr(Watch, "_log_results", log_results)
    watch(run, Scorer(), lambda: None)
    assert "resumed" not in capsys.readouterr().err


def test_only_one_process_writes_the_metrics(run: RunFolder, save: Save, end: End) -> None:
    """Catches a watch that replaces metrics.jsonl under a running rank 0, which then writes to a file without name."""
    save(100)
    rank0 = JsonlTracker(run.metrics, resumed_step=200)
    file = run.metrics.stat().st_ino
    downstream = DownstreamLog(run)

    def log_at_step(step: int) -> None:
        assert run.metrics.stat().st_ino == file
        for event in downstream.take_new(step):
            rank0.log(event)

    launcher = ExitStack()
    launcher.enter_context(lock_run(run))
    watch(run, Scorer(), lambda: log_at_step(300), end, launcher.close)
    assert run.metrics.stat().st_ino == file
    assert logged(run) == [(100, 0.1)]


def test_mistakes_are_rejected_at_the_start(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a watch that waits forever in a folder that is no run, and two that score the same checkpoints."""
    monkeypatch.setattr("launcher.run_sets.watch.read_watched_task", lambda file, probe: TASK)
    assert main(["watch", str(tmp_path), "--task", "toy.yaml"]) == 2
    assert "is not a pretraining run that has started: it has no config.yaml" in capsys.readouterr().err
    with lock_run(open_run_folder(run.downstream / "toy")):
        assert main(["watch", str(run.path), "--task", "toy.yaml"]) == 2
    assert f"another deepcloze process is using {run.downstream / 'toy'}" in capsys.readouterr().err


def test_a_rejected_task_ends_the_watch_unless_it_was_scored_before(run: RunFolder, save: Save, end: End) -> None:
    """Catches a mistake in the data that is reported for every checkpoint, twice; and a disk that does not answer for a
    moment, as finetune reports it, which ends a watch of days."""

    def reject(step: int) -> None:
        if step not in accepted:
            accepted.add(step)
            raise TaskRejectedError("rejected (exit code 2)")

    accepted: set[int] = set()
    for step in (100, 200):
        save(step)
    end()
    with pytest.raises(UserError, match=r"toy\.yaml: no checkpoint can be scored on this task"):
        watch(run, scorer := Scorer(reject))
    assert scorer.steps == [100]
    assert watch(run, Scorer(reject)) == []
    assert logged(run) == [(100, 0.1), (200, 0.2)]


def test_a_run_that_could_not_record_the_end_of_a_rank(run: RunFolder, save: Save) -> None:
    """Catches a watch that waits forever for a run that is done, whose disk was full at its end."""
    save(100)
    write_outcome(run, Outcome.DONE)
    watch(run, Scorer())
    assert logged(run) == [(100, 0.1)]


def test_a_disk_that_does_not_answer_for_a_moment(
    run: RunFolder, save: Save, end: End, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a watch of weeks that ends, and the last checkpoint that is not scored."""
    checkpoint = save(100)
    end()
    failures, path_open = [errno.ESTALE, errno.ESTALE], Path.open

    def fail(path: Path, *args: Any, **options: Any) -> Any:
        if path == checkpoint / "COMPLETE" and failures:
            raise OSError(failures[0], os.strerror(failures.pop()), str(path))
        return path_open(path, *args, **options)

    monkeypatch.setattr(Path, "open", fail)
    watch(run, Scorer(), *[lambda: None] * 2)
    assert logged(run) == [(100, 0.1)]
    waiting = f"watch: toy: waiting until the disk answers: {checkpoint}/COMPLETE: Stale file handle"
    assert capsys.readouterr().err.count(waiting) == 1


def test_a_disk_that_does_not_tell_the_state_of_the_run(
    run: RunFolder, save: Save, end: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a watch that ends because the whole run folder was away for a moment."""
    save(100)
    end()
    failures = [errno.EIO, errno.ESTALE]

    def read(folder: RunFolder) -> Life:
        if failures:
            raise OSError(failures.pop(), "gone", str(folder.results))
        return read_life(folder)

    monkeypatch.setattr("launcher.run_sets.watch.read_life", read)
    watch(run, Scorer(), *[lambda: None] * 2)
    assert logged(run) == [(100, 0.1)]


def test_another_config_is_rejected(run: RunFolder, save: Save, end: End) -> None:
    """Catches one curve of scores that were measured differently."""
    save(100)
    end()
    watch(run, Scorer())
    with pytest.raises(UserError, match="has scores of another config"):
        watch(run, Scorer(), task=replace(TASK, config="other"))
    watch(run, Scorer(), task=replace(TASK, config="other", name="toy-2"))


def test_results_that_cannot_be_logged_end_the_watch(run: RunFolder, save: Save, end: End) -> None:
    """Catches a watch that takes a damaged file for a run in use, and waits forever."""
    save(100)
    with pytest.raises(UserError, match=r"provenance\.json"):
        watch(run, Scorer(), lambda: run.provenance.write_text("{"), end)


def test_a_copy_without_provenance_is_rejected(run: RunFolder, save: Save, end: End) -> None:
    """Catches a traceback when the first score is logged."""
    save(100)
    end(Outcome.DONE)
    run.provenance.unlink()
    with pytest.raises(UserError, match=r"has no provenance\.json: it may be a copy that is not complete"):
        watch(run, Scorer())


def test_scores_reach_the_trackers_after_a_failed_run(run: RunFolder, save: Save, end: End) -> None:
    """Catches an outcome file that is missing or says that the run failed, which keeps its scores from the curve."""
    save(100)
    end(Outcome.FAILED)
    watch(run, Scorer(), end)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert lines[-1] == {"step": 100, "downstream/toy/accuracy": 0.1}
    assert DownstreamLog(run).take_new(sys.maxsize) == []


def test_scores_reach_the_trackers_of_the_last_attempt(run: RunFolder, save: Save, end: End) -> None:
    """Catches scores that are logged as the config said when the watch began."""

    def resume_with_tensorboard() -> None:
        run.config.write_text(f"{run.config.read_text()}\ntracking: {{tensorboard: true}}\n")
        end()

    save(100)
    assert watch(run, Scorer(), resume_with_tensorboard) == []
    assert list(run.tensorboard.iterdir())


def test_a_config_of_a_later_version(run: RunFolder, save: Save, end: End, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a watch that ends without the last scores because the run has resumed with an unknown key."""

    def resume_with_later_version() -> None:
        run.config.write_text(f"{run.config.read_text()}\nlater_key: 1\n")
        end()

    save(100)
    assert watch(run, Scorer(), resume_with_later_version) == []
    assert logged(run) == [(100, 0.1)]
    assert "later_key" in (said := capsys.readouterr().err)
    assert "the scores are logged as configured before" in said


def test_the_command_gets_the_result(run: RunFolder, tmp_path: Path) -> None:
    """Catches a command that is started without its input, or not by a shell."""
    Announcement(f"cat > {shlex.quote(str(tmp_path / 'result.json'))}").send(run, RESULT)
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["run"], found["task"], found["step"]) == (str(run.path), "toy", 100)
    assert found["metrics"] == {"accuracy": 0.9}


@pytest.mark.parametrize("command", ["exit 3", f"{shlex.quote(sys.executable)} -c 'raise SystemExit(3)'"])
def test_a_command_that_fails_is_a_warning(run: RunFolder, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a watch that ends because a command does not read its input, or fails."""
    Announcement(command).send(run, RESULT)
    assert f"warning: --on_result failed with exit code 3: {command}" in capsys.readouterr().err


def test_mail_says_what_was_scored(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches mail without the score in its subject, and a watch that ends because mail cannot be sent."""
    sent: list[Message] = []
    Announcement(mail=(Service("mail", sent.append), "me@home.example")).send(run, RESULT)
    assert sent[0].title == "run: toy accuracy 0.9000 at step 100"
    assert '"accuracy": 0.9' in sent[0].text

    def fail(message: Message) -> None:
        raise ConnectionRefusedError("refused")

    Announcement(mail=(Service("mail", fail), "me@home.example")).send(run, RESULT)
    assert "warning: cannot send mail to me@home.example: refused" in capsys.readouterr().err

    def fail_at_login(message: Message) -> None:
        "pass\u00e4".encode("ascii")

    Announcement(mail=(Service("mail", fail_at_login), "me@home.example")).send(run, RESULT)
    assert "warning: cannot send mail to me@home.example: UnicodeEncodeError\n" in capsys.readouterr().err


def test_mail_needs_a_server(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a mistake that shows at the first result."""
    monkeypatch.delenv("DEEPCLOZE_SMTP_HOST", raising=False)
    assert main(["watch", str(run.path), "--task", "toy.yaml", "--mail", "me@home.example"]) == 2
    assert "DEEPCLOZE_SMTP_HOST" in capsys.readouterr().err
