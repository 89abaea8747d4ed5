import csv
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from experiment.errors import StoppedError, UserError
from experiment.progress import quiet
from experiment.run_files.checkpoints import checkpoint_path, mark_complete, write_best
from experiment.run_files.outcome_file import Outcome
from experiment.tracking.tracker import Trackers
from finetune import run as run_module
from finetune import seed_run
from finetune.kinds.classification import Kind
from finetune.prediction.predictor import Predictor
from finetune.prediction.saved_task import read_saved_task
from finetune.resolve import ResolvedRun, load_run_config
from finetune.results.seed_summary import SeedRecord
from finetune.run import finetune
from finetune.training.fit import Fitted, Log, fit
from hub_server import HubServer, use_hub_for_data
from launcher.cli import main
from launcher.status import RunStatus, read_status

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("no_figures")


def results(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "results.json").read_text()))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_what_it_promises(
    config_file: Path,
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a file or key that scripts rely on being renamed or lost, and predictions that contradict the scores."""
    monkeypatch.undo()  # of `no_figures`
    finetune(config_file, {"training.epochs": "3"})
    run = tmp_path / "run"
    found = results(run)
    assert (found["task"], found["init"], found["metric"]) == ("toy", str(encoder), "macro_f1")
    assert found["labels"] == ["high", "low"]
    assert set(found["splits"]) == {"validation", "test"}
    for scores in found["splits"].values():
        assert set(scores) == {"accuracy", "macro_f1", "weighted_f1", "uar", "matthews"}
        for score in scores.values():
            assert set(score) == {"values", "mean", "std", "median"}
            assert len(score["values"]) == 2
    for picture in ("confusion.png", "curves.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    for place, seed in enumerate((1, 2)):
        rows = read_csv(run / f"seed-{seed}" / "predictions-test.csv")
        assert list(rows[0]) == ["row", "text", "label", "predicted", "probability_high", "probability_low"]
        assert [row["row"] for row in rows] == [str(number) for number in range(1, 21)]
        right = sum(row["label"] == row["predicted"] for row in rows) / len(rows)
        assert right == pytest.approx(found["splits"]["test"]["accuracy"]["values"][place])
        epochs = read_csv(run / f"seed-{seed}" / "epochs.csv")
        best = max(float(row["macro_f1"]) for row in epochs)
        assert best == pytest.approx(found["splits"]["validation"]["macro_f1"]["values"][place])
    assert found["splits"]["test"]["accuracy"]["mean"] > 0.9
    captured = capsys.readouterr()
    assert "macro_f1 *" in captured.out
    assert f"next: deepcloze predict --model {tmp_path}/run --input" in captured.err


def test_the_status_while_seeds_are_trained(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a running fine-tuning without its total steps, time left and attempts, also one that was stopped."""
    found: list[RunStatus] = []
    train = run_module.train_seed

    def observed(seed: int, run: ResolvedRun, log: Log) -> SeedRecord:
        def observe(step: int, metrics: Mapping[str, Any]) -> None:
            log(step, metrics)
            found.append(read_status(str(run.folder.path)))
            if len(found) == 3:
                raise KeyboardInterrupt

        return train(seed, run, observe)

    monkeypatch.setattr(run_module, "train_seed", observed)
    with pytest.raises(StoppedError):
        finetune(config_file, {"training.steps": "4"})
    finetune(config_file, {"training.steps": "4"})
    assert {(status.state, status.total_steps) for status in found} == {("running", 8)}
    assert [status.attempts for status in found[2:4]] == [1, 2]
    assert [status.step for status in found[2:4]] == [3, 4]
    assert all(status.seconds_left is not None for status in found)
    assert (found[-1].step, found[-1].seconds_left) == (8, 0.0)


def test_the_trackers_are_closed_when_there_are_scores(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a report in W&B without scores, and an alert of a finished run that cannot write its results."""
    closed: list[tuple[Outcome, bool]] = []

    def close(tracker: Trackers, outcome: Outcome) -> None:
        closed.append((outcome, (config_file.parent / "run" / "results.json").exists()))

    monkeypatch.setattr(Trackers, "close", close)
    finetune(config_file, {"training.epochs": "1", "training.seeds": "[1]"})
    assert closed == [(Outcome.DONE, True)]


def test_the_scores_of_a_run_reach_the_trackers(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches runs that cannot be compared in W&B, whose summary has the last evaluation of the last seed only."""
    summaries: list[dict[str, float]] = []
    monkeypatch.setattr(Trackers, "summarize", lambda _, scores: summaries.append(scores))
    finetune(config_file, {"training.epochs": "1", "training.seeds": "[1]"})
    finetune(config_file, {"training.epochs": "1", "training.seeds": "[1, 2]"})
    test = results(tmp_path / "run")["splits"]["test"]["macro_f1"]
    first, both = summaries
    assert list(first) == ["validation/macro_f1", "test/macro_f1"]
    assert first["test/macro_f1"] == test["values"][0]
    assert (both["test/macro_f1"], both["test/macro_f1_std"]) == (test["mean"], test["std"])


def test_seeds_are_curves_of_their_own_in_tensorboard(config_file: Path, tmp_path: Path) -> None:
    """Catches steps of a seed in TensorBoard that are not those of its epochs.csv, and a finished seed that is lost
    when another is added."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = {"tracking.tensorboard": "true", "training.epochs": "2"}
    for seeds in ("[1]", "[1, 2]"):
        finetune(config_file, {**flags, "training.seeds": seeds})
    for seed in (1, 2):
        accumulator = EventAccumulator(str(tmp_path / "run" / "tensorboard" / f"seed-{seed}")).Reload()
        steps = [event.step for event in accumulator.Scalars("eval/validation/macro_f1")]
        assert steps == [int(row["steps"]) for row in read_csv(tmp_path / "run" / f"seed-{seed}" / "epochs.csv")]
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(event["step"] for event in events) == 2 * steps[-1]


def test_the_model_folder_gives_the_predictions_without_our_code(trained_run: Path) -> None:
    """Catches a saved model that is not the one that was scored, lacks its tokenizer, or has lost the label names."""
    folder = trained_run / "seed-1"
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.model_max_length == 64
    for row in read_csv(folder / "predictions-test.csv")[:5]:
        with torch.inference_mode():
            probabilities = model(**tokenizer(row["text"], return_tensors="pt")).logits.softmax(-1)[0]
        assert model.config.id2label[int(probabilities.argmax())] == row["predicted"]
        assert probabilities[0].item() == pytest.approx(float(row["probability_high"]), abs=1e-4)


def test_the_pipeline_of_the_docs_works_for_long_texts(trained_run: Path) -> None:
    """Catches a saved tokenizer without a length limit: a long text then needs more positions than the model has."""
    docs = (Path(__file__).parents[3] / "docs" / "finetuning.md").read_text(encoding="utf-8")
    line = next(line.strip() for line in docs.splitlines() if line.strip().startswith("transformers.pipeline("))
    classify = eval(line.replace("RUN/seed-42", str(trained_run / "seed-1")), {"transformers": transformers})
    (found,) = classify("word1 " * 2000)
    assert found["label"] in ("high", "low")


def test_a_collapsed_seed_is_reported(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a seed that predicts one label for everything and lowers the mean unnoticed."""
    finetune(config_file, {"training.seeds": "[1]"})
    answer = {"label": "low", "probabilities": {"high": 0.1, "low": 0.9}}
    monkeypatch.setattr(Kind, "decode", lambda *_: answer)
    finetune(config_file)
    assert results(tmp_path / "run")["collapsed"] == {"2": ["validation", "test"]}
    captured = capsys.readouterr()
    assert "seed 2 has collapsed: it predicts the same for every row of validation, test; " in captured.err
    assert "1 of 2 seeds collapsed (2)" in captured.out
    assert "next: deepcloze predict" in captured.err


@pytest.mark.parametrize(
    ("gpus", "seeds", "parallel", "mentioned"), [(8, 3, 1, True), (1, 3, 1, False), (8, 1, 1, False), (8, 3, 2, False)]
)
def test_gpus_that_are_not_used_are_mentioned(
    monkeypatch: pytest.MonkeyPatch, gpus: int, seeds: int, parallel: int, mentioned: bool
) -> None:
    """Catches a run of many seeds on one of eight GPUs that takes eight times as long as it needs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    resolved: Any = SimpleNamespace(training=SimpleNamespace(parallel_seeds=parallel))
    line = "using 1 of 8 GPUs: see training.parallel_seeds"
    assert run_module._describe_gpus(range(seeds), resolved) == ([line] if mentioned else [])


def test_warnings_are_not_quiet(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches oddities of the data and collapsed seeds that --quiet hides, and other lines that it does not."""
    monkeypatch.setattr(Kind, "decode", lambda *_: {"label": "low", "probabilities": {"high": 0.1, "low": 0.9}})
    overrides = {"training.seeds": "[1]", "training.epochs": "1", "training.lr": "2"}
    for warnings in (True, False):
        with quiet(warnings):
            finetune(config_file, {**overrides, "run.dir": str(config_file.parent / f"run-{warnings}")})
        found = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]
        assert found == (["toy", "seed 1 has collapsed"] if warnings else [])


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        ({}, "usual values of training.lr are in docs/finetuning.md"),
        ({"model.weights": "random"}, "usual values of training.lr are in docs/finetuning.md"),
        (
            {"training.epochs": "4", "training.patience": "1"},
            r"usual values .*, and training\.patience stopped it at step \d+ of \d+$",
        ),
    ],
)
def test_what_to_change_after_a_collapse(
    config_file: Path,
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: dict[str, str],
    advice: str,
) -> None:
    """Catches a collapse without advice, and the advice to predict with a model that predicts one label; and a table in
    which the untrained baseline carries the pretrained model's name."""
    monkeypatch.setattr(Kind, "decode", lambda *_: {"label": "low", "probabilities": {"high": 0.1, "low": 0.9}})
    finetune(config_file, {"training.seeds": "[1]", "training.epochs": "1"} | overrides)
    error = capsys.readouterr().err
    assert re.search(f"seed 1 has collapsed: .*; {advice}", error, re.MULTILINE)
    assert "next:" not in error
    assert results(tmp_path / "run")["init"] == ("random" if "model.weights" in overrides else str(encoder))


def test_a_collapse_on_a_test_split_alone_is_no_failure(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a good model that is not said to be ready, because it gives the few rows of a test split one label."""
    monkeypatch.setattr(Kind, "is_collapsed", lambda _, records, __: "/test." in records[0].place)
    finetune(config_file, {"training.seeds": "[1]", "training.epochs": "1"})
    assert results(tmp_path / "run")["collapsed"] == {"1": ["test"]}
    assert "next: deepcloze predict" in capsys.readouterr().err


def test_an_unusual_learning_rate_is_named(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a misplaced decimal point that is found when all seeds have collapsed."""
    finetune(config_file, {"training.lr": "5"}, dry_run=True)
    assert "training.lr is 5: usual learning rates are 1e-5 to 1e-3" in capsys.readouterr().err


def test_a_warmup_that_does_not_end_is_named(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches training that never reaches its learning rate, because a short task has the warmup of a long one."""
    for warmup, said in (("7", True), ("6", False)):
        finetune(config_file, {"training.steps": "7", "training.warmup_steps": warmup}, dry_run=True)
        error = capsys.readouterr().err
        assert ("training.warmup_steps is 7, but each seed has only 7 steps" in error) == said


def test_a_small_validation_split_is_named(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches epochs that are chosen by a few rows in silence, and a warning about a file that the user has chosen."""
    warning = "validation: only 8 rows of train, so that chance decides which epoch is best"
    for overrides, said in (({"task.validation": "null"}, True), ({}, False)):
        finetune(config_file, overrides, dry_run=True)
        assert (warning in capsys.readouterr().err) == said
    finetune(config_file, {"task.validation": "null", "training.fit_on": "train+validation"}, dry_run=True)
    assert "only" not in capsys.readouterr().err


def test_what_is_told_after_training(trained_run: Path) -> None:
    """Catches scores of labels, mistakes and calibration that contradict the predictions, or are lost."""
    found = results(trained_run)
    rows = [read_csv(trained_run / f"seed-{seed}" / "predictions-test.csv") for seed in (1, 2)]
    scores = found["label_scores"]["test"]["high"]
    right = [sum(row["label"] == row["predicted"] == "high" for row in of_seed) for of_seed in rows]
    assert scores["support"] == sum(row["label"] == "high" for row in rows[0])
    assert scores["recall"]["values"] == pytest.approx([count / scores["support"] for count in right])
    mistakes = sum(row["label"] != row["predicted"] for of_seed in rows for row in of_seed)
    assert sum(confusion["count"] for confusion in found["confusions"]["test"]) == mistakes
    assert set(found["calibration"]) == {"validation", "test"}
    assert set(found["calibration"]["test"]) == {"ece", "calibrated_ece"}
    assert len(found["temperatures"]) == 2


def test_the_worst_rows_are_listed(trained_run: Path) -> None:
    """Catches the best rows instead of the worst, and row numbers that do not refer to the predictions file."""
    worst = read_csv(trained_run / "seed-1" / "worst-test.csv")
    rows = {row["row"]: row for row in read_csv(trained_run / "seed-1" / "predictions-test.csv")}
    assert len(worst) == 20
    losses = [-math.log(max(float(row[f"probability_{row['label']}"]), 1e-6)) for row in worst]
    assert [float(row["loss"]) for row in worst] == pytest.approx(losses, abs=0.01)
    assert losses == sorted(losses, reverse=True)
    assert all({**rows[row["row"]], "loss": row["loss"]} == row for row in worst)


def test_the_epochs_are_printed(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a training that shows no loss, score and time of its epochs together; and with one seed "± 0.0000", which
    claims that the seeds agree."""
    finetune(config_file, {"training.seeds": "[1]", "training.epochs": "2"})
    captured = capsys.readouterr()
    *_, first, second, done, following = (line.split()[:2] for line in captured.err.splitlines())
    assert [first, second, following] == [["1", "5"], ["2", "10"], ["next:", "deepcloze"]]
    assert done[0] == "done:"
    assert "calibration error on test: 0." in captured.out
    assert results(tmp_path / "run")["splits"]["test"]["accuracy"]["std"] is None
    assert re.search(r"accuracy +│ +\d\.\d{4} │", captured.out)
    assert "±" not in captured.out


def test_the_model_of_each_evaluation_can_be_kept(config_file: Path, tmp_path: Path) -> None:
    """Catches weights of another evaluation, and folders that cannot predict."""
    seed = tmp_path / "run" / "seed-1"
    finetune(config_file, {"run.keep": "all", "training.epochs": "3", "training.seeds": "[1]"})
    folders = sorted((seed / "evaluations").iterdir())
    assert [folder.name for folder in folders] == ["step-00000005", "step-00000010", "step-00000015"]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    best = json.loads((seed / "COMPLETE").read_text())["best_epoch"]
    kept = load_file(seed / "model" / "model.safetensors")
    equal = [all(torch.equal(each[name], kept[name]) for name in kept) for each in weights]
    assert equal == [number == best for number in (1, 2, 3)]
    assert Predictor.load(folders[0]).predict([{"text": "word1 word2"}])


def test_models_need_not_be_kept(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches model folders that fill the disk despite run.keep: none, and scores that are lost with them; and a later
    wish to keep the models that is silently not granted."""
    finetune(config_file, {"run.keep": "none", "training.epochs": "1"})
    names = sorted(path.name for path in (tmp_path / "run" / "seed-1").iterdir())
    kinds = ("predictions-{}.csv", "predictions-{}.jsonl", "worst-{}.csv")
    files = [kind.format(split) for kind in kinds for split in ("test", "validation")]
    assert names == sorted(["COMPLETE", "epochs.csv", *files])
    assert len(results(tmp_path / "run")["splits"]["test"]["accuracy"]["values"]) == 2
    finetune(config_file, {"training.epochs": "1"})
    said = " ".join(capsys.readouterr().err.split())
    assert "finished without a model: seed-1, seed-2; remove these folders to train and keep one" in said


def test_a_dry_run_starts_nothing(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a dry run that trains, leaves a folder, or does not show what would be done."""
    assert main(["finetune", "--config", str(config_file), "--dry_run", "--training.lr=0.5"]) == 0
    captured = capsys.readouterr()
    assert not (tmp_path / "run").exists()
    assert "lr: 0.5" in captured.out
    assert "10 updates of 16 examples for each of 2 seeds" in captured.out
    for line in ("80 train, 20 validation, 20 test", "bert, 13,282 parameters", "2 labels, in train"):
        assert line in captured.err


def test_label_smoothing_is_refused_by_kinds_without_it(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a setting that is ignored silently."""
    monkeypatch.setattr(Kind, "smooths_labels", False)
    with pytest.raises(UserError, match=r"training\.label_smoothing: tasks of kind 'classification' have no use"):
        finetune(config_file, {"training.label_smoothing": "0.1"})


def test_class_weights_are_refused_by_kinds_without_them(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a mistake that is found only when all splits are tokenized, which may take minutes."""
    monkeypatch.setattr(Kind, "weights_labels", False)
    monkeypatch.delattr("finetune.prepared_task.encode_split")
    with pytest.raises(UserError, match=r"training\.class_weights: tasks of kind 'classification' have no classes"):
        finetune(config_file, {"training.class_weights": "balanced"})


def test_the_resolved_config_starts_the_same_run(
    config_file: Path, tmp_path: Path, seeds_trained: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches relative paths or a lost task name in RUN/config.yaml, which make it another run."""
    relative = {"run.dir": "run", "training.seeds": "[1]", "training.epochs": "1", "task.train": "train.tsv"}
    monkeypatch.chdir(tmp_path)
    finetune(config_file, relative)
    before = results(tmp_path / "run")
    monkeypatch.chdir("/")
    finetune(tmp_path / "run" / "config.yaml")
    assert seeds_trained == [1]
    assert results(tmp_path / "run") == before


def test_an_unlabelled_test_split_is_only_predicted(
    config_file: Path, tmp_path: Path, task_files: dict[str, str]
) -> None:
    """Catches scores without labels, and an unlabelled test split that stops the run."""
    path = Path(task_files["test"])
    path.write_text("text\n" + "\n".join(row["text"] for row in csv.DictReader(path.open(), delimiter="\t")) + "\n")
    finetune(config_file, {"training.seeds": "[1]", "training.epochs": "1"})
    rows = read_csv(tmp_path / "run" / "seed-1" / "predictions-test.csv")
    assert list(rows[0]) == ["row", "text", "predicted", "probability_high", "probability_low"]
    assert len(rows) == 20
    assert set(results(tmp_path / "run")["splits"]) == {"validation"}


def test_texts_are_cut_at_their_end(
    config_file: Path, tmp_path: Path, encoder: Path, task_files: dict[str, str]
) -> None:
    """Catches texts without their beginning, in training or in prediction with the saved model, because the model was
    fine-tuned on dialogues before."""
    start = Path(shutil.copytree(encoder, tmp_path / "start"))
    (start / "tokenizer_config.json").write_text('{"truncation_side": "left"}')
    beginning = "word1 " * 14
    texts = [beginning, f"{beginning}{'word39 ' * 20}"]
    Path(task_files["test"]).write_text("\n".join(["text", *texts]) + "\n")
    finetune(config_file, {"model.init_from": str(start), "training.seeds": "[1]", "training.epochs": "1"})
    whole, cut = read_csv(tmp_path / "run" / "seed-1" / "predictions-test.csv")
    assert whole["probability_low"] == cut["probability_low"]
    predictor = Predictor.load(tmp_path / "run" / "seed-1" / "model", precision="fp32")
    expected, found = predictor.predict([{"text": text} for text in texts])
    assert expected == found


def test_dialogues_keep_their_last_turn(config_file: Path, tmp_path: Path, task_files: dict[str, str]) -> None:
    """Catches a long context that pushes the text itself out, in training or in prediction with the saved model."""
    lines = Path(task_files["train"]).read_text().splitlines()
    Path(task_files["train"]).write_text("\n".join([f"{lines[0]}\tgroup", *(f"{line}\t0" for line in lines[1:])]))
    overrides = {"task.validation": "null", "task.test": "null", "task.special_tokens_in_text": "true"}
    overrides |= {"task.dialogue": "{group: group, turns: 20}", "task.validation_share": "0.5"}
    with pytest.raises(UserError, match=r"only 1 dialogue \(task\.dialogue\.group\) for 80 rows, too few"):
        finetune(config_file, overrides)
    overrides |= {"task.validation": task_files["train"]}
    finetune(config_file, {**overrides, "training.seeds": "[1]", "training.epochs": "1"})
    last = lines[-1].split("\t")[1]
    rows = read_csv(tmp_path / "run" / "seed-1" / "predictions-validation.csv")
    assert rows[-1]["text"].endswith(f" [SEP] {last}")
    predictor = Predictor.load(tmp_path / "run" / "seed-1" / "model", precision="fp32")
    (predicted,) = predictor.predict([{"text": rows[-1]["text"]}])
    assert predicted["probabilities"]["low"] == pytest.approx(float(rows[-1]["probability_low"]), abs=1e-4)
    (predicted,) = predictor.predict([{"text": rows[-1]["text"].replace(last, "word39")}])
    assert predicted["probabilities"]["low"] != pytest.approx(float(rows[-1]["probability_low"]), abs=1e-4)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "seed-1" / "model")  # by transformers alone
    assert tokenizer.decode(tokenizer(rows[-1]["text"], truncation=True).input_ids).endswith(f" {last} [SEP]")

    output = tmp_path / "predictions.csv"
    flags = ["--model", str(tmp_path / "run"), "--input", task_files["train"], "--output", str(output)]
    assert main(["predict", *flags, "--precision=fp32"]) == 0
    assert [row["text"] for row in read_csv(output)] == [row["text"] for row in rows]


def test_scores_of_several_splits(config_file: Path, tmp_path: Path, task_files: dict[str, str]) -> None:
    """Catches one of MNLI's two test sets left out, or both under one name; a relative path in config.yaml; and
    `training.score_train` that reaches the log only."""
    tests = f"{{matched: {task_files['test']}, mismatched: {task_files['validation']}}}"
    flags = {"training.score_train": "true", "training.seeds": "[1]", "training.epochs": "2"}
    finetune(config_file, {"task.test": tests, **flags})
    found = results(tmp_path / "run")
    scores = found["splits"]
    assert list(scores) == ["train", "validation", "matched", "mismatched"]
    rows = read_csv(tmp_path / "run" / "seed-1" / "epochs.csv")
    assert all(0 <= float(row[f"train_{found['metric']}"]) <= 1 for row in rows)
    assert scores["mismatched"] == scores["validation"]
    assert len(read_csv(tmp_path / "run" / "seed-1" / "predictions-matched.csv")) == 20
    tests = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["task"]["test"]
    assert tests == {"matched": task_files["test"], "mismatched": task_files["validation"]}


@pytest.mark.parametrize("labelled", [True, False])
def test_train_and_validation_may_be_fitted_together(
    config_file: Path, tmp_path: Path, task_files: dict[str, str], capsys: pytest.CaptureFixture[str], labelled: bool
) -> None:
    """Catches scores on rows that were trained on, an early epoch that is kept, and results that need a validation."""
    if not labelled:
        texts = [line.split("\t")[1] for line in Path(task_files["test"]).read_text().splitlines()]
        Path(task_files["test"]).write_text("\n".join(texts))
    finetune(config_file, {"training.fit_on": "train+validation"})
    run = tmp_path / "run"
    assert set(results(run)["splits"]) == ({"test"} if labelled else set())
    assert results(run)["best_epochs"] == [2, 2]
    assert (run / "curves.png").is_file()
    assert not (run / "seed-1" / "predictions-validation.csv").exists()
    epochs = read_csv(run / "seed-1" / "epochs.csv")
    assert list(epochs[0]) == ["epoch", "steps", "train_loss", "seconds"]
    assert [row["steps"] for row in epochs] == ["7", "14"]
    output = tmp_path / "predictions.csv"
    flags = ["--model", str(run), "--input", task_files["test"], "--output", str(output), "--precision=fp32"]
    assert main(["predict", *flags]) == 0
    assert "(the first of 2 seeds" in capsys.readouterr().err
    trained = read_csv(run / "seed-1" / "predictions-test.csv")
    assert [row["predicted"] for row in read_csv(output)] == [row["predicted"] for row in trained]


def test_without_a_validation_file_a_part_of_train_is_it(
    config_file: Path, tmp_path: Path, task_files: dict[str, str]
) -> None:
    """Catches a run that needs a validation file, or validates on what it trains on."""
    overrides = {"task.validation": "null", "task.validation_share": "0.25", "training.epochs": "1"}
    finetune(config_file, {**overrides, "training.seeds": "[1]"})
    held_out = read_csv(tmp_path / "run" / "seed-1" / "predictions-validation.csv")
    assert len(held_out) == 20
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 60 // 16 + 1
    with pytest.raises(UserError, match=r"other settings: .*task\.split_seed"):
        finetune(config_file, {**overrides, "training.seeds": "[2]", "task.split_seed": "1"})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"task.train": "null"}, r"task\.train is missing: tasks of kind 'classification' are trained"),
        ({"task.train": "/none.tsv"}, r"cannot read /none\.tsv"),
        ({"task.columns.text": "sentence"}, r"train\.tsv:1: no column 'sentence'; .* \(task\.columns\.text names"),
        ({"task.labels": "[low, medium]"}, r"train\.tsv:\d+: unknown label 'high'; known: low, medium"),
        ({"model.init_from": "/none"}, r"/none does not exist"),
        ({"model.max_seq_length": "65"}, r"max_seq_length is 65, the model in .* has 64 positions"),
        ({"training.learning_rate": "1"}, r"unknown config key"),
        ({"model.config": "{hidden_dropout: 0}"}, r"'model\.config\.hidden_dropout': .*mean 'hidden_dropout_prob'"),
        ({"model.config": "{num_labels: 7}"}, r"model\.config\.num_labels: the task and the model in .* determine it"),
    ],
)
def test_bad_input_leaves_no_run(config_file: Path, tmp_path: Path, overrides: dict[str, str], message: str) -> None:
    """Catches a mistake that is found after training has started, or that leaves a run folder."""
    with pytest.raises(UserError, match=message):
        finetune(config_file, overrides)
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_not_fine_tuned(
    config_file: Path, encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches weights that are loaded without verifying their checksums."""
    checkpoints = tmp_path / "pretraining" / "checkpoints"
    older, newest = (checkpoint_path(checkpoints, step) for step in (10, 20))
    for checkpoint in (older, newest):
        shutil.copytree(encoder, checkpoint / "hf")
        mark_complete(checkpoint)
    with (newest / "hf" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    overrides = {"model.init_from": str(tmp_path / "pretraining"), "training.seeds": "1", "training.epochs": "1"}
    finetune(config_file, overrides)
    assert results(tmp_path / "run")["init"] == str(older / "hf")
    assert "skipping damaged checkpoint" in caplog.text
    with pytest.raises(UserError, match=r"model\.init_from: the checkpoint .*step-00000020 is damaged: hf/model"):
        finetune(config_file, {"model.init_from": str(newest)})


@pytest.fixture
def pretraining(encoder: Path, tmp_path: Path) -> Callable[[int], Path]:
    """Saves a checkpoint of a step in the run `pretraining`; each has other weights."""

    def save(step: int) -> Path:
        checkpoint = checkpoint_path(tmp_path / "pretraining" / "checkpoints", step)
        shutil.copytree(encoder, checkpoint / "hf")
        weights = load_file(checkpoint / "hf" / "model.safetensors")
        changed = {name: value * (1 + step / 1e4) for name, value in weights.items()}
        save_file(changed, checkpoint / "hf" / "model.safetensors", {"format": "pt"})
        mark_complete(checkpoint)
        return checkpoint

    return save


def test_all_seeds_start_from_one_checkpoint(
    config_file: Path,
    tmp_path: Path,
    pretraining: Callable[[int], Path],
    seeds_trained: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a run that cannot be continued because its pretraining run has saved or deleted checkpoints since, one
    that does not say that there is a newer one, and one that takes `checkpoints/best` for the one that it has."""
    run = tmp_path / "pretraining"
    overrides = {"model.init_from": str(run), "training.epochs": "1"}
    older = pretraining(10)
    finetune(config_file, {**overrides, "training.seeds": "1"})
    best = {**overrides, "model.init_from": str(run / "checkpoints" / "best")}
    write_best(run / "checkpoints", 10)
    finetune(config_file, {**best, "training.seeds": "1"})
    assert "keeping step" not in capsys.readouterr().err
    newer = pretraining(20)
    finetune(config_file, {**overrides, "training.seeds": "1,2"})
    assert seeds_trained == [1, 2]
    line = f"deepcloze: {run}: keeping step 10, with which this began; to start from step 20, choose another run folder"
    assert capsys.readouterr().err.count(line) == 1
    write_best(run / "checkpoints", 20)
    with pytest.raises(UserError, match=r"trained with other settings: encoder\.model\.safetensors; choose another"):
        finetune(config_file, best)
    (run / "checkpoints" / "best").unlink()
    finetune(config_file, {**best, "training.seeds": "1,2"})
    assert results(tmp_path / "run")["init"] == str(older / "hf")
    shutil.rmtree(older)
    message = rf"model\.init_from, which this run has recorded: {older}/hf does not exist: runs delete old checkpoints"
    with pytest.raises(UserError, match=message):
        finetune(config_file, {**overrides, "training.seeds": "1,2,3"})
    with pytest.raises(UserError, match=r"trained with other settings: encoder\.model\.safetensors; choose another"):
        finetune(config_file, {**overrides, "model.init_from": str(newer)})


def test_a_checkpoint_that_is_deleted_during_training(
    config_file: Path, tmp_path: Path, pretraining: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a trained seed that cannot be saved without the tokenizer, and a message about names on the Hub."""
    checkpoint = pretraining(10)

    def delete_and_fit(*arguments: Any) -> Fitted:
        shutil.rmtree(checkpoint)
        return fit(*arguments)

    monkeypatch.setattr(seed_run, "fit", delete_and_fit)
    with pytest.raises(UserError, match=rf"^{checkpoint}/hf does not exist: runs delete old checkpoints, but those of"):
        finetune(config_file, {"model.init_from": str(tmp_path / "pretraining"), "training.epochs": "1"})
    assert Predictor.load(tmp_path / "run" / "seed-1" / "model").predict([{"text": "word1"}])


@pytest.mark.parametrize(("changes", "is_warned"), [({}, 1), ({"max_seq_length": 8}, 0), ({"weights": "random"}, 0)])
def test_longer_sequences_than_in_pretraining(
    config_file: Path,
    encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    is_warned: bool,
) -> None:
    """Catches position embeddings that were never trained, without a warning."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.model_max_length = 8
    tokenizer.save_pretrained(shutil.copytree(encoder, tmp_path / "short"))
    overrides = {f"model.{key}": str(value) for key, value in {"init_from": tmp_path / "short", **changes}.items()}
    finetune(config_file, overrides, dry_run=True)
    said = "short cuts texts at 8 tokens: the model may not have been trained on longer ones"
    assert (said in " ".join(capsys.readouterr().err.split())) == is_warned


def test_a_model_folder_is_no_run_folder(config_file: Path, encoder: Path) -> None:
    """Catches results in the folder of the encoder, which `deepcloze predict --model RUN` would then predict with."""
    before = sorted(encoder.iterdir())
    with pytest.raises(UserError, match=r"run\.dir: .* holds a model"):
        finetune(config_file, {"run.dir": str(encoder)})
    assert sorted(encoder.iterdir()) == before


def test_a_model_of_the_hub(
    hub: HubServer, config_file: Path, encoder: Path, tmp_path: Path, seeds_trained: list[int]
) -> None:
    """Catches seeds that start from different commits, or that are trained again, because someone has pushed to the
    Hub, and a later commit that cannot be chosen."""
    commit = hub.repository("org/tiny").push_folder(encoder)
    overrides = {"model.init_from": "org/tiny", "training.epochs": "1"}
    finetune(config_file, {**overrides, "training.seeds": "1"})
    model = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]
    assert model["init_from"] == f"org/tiny@{commit}"
    (ancestor,) = json.loads((tmp_path / "run" / "provenance.json").read_text())["ancestors"]
    assert (ancestor["name"], ancestor["commit"]) == ("org/tiny", commit)
    assert "base_model: org/tiny\n" in (tmp_path / "run" / "seed-1" / "model" / "README.md").read_text()

    new = hub.repository("org/tiny").push_folder(encoder, notes__txt=b"new")
    finetune(config_file, {**overrides, "training.seeds": "1,2"})
    assert seeds_trained == [1, 2]
    assert load_run_config(config_file, overrides).model.init_from == f"org/tiny@{commit}"
    changed = load_run_config(config_file, {**overrides, "model.init_from": "org/tiny@main"})
    assert changed.model.init_from == f"org/tiny@{new}"


def test_data_of_the_hub(
    hub: HubServer, config_file: Path, tmp_path: Path, seeds_trained: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches splits or seeds of different commits because someone has pushed to the Hub, and labels as numbers; and a
    model whose data have the name of another data set."""
    use_hub_for_data(monkeypatch, hub.url, tmp_path / "data-cache")
    card = "---\ndataset_info:\n  features:\n  - {name: text, dtype: string}\n"
    card += "  - {name: label, dtype: {class_label: {names: {'0': low, '1': high}}}}\n---\n"

    def push(words: str) -> str:
        rows = [{"text": f"word{number % 20 + 20 * (number % 2)} {words}", "label": number % 2} for number in range(40)]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        files = {"README.md": card.encode(), "train.jsonl": lines, "test.jsonl": lines}
        return hub.repository("org/reviews", "dataset").push(files)

    commit = push("word1")
    overrides = {"task.train": "hub:org/reviews", "task.validation": "hub:org/reviews:test", "task.test": "null"}
    overrides |= {"training.epochs": "1"}
    finetune(config_file, {**overrides, "training.seeds": "1"})
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["task"]
    assert recorded["train"] == f"hub:org/reviews@{commit}:train"
    assert recorded["validation"] == f"hub:org/reviews@{commit}:test"
    model = tmp_path / "run" / "seed-1" / "model"
    assert f"| train | hub:org/reviews@{commit}:train | 40 |" in (model / "README.md").read_text()
    assert read_saved_task(model).kind.config.files() == {
        "train": f"hub:org/reviews@{commit}:train",
        "validation": f"hub:org/reviews@{commit}:test",
    }
    assert {row["label"] for row in read_csv(tmp_path / "run" / "seed-1" / "predictions-validation.csv")} == {
        "low",
        "high",
    }
    push("word2")
    finetune(config_file, {**overrides, "training.seeds": "1,2"})
    assert seeds_trained == [1, 2]
    with pytest.raises(UserError, match=r"^task\.train: hub:org/reviws:train: org/reviws: no such folder, and no such"):
        load_run_config(config_file, {"task.train": "hub:org/reviws"})
