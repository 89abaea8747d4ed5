"""`deepcloze watch` beside a pretraining run."""

import csv
import random
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from experiment.run_files.checkpoints import checkpoint_step, complete_checkpoints
from experiment.run_files.downstream import DownstreamResult, read_results, write_result
from experiment.run_files.metrics_file import read_events
from experiment.run_files.run_folder import RunFolder
from launches import LONG, Start, config_file, wait_for_exit, wait_for_file
from pretrain.rank_process import RankRecorder
from pretrain.world import World
from rank_pool import RankPool
from runs import Tree, pretrain_case, run_config
from waiting import wait_until

KEY = "downstream/toy-probe/accuracy"


def task_file(folder: Path) -> Path:
    for seed, split in enumerate(("train", "validation")):
        draw = random.Random(seed)
        rows = [
            (label, "".join(draw.choices(letters, k=8))) for label, letters in [("low", "abc"), ("high", "xyz")] * 9
        ]
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("label", "text"), *rows])
    task = {split: str(folder / f"{split}.csv") for split in ("train", "validation")}
    tree = {"run": {"dir": "replaced"}, "model": {"init_from": "replaced", "max_seq_length": 16}}
    tree |= {"task": {**task, "columns": {"label": "label", "text": "text"}}, "training": {"precision": "fp32"}}
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _watched_case(world: World, tree: Tree, scores: Mapping[int, float], stop_after: int | None = None) -> str:
    """Run on this rank, with these scores of steps when training begins, and return the outcome."""
    run, begin_training = RunFolder(Path(tree["run"]["dir"])), RankRecorder.begin_training

    def write_and_begin(recorder: RankRecorder) -> None:
        for step, score in scores.items():
            write_result(run, DownstreamResult(step, "toy", "accuracy", False, {"accuracy": score}, "w", "c", 1.0))
        begin_training(recorder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankRecorder, "begin_training", write_and_begin)
        return pretrain_case(world, tree, stop_after)


def test_rank_0_logs_scores(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches scores that are logged by each rank, before their step, twice after a resume, of weights that were
    abandoned, or that change the losses in the file."""
    tree = run_config(tmp_path / "run", wordpiece_corpus)
    run = RunFolder(tmp_path / "run")
    assert pools[2].run(_watched_case, tree, {2: 0.2, 5: 0.9, 6: 0.9}, 3) == ["stopped"] * 2
    assert pools[2].run(_watched_case, tree, {5: 0.5}) == ["done"] * 2
    events = [(event["step"], event.get("downstream/toy/accuracy")) for event in read_events(run.metrics)]
    assert events == [(1, None), (2, None), (2, 0.2), (3, None), (4, None), (5, None), (5, 0.5), (6, None)]


@pytest.mark.soak
def test_a_running_pretraining_is_watched(start: Start, wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches scores that rank 0 does not log, or a stopped run lacks; a wrong exit code; and a checkpoint that is
    scored or logged twice, in spite of retention and of restarts of both."""
    config = config_file(
        tmp_path, wordpiece_corpus, schedule__steps=LONG, checkpoint__every_steps=20, checkpoint__keep_last=2
    )
    run = RunFolder(tmp_path / "run")
    pretrain = (sys.executable, "-m", "launcher", "pretrain", "--config", str(config), "--num_gpus", "1")
    watch = (sys.executable, "-m", "launcher", "watch", str(run.path), "--task", str(task_file(tmp_path)), "--probe")

    def logged() -> list[int]:
        return [event["step"] for event in read_events(run.metrics) if KEY in event]

    training = start(*pretrain)
    wait_for_file(run.config, training)
    watching = start(*watch)
    wait_until(logged, training)  # by rank 0
    run.stop.touch()
    code, output = wait_for_exit(training)
    assert code == 75, output
    last = checkpoint_step(complete_checkpoints(run.checkpoints)[-1])
    wait_until(lambda: last in logged(), watching)  # by watch
    watching.send_signal(signal.SIGTERM)
    code, output = wait_for_exit(watching)
    assert code == 75, output
    assert "Traceback" not in output
    assert f"toy-probe: step {last}: accuracy" in output
    scored = logged()

    watching = start(*watch)
    training = start(*pretrain)
    wait_until(lambda: len(logged()) > len(scored), training)
    run.stop.touch()
    wait_for_exit(training)
    wait_until(lambda: sorted(logged()) == [result.step for result in read_results(run)][: len(logged())], watching)
    watching.send_signal(signal.SIGINT)
    code, output = wait_for_exit(watching)
    assert code == 75, output
    assert not any(f"step {step}: accuracy" in output for step in scored)
    assert max(Counter(logged()).values()) == 1
    losses = [event["step"] for event in read_events(run.metrics) if "loss" in event]
    assert losses == list(range(1, losses[-1] + 1))


@pytest.mark.soak
def test_a_run_that_is_done_is_fine_tuned(start: Start, wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a command for fine-tuning that does not start, and a watch that never ends."""
    config = config_file(tmp_path, wordpiece_corpus, checkpoint__every_steps=3)
    run = RunFolder(tmp_path / "run")
    code, output = wait_for_exit(start(sys.executable, "-m", "launcher", "pretrain", "--config", str(config)))
    assert code == 0, output
    task = task_file(tmp_path)
    code, output = wait_for_exit(start(sys.executable, "-m", "launcher", "watch", str(run.path), "--task", str(task)))
    assert code == 0, output
    assert [result.step for result in read_results(run)] == [3, 6]
    events = [event for event in read_events(run.metrics) if "downstream/toy/accuracy" in event]
    assert [event["step"] for event in events] == [3, 6]
