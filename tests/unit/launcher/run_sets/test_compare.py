"""`deepcloze compare`, with runs in this process: it starts them as commands."""

import csv
import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import yaml
from transformers import BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

from experiment.errors import StoppedError, UserError
from experiment.files import write_json
from experiment.results.comparison import as_csv, as_markdown
from experiment.results.plots import draw_dots
from experiment.run_files.checkpoints import checkpoint_path, mark_complete, write_best
from experiment.run_files.outcome_file import Outcome, write_outcome
from experiment.run_files.run_folder import RunFolder, open_run_folder
from finetune.data.records import Record
from finetune.data.splits import read_splits
from finetune.kinds.question_answering import QuestionAnsweringColumns
from finetune.resolve import load_run_config
from finetune.results import predictions
from hub_server import HubServer
from launcher.cli import main
from launcher.run_sets import compare, compare_plan, run_set
from launcher.run_sets.child_run import DONE, REJECTED, ChildRun
from launcher.run_sets.compare import CellScores

LOW, HIGH = "ba de fi go lu mar", "pol rin sta ter ud ven"


@pytest.fixture
def write_files(tmp_path: Path, encoder: Path) -> Callable[..., Path]:
    """Writes a task, `toy`, and a comparison of pretrained and random weights on it; returns the latter's path."""

    def write(**keys: object) -> Path:
        for seed, split in enumerate(("train", "validation", "test")):
            draw = random.Random(seed)
            rows = [(label, " ".join(draw.choices(words.split(), k=6))) for label, words in _draws(draw, 40)]
            with (tmp_path / f"{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([("label", "text"), *rows])
        task = {split: str(tmp_path / f"{split}.csv") for split in ("train", "validation", "test")}
        training = {"lr": 1e-2, "epochs": 2, "batch_size": 8, "precision": "fp32"}
        tree = {"task": {**task, "columns": {"label": "label", "text": "text"}}, "training": training}
        tree |= {"model": {"init_from": "replaced", "max_seq_length": 16}, "run": {"dir": "replaced"}}
        (tmp_path / "toy.yaml").write_text(yaml.safe_dump(tree))
        rows = {"ours": {"init_from": str(encoder)}, "random": {"init_from": str(encoder), "weights": "random"}}
        comparison = {"run": {"dir": str(tmp_path / "compare")}, "rows": rows, "tasks": [str(tmp_path / "toy.yaml")]}
        path = tmp_path / "compare.yaml"
        path.write_text(yaml.safe_dump({**comparison, "seeds": [1, 2], **keys}))
        return path

    return write


def _draws(draw: random.Random, count: int) -> list[tuple[str, str]]:
    return [draw.choice([("low", LOW), ("high", HIGH)]) for _ in range(count)]


@pytest.fixture(scope="module")
def finished() -> dict[str, Path]:
    """Copies of finished runs, by what their results depend on: training takes seconds."""
    return {}


@pytest.fixture
def started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, finished: dict[str, Path], no_figures: None, empty_charts: None
) -> list[str]:
    """The names of the runs that were started, in order. They run in this process."""
    names: list[str] = []

    def start(run: ChildRun) -> str:
        names.append(run.folder.path.name if run.command == "sweep" else "/".join(run.folder.path.parts[-2:]))
        copy = tmp_path / f"finished-{len(names)}"
        files = (path.read_text() for path in sorted([*tmp_path.glob("*.csv"), *tmp_path.glob("toy.yaml")]))
        key = "\n".join([*run.argv, *files]).replace(str(tmp_path), "")
        if key in finished and not run.folder.path.exists():
            shutil.copytree(finished[key], run.folder.path)
            return DONE
        try:
            code = main(run.argv[4:])
        except SystemExit:
            code = 1
        if code == 0:
            finished[key] = shutil.copytree(run.folder.path, copy)
        return DONE if code == 0 else f"failed (exit code {code})"

    monkeypatch.setattr(run_set, "start", start)
    monkeypatch.setattr(compare, "RESAMPLES", 2)  # most of the time of a table
    return names


def read_tables(folder: Path) -> dict[str, dict[str, dict]]:
    return json.loads((folder / "compare.json").read_text())


def test_a_comparison_is_validated(
    write_files: Callable[..., Path], started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches `deepcloze validate` that takes a comparison for a pretraining, and mistakes that it does not find."""
    file = str(write_files())
    assert main(["validate", file]) == 0
    assert capsys.readouterr().out == f"{file}: valid, for deepcloze compare\n"
    (tmp_path / "train.csv").write_text("text\nba\n")
    assert main(["validate", file]) == 2
    assert "train.csv:1: no column 'label'" in capsys.readouterr().err
    assert not started
    assert not (tmp_path / "compare").exists()


def test_rows_and_tasks_and_seeds(
    write_files: Callable[..., Path],
    started: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches scores of another row, split or metric, tables that differ, and cells that run twice."""
    monkeypatch.setattr(compare, "RESAMPLES", 15)
    monkeypatch.setattr(compare, "draw_dots", draw_dots)
    file, folder = write_files(), tmp_path / "compare"
    assert main(["compare", str(file)]) == 0
    assert started == ["ours/toy", "random/toy"]
    table = read_tables(folder)
    for row, init in {"ours": "encoder", "random": "random"}.items():
        results = json.loads((folder / row / "toy" / "results.json").read_text())
        assert init in results["init"]
        cell = table[row]["toy"]
        assert (cell["metric"], cell["split"]) == ("accuracy", "test")
        assert cell["values"] == results["splits"]["test"]["accuracy"]["values"]
        assert len(cell["values"]) == 2
        assert cell["mean"] == pytest.approx(sum(cell["values"]) / 2)
        assert cell["collapsed"] == sum("test" in splits for splits in results["collapsed"].values())
        assert cell["interval"][0] <= cell["mean"] <= cell["interval"][1]
    difference = table["ours"]["toy"]["against"]["random"]
    assert difference["difference"] == pytest.approx(table["ours"]["toy"]["mean"] - table["random"]["toy"]["mean"])
    assert difference["interval"][0] <= difference["difference"] <= difference["interval"][1]

    said = capsys.readouterr().out
    shown = f"{table['ours']['toy']['mean']:.4f} ± {table['ours']['toy']['std']:.4f}"
    assert shown in said
    assert shown in (folder / "compare.md").read_text()
    assert shown in (folder / "report" / "index.html").read_text()
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((folder / "compare.csv").open()))
    assert [(row["row"], row["task"], float(row["mean"])) for row in rows] == [
        (row, "toy", table[row]["toy"]["mean"]) for row in ("ours", "random")
    ]

    assert main(["compare", str(file)]) == 0
    assert len(started) == 2
    assert read_tables(folder) == table


@pytest.mark.parametrize(
    ("collapsed", "count"), [({"1": ["validation"], "2": ["test", "validation"]}, 1), ({}, 0), ([1, 2], 2)]
)
def test_seeds_that_collapsed_on_another_split_do_not_count(
    write_files: Callable[..., Path], started: list[str], encoder: Path, tmp_path: Path, collapsed: Any, count: int
) -> None:
    """Catches p-values that are missing because of the few rows of another split; and results of earlier versions,
    which have no splits."""
    file, folder = str(write_files(rows={"ours": {"init_from": str(encoder)}})), tmp_path / "compare"
    assert main(["compare", file]) == 0
    results = folder / "ours" / "toy" / "results.json"
    results.write_text(json.dumps({**json.loads(results.read_text()), "collapsed": collapsed}))
    assert main(["compare", file]) == 0
    assert read_tables(folder)["ours"]["toy"]["collapsed"] == count


def test_differences_have_the_sign_of_their_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows that are swapped: the interval of a difference would exclude it."""
    drawn = {"good": np.linspace(0.85, 0.95, 100), "bad": np.linspace(0.45, 0.55, 100)}
    monkeypatch.setattr(compare, "_resample", lambda *_: drawn)
    means = {"good": 0.9, "bad": 0.5}
    cells = {
        row: [CellScores("toy", "", None, RunFolder(tmp_path), "test", {}, "accuracy", (mean,), mean, None, 0, (), {})]
        for row, mean in means.items()
    }
    tests = compare.test_rows(cells)
    against = tests["toy", "good"]["against"]["bad"]
    assert against["difference"] == pytest.approx(0.4)
    assert against["interval"] == pytest.approx((0.4, 0.4))
    assert tests["toy", "bad"]["interval"] == pytest.approx((0.4525, 0.5475))


def test_rows_share_the_drawn_texts_but_not_the_drawn_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches questions on one text that are drawn one by one, texts drawn for each row, and seeds in pairs."""
    records = [Record(f"f.jsonl:{number}", {"context": f"text {number // 5}"}) for number in range(40)]
    split = SimpleNamespace(
        records=records,
        kind=SimpleNamespace(config=SimpleNamespace(columns=QuestionAnsweringColumns())),
        predictions=[[], []],  # of two seeds
        scorer=lambda _: lambda seed, drawn: 10 * seed + np.mean(drawn < 20),
    )
    monkeypatch.setattr(compare, "_read_split", lambda *_: split)
    cell: Any = SimpleNamespace(metric="f1")
    drawn = compare._resample("toy", {"a": cell, "b": cell})
    seeds, texts = zip(*(np.divmod(drawn[row], 5) for row in "ab"), strict=True)
    assert set(texts[0] * 8) == set(range(9))
    assert np.array_equal(*texts)
    assert not np.array_equal(*seeds)


@pytest.mark.parametrize(("contexts", "tested"), [(1, False), (5, False), (6, True)])
def test_few_texts_have_no_test(monkeypatch: pytest.MonkeyPatch, contexts: int, tested: bool) -> None:
    """Catches chance that is called significant: all resamples of one text are the same, however many questions."""
    records = [Record(f"f.jsonl:{number}", {"context": f"text {number % contexts}"}) for number in range(60)]
    config = SimpleNamespace(columns=QuestionAnsweringColumns())

    def read(cell: CellScores, _: object) -> Any:
        right = np.arange(60) % 10 < 10 * cell.mean
        kind = SimpleNamespace(config=config)
        return SimpleNamespace(
            records=records, kind=kind, predictions=[[]], scorer=lambda _: lambda _, drawn: right[drawn].mean()
        )

    monkeypatch.setattr(compare, "_read_split", read)
    cells = {
        row: [CellScores("toy", "", None, RunFolder(Path()), "test", {}, "f1", (mean, mean), mean, 0.0, 0, (), {})]
        for row, mean in {"a": 0.6, "b": 0.5}.items()
    }
    tests = compare.test_rows(cells)
    against = tests["toy", "a"]["against"]["b"]
    assert against["difference"] == pytest.approx(0.1)
    assert (against["interval"] is not None) == (against["p"] is not None) == tested
    assert (tests["toy", "a"]["interval"] is not None) == tested


def test_data_may_be_moved_after_training(
    write_files: Callable[..., Path], started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches finished cells whose scores are tested on the files that their configs name, and splits that are read
    again for each row."""
    file, task = write_files(), tmp_path / "toy.yaml"
    assert main(["compare", str(file)]) == 0
    before = read_tables(tmp_path / "compare")
    (tmp_path / "moved").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.csv").rename(tmp_path / "moved" / f"{split}.csv")
        task.write_text(task.read_text().replace(f"{tmp_path}/{split}.csv", f"{tmp_path}/moved/{split}.csv"))
    read: list[object] = []
    monkeypatch.setattr(predictions, "read_splits", lambda *args: read.append(args) or read_splits(*args))
    assert main(["compare", str(file)]) == 0
    assert read_tables(tmp_path / "compare") == before
    assert len(started) == 2
    assert len(read) == 1


def test_scores_are_written_if_their_tests_fail(
    write_files: Callable[..., Path], started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hours of training without a table because a file of predictions is damaged."""
    file = str(write_files())
    monkeypatch.setattr(compare, "_read_split", fail_to_read)
    assert main(["compare", file]) == 2
    found = read_tables(tmp_path / "compare")
    cells = [cells["toy"] for cells in found.values()]
    assert [(len(cell["values"]), cell["interval"], cell["against"]) for cell in cells] == [(2, None, {})] * 2
    assert "toy, accuracy" in (tmp_path / "compare" / "compare.md").read_text()


def test_failed_tests_keep_the_tables_of_the_same_scores(
    write_files: Callable[..., Path], started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches tables that lose their intervals because test data cannot be read any more, and old scores that stay."""
    file, folder = str(write_files()), tmp_path / "compare"
    assert main(["compare", file]) == 0
    before = {path: path.read_bytes() for path in folder.glob("compare.*")}
    monkeypatch.setattr(compare, "_read_split", fail_to_read)
    assert main(["compare", file]) == 2
    assert {path: path.read_bytes() for path in folder.glob("compare.*")} == before
    found = read_tables(folder)
    found["ours"]["toy"]["values"][0] += 0.25
    (folder / "compare.json").write_text(json.dumps(found))
    assert main(["compare", file]) == 2
    assert read_tables(folder)["ours"]["toy"]["interval"] is None


def test_reports_have_the_scores_while_they_are_tested(
    write_files: Callable[..., Path], started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a followed page that says that all runs are done, and has the scores of fewer seeds for minutes."""
    assert main(["compare", str(write_files(seeds=[1]))]) == 0
    found, test_rows = [], compare.test_rows

    def look(cells: Any) -> Any:
        found.append(read_tables(tmp_path / "compare"))
        return test_rows(cells)

    monkeypatch.setattr(compare, "test_rows", look)
    assert main(["compare", str(write_files(seeds=[1, 2]))]) == 0
    assert [len(cells["toy"]["values"]) for cells in found[0].values()] == [2, 2]


def test_all_tables_have_the_scores_of_a_comparison_stopped_in_its_tests(
    write_files: Callable[..., Path], started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches compare.md and compare.csv that keep old scores, because compare.json has the new ones already."""
    assert main(["compare", str(write_files(seeds=[1]))]) == 0
    file, folder = str(write_files(seeds=[1, 2])), tmp_path / "compare"
    for read in (Mock(side_effect=KeyboardInterrupt), fail_to_read):
        monkeypatch.setattr(compare, "_read_split", read)
        assert main(["compare", file]) != 0
    found = read_tables(folder)
    assert (folder / "compare.csv").read_text() == as_csv(found)
    assert (folder / "compare.md").read_text() == as_markdown(found, {})


def fail_to_read(*_: object) -> None:
    raise UserError("predictions-test.jsonl is damaged")


def test_a_stopped_comparison_runs_each_cell_once(
    write_files: Callable[..., Path], started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a restart that begins at the start, and one that takes an interrupted cell for a finished one."""
    file, run_here = write_files(), run_set.start

    def stop_at_second(run: ChildRun) -> str:
        if len(started) == 1:
            raise StoppedError("stopped")
        return run_here(run)

    with monkeypatch.context() as patch:
        patch.setattr(run_set, "start", stop_at_second)
        assert main(["compare", str(file)]) == 75
    assert started == ["ours/toy"]
    assert main(["compare", str(file)]) == 0
    assert started == ["ours/toy", "random/toy"]


@pytest.mark.parametrize("record", ["[]", "null", '{"ours/to', '{"ours/toy": null}', '{"ours/toy": {"config": []}}'])
def test_a_damaged_record_is_one_message(
    write_files: Callable[..., Path],
    started: list[str],
    tmp_path: Path,
    record: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback, and a comparison that starts over."""
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "runs.json").write_text(record)
    assert main(["compare", str(write_files())]) == 2
    printed = capsys.readouterr().err
    assert "runs.json is damaged: " in printed
    assert "delete this file and run the same command again" in printed
    assert not started


@pytest.mark.parametrize("name", ["results.json", "seed-7/COMPLETE", "seed-7/predictions-test.jsonl"])
def test_results_that_cannot_be_read_now_are_no_damage(
    write_files: Callable[..., Path],
    started: list[str],
    encoder: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches the advice to delete good results because a network file system failed for a moment."""
    file = str(write_files(rows={"ours": {"init_from": str(encoder)}}, seeds=[7]))
    assert main(["compare", file]) == 0
    away, opened = tmp_path / "compare" / "ours" / "toy" / name, Path.open

    def fail(path: Path, *args: Any, **options: Any) -> Any:
        if path == away:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return opened(path, *args, **options)

    capsys.readouterr()
    monkeypatch.setattr(Path, "open", fail)
    assert main(["compare", file]) == 2
    assert capsys.readouterr().err.endswith(f"deepcloze: {away} cannot be read: Stale file handle. Try again\n")


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("name", ["results.json", "seed-7/predictions-test.jsonl"])
def test_damaged_results_of_a_cell_name_it_and_the_way_out(
    write_files: Callable[..., Path],
    started: list[str],
    encoder: Path,
    tmp_path: Path,
    grid: bool,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a message without the cell or without advice, and advice that does not help."""
    keys = {"grid": "training.lr=1e-2"} if grid else {}
    file = str(write_files(rows={"ours": {"init_from": str(encoder)}}, seeds=[7], **keys))
    assert main(["compare", file]) == 0
    cell = tmp_path / "compare" / "ours" / "toy"
    damaged = cell / ("lr=1e-2" if grid else ".") / name
    damaged.write_text('{"task": "to')
    before, count = read_tables(tmp_path / "compare"), len(started)
    capsys.readouterr()
    assert main(["compare", file]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"deepcloze: ours/toy: {damaged} is damaged: ")
    assert error.endswith(f"; to train this cell again, delete {cell} and run the same command again")
    assert len(started) == count
    shutil.rmtree(cell)
    assert main(["compare", file]) == 0
    assert read_tables(tmp_path / "compare") == before


def test_more_seeds_are_added(
    write_files: Callable[..., Path], started: list[str], encoder: Path, tmp_path: Path
) -> None:
    """Catches a table of fewer seeds than the file asks for, because its cells were done once."""
    rows = {"ours": {"init_from": str(encoder)}}
    assert main(["compare", str(write_files(rows=rows, seeds=[1]))]) == 0
    before = read_tables(tmp_path / "compare")["ours"]["toy"]
    assert main(["compare", str(write_files(rows=rows, seeds=[1, 2]))]) == 0
    after = read_tables(tmp_path / "compare")["ours"]["toy"]
    assert len(started) == 2
    assert after["values"][:1] == before["values"]
    assert len(after["values"]) == 2
    assert before["std"] is None


@pytest.mark.parametrize("grid", [None, "training.lr=1e-2"])
def test_seeds_that_were_added_and_rejected_are_trained_by_the_next_start(
    write_files: Callable[..., Path],
    started: list[str],
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    grid: str | None,
) -> None:
    """Catches a cell that counts as finished with its earlier seeds, and a sweep that failed whose earlier best is in
    the table."""
    keys = {"rows": {"ours": {"init_from": str(encoder)}}, "grid": grid}
    assert main(["compare", str(write_files(**keys, seeds=[1]))]) == 0
    file = str(write_files(**keys, seeds=[1, 2]))
    with monkeypatch.context() as patch:
        patch.setattr(run_set, "start", lambda _: REJECTED)
        with pytest.raises(SystemExit, match="1 of 1 runs failed: ours/toy"):
            main(["compare", file])
    assert read_tables(tmp_path / "compare")["ours"] == {}
    assert main(["compare", file]) == 0
    assert len(read_tables(tmp_path / "compare")["ours"]["toy"]["values"]) == 2


def test_an_edit_of_a_task_reaches_no_cell(
    write_files: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a row that is trained with other settings than the row above, and than runs.json records."""
    file, task, seen = str(write_files()), tmp_path / "toy.yaml", []

    def start(run: ChildRun) -> str:
        config = load_run_config(run.argv[run.argv.index("--config") + 1], {"model.init_from": str(tmp_path)})
        seen.append((config.task.name, config.training.epochs))
        task.write_text(task.read_text().replace("epochs: 2", "epochs: 3"))
        return "failed (exit code 1)"

    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setattr(run_set, "start", start)
    with pytest.raises(SystemExit, match="2 of 2 runs failed"):
        main(["compare", file])
    assert seen == [("toy", 2), ("toy", 2)]


def test_a_grid_is_chosen_by_validation(
    write_files: Callable[..., Path], started: list[str], encoder: Path, tmp_path: Path
) -> None:
    """Catches the point that is best on test, or the last one, in the table; and a metric that is not the one of the
    other cells, with task.metric in the grid."""
    file = str(write_files(rows={"ours": {"init_from": str(encoder)}}, grid="training.lr=1e-9,1e-2", seeds=[1]))
    assert main(["compare", file]) == 0
    cell = read_tables(tmp_path / "compare")["ours"]["toy"]
    sweep = tmp_path / "compare" / "ours" / "toy"
    scores = {path.parent.name: json.loads(path.read_text())["splits"] for path in sorted(sweep.glob("*/results.json"))}
    best = max(scores, key=lambda name: scores[name]["validation"]["accuracy"]["mean"])
    assert cell["folder"] == f"ours/toy/{best}"
    assert cell["chosen"] == {"training.lr": best.removeprefix("lr=")}
    assert cell["mean"] == scores[best]["test"]["accuracy"]["mean"]
    results = json.loads((sweep / best / "results.json").read_text())
    (sweep / best / "results.json").write_text(json.dumps({**results, "metric": "macro_f1"}))
    assert main(["compare", file]) == 0
    assert read_tables(tmp_path / "compare")["ours"]["toy"]["metric"] == "accuracy"


def test_a_config_that_the_grid_replaces_is_not_checked(
    write_files: Callable[..., Path], encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a comparison that is refused although each point of its grid is valid."""
    path, task = write_files(rows={"ours": {"init_from": str(encoder)}}), tmp_path / "toy.yaml"
    task.write_text(task.read_text().replace("precision: fp32", "precision: fp16"))
    assert main(["compare", str(path), "--dry_run", "--grid=training.precision=bf16,fp32"]) == 0
    assert main(["compare", str(path), "--dry_run", "--grid=training.precision=fp16,fp32"]) == 2
    assert "grid: precision=fp16: " in capsys.readouterr().err


def test_a_point_of_a_grid_that_fails_leaves_the_others(
    write_files: Callable[..., Path], started: list[str], encoder: Path, tmp_path: Path
) -> None:
    """Catches a row that is missing in the tables because one learning rate diverged."""
    rows = {"ours": {"init_from": str(encoder)}}
    file = write_files(rows=rows, grid="training.lr=1e-2,1e30", seeds=[1])
    task = tmp_path / "toy.yaml"
    task.write_text(task.read_text().replace("epochs: 2", "epochs: 2\n  grad_clip: 0"))
    with pytest.raises(SystemExit, match="1 of 1 runs failed: ours/toy"):
        main(["compare", str(file)])
    assert read_tables(tmp_path / "compare")["ours"]["toy"]["chosen"] == {"training.lr": "1e-2"}
    assert "| ours/toy | failed (exit code 1) |" in (tmp_path / "compare" / "compare.md").read_text()


def test_a_task_that_cannot_be_scored_is_rejected(
    write_files: Callable[..., Path], started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches hours of training whose tables cannot be written."""
    file, task = write_files(), tmp_path / "toy.yaml"
    task.write_text(task.read_text().replace("epochs: 2", "epochs: 2\n  fit_on: train+validation"))
    (tmp_path / "test.csv").write_text("text\nba\n")
    assert main(["compare", str(file)]) == 2
    assert (
        "toy.yaml: nothing to score: expected a validation split, or a test split with labels"
        in capsys.readouterr().err
    )
    assert not started


def test_a_cell_that_fails_leaves_the_others(
    write_files: Callable[..., Path],
    started: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a failure that ends the comparison, one that is hidden, and one that is not tried again."""
    file, run_here = write_files(), run_set.start

    def fail_first(run: ChildRun) -> str:
        return "failed (exit code 1)" if run.name.endswith("ours/toy") else run_here(run)

    with monkeypatch.context() as patch:
        patch.setattr(run_set, "start", fail_first)
        with pytest.raises(SystemExit, match=r"compare: 1 of 2 runs failed: ours/toy"):
            main(["compare", str(file)])
    assert read_tables(tmp_path / "compare")["ours"] == {}
    said = capsys.readouterr().out
    assert "–" in said
    assert "failed (exit code 1)" in said
    assert "| ours/toy | failed (exit code 1) |" in (tmp_path / "compare" / "compare.md").read_text()
    assert main(["compare", str(file)]) == 0
    assert started == ["random/toy", "ours/toy"]


def test_a_report_that_cannot_be_written_is_a_warning(
    write_files: Callable[..., Path], started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a comparison whose runs are all done, and that fails because of its report."""
    file, folder = write_files(), tmp_path / "compare"
    folder.mkdir()
    (folder / "report").touch()  # a file in place of the folder
    assert main(["compare", str(file)]) == 0
    assert "warning: compare: no report: " in capsys.readouterr().err
    assert set(read_tables(folder)) == {"ours", "random"}
    assert started == ["ours/toy", "random/toy"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rows": {}}, "rows"),
        ({"rows": {"a b": {"init_from": "."}, "a-b": {"init_from": "."}}}, "would share the folder 'a-b'"),
        ({"rows": {"runs.json": {"init_from": "."}}}, "'runs.json' is the name of a file or folder of the comparison"),
        ({"rows": {"configs": {"init_from": "."}}}, "'configs' is the name of a file or folder of the comparison"),
        ({"rows": {"checkpoints": {"init_from": "."}}}, "'checkpoints' is the name of a file or folder of"),
        ({"rows": {"config.json": {"init_from": "."}}}, "'config.json' is the name of a file or folder of"),
        ({"rows": {"a": {"init_from": "/nowhere"}}}, r"rows\.a\.init_from: /nowhere does not exist"),
        ({"rows": {"a": {"init_from": ".", "weights": "random", "pretrain": "x.yaml"}}}, "would ignore what pretrain"),
        ({"grid": "training.lr=fast"}, r"training\.lr"),
        ({"grid": "training.seeds=1,2"}, r"--grid: 'training\.seeds' is set to 1,2 for all points"),
        ({"grid": "training.lr=1e-3,0.001"}, r"grid: lr=0\.001: same config as lr=1e-3"),
        ({"grid": "task.on_bad_lines=error,skip"}, r"grid: on_bad_lines=skip: .* would be scored on different rows"),
        ({"tasks": ["missing.yaml"]}, r"missing\.yaml"),
    ],
)
def test_mistakes_are_rejected_before_anything_runs(
    write_files: Callable[..., Path],
    started: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    keys: dict[str, object],
    message: str,
) -> None:
    """Catches a mistake in the last row that shows after hours."""
    assert main(["compare", str(write_files(**keys))]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert not started
    assert not (tmp_path / "compare").exists()


@pytest.mark.parametrize("best_metric", [None, "eval/held/loss"])
def test_a_chain_goes_on_from_its_best_checkpoint(
    write_files: Callable[..., Path],
    wordpiece_corpus: Path,
    encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    best_metric: str | None,
) -> None:
    """Catches a comparison of the overfitted model that early stopping leaves, one of models that pool differently, a
    sweep over the pooling that is refused after the pretraining, and warnings that only the run prints. Also a row of
    version 0.2.0, whose tasks began with the newest checkpoint, that continues from the best one."""
    pretraining = {
        "run": {"dir": "replaced"},
        "corpus": {"train": str(wordpiece_corpus), "eval": {"held": str(wordpiece_corpus)}},
        "schedule": {"steps": 6, "warmup_steps": 2},
        "evaluation": {"best_metric": best_metric},
        "engine": {"ds_config": "fp32_zero1"},
    }
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(pretraining))
    folder = Path(shutil.copytree(encoder, tmp_path / "cls"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    rows = {"a": {"init_from": str(folder), "pretrain": str(tmp_path / "more.yaml")}}
    path = write_files(rows=rows)
    assert main(["compare", str(path), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path}/more.yaml: optimizer.lr is 0.0005, for training from scratch" in caplog.text
    suffix = "" if best_metric is None else "/checkpoints/best"
    assert f"--model.init_from={tmp_path}/compare/a/pretrain{suffix} " in printed
    assert "task.pooling" not in printed
    (tmp_path / "pairs.jsonl").write_text('{"sentence1": "a", "sentence2": "b"}\n' * 4)
    pairs = {"kind": "embedding", "train": str(tmp_path / "pairs.jsonl"), "validation": str(tmp_path / "pairs.jsonl")}
    tree = yaml.safe_load((tmp_path / "toy.yaml").read_text())
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({**tree, "task": {**pairs, "metric": "mrr"}}))
    for grid, kept in (("null", True), ("task.scale=10,20", True), ("task.pooling=mean,cls", False)):
        assert main(["compare", str(path), "--dry_run", f"--grid={grid}"]) == 0
        assert (" --task.pooling=cls" in capsys.readouterr().out) == kept, grid
    cell = tmp_path / "compare" / "a" / "toy"
    cell.mkdir(parents=True)
    for recorded, expected in (({}, ""), ({"pretrain.checkpoint": "best"}, suffix)):
        write_json(tmp_path / "compare" / "runs.json", {"a/toy": {"config": recorded}})
        assert main(["compare", str(path), "--dry_run"]) == 0
        assert f"--model.init_from={tmp_path}/compare/a/pretrain{expected} " in capsys.readouterr().out


def test_a_chain_whose_pretraining_has_begun(
    write_files: Callable[..., Path],
    wordpiece_corpus: Path,
    encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a pretraining that takes over an earlier run, or cannot be resumed; one that is finished and refused
    because the encoder was moved or its checkpoints were deleted; and a task that cannot start from it, which shows
    after other runs."""
    pretraining = {
        "run": {"dir": "replaced", "resume": "never"},
        "corpus": {"train": str(wordpiece_corpus)},
        "schedule": {"steps": 6, "warmup_steps": 2},
        "engine": {"ds_config": "fp32_zero1"},
    }
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(pretraining))
    path = write_files(rows={"a": {"init_from": str(encoder), "pretrain": str(tmp_path / "more.yaml")}})

    def plan() -> str:
        code = main(["compare", str(path), "--dry_run"])
        found = capsys.readouterr()
        assert code == (2 if found.err else 0)
        return found.err or found.out

    assert "--run.resume" not in plan()
    run = open_run_folder(tmp_path / "compare" / "a" / "pretrain")
    checkpoint = checkpoint_path(run.checkpoints, 6)
    shutil.copytree(encoder, checkpoint / "hf")
    write_json(checkpoint / "state.json", {"step": 6, "config": {"model": {"init_from": "/moved/since"}}})
    mark_complete(checkpoint)
    run.provenance.touch()
    assert "run.resume is 'never', but" in plan()
    write_json(tmp_path / "compare" / "runs.json", {"a/pretrain": {"config": {}}})
    assert "cannot be resumed with another model.init_from" in plan()
    write_outcome(run, Outcome.DONE)
    assert "--run.resume=auto" in plan()
    shutil.rmtree(checkpoint)
    assert f"rows.a: the run {run.path} has no complete checkpoint" in plan()
    write_outcome(open_run_folder(tmp_path / "compare" / "a" / "toy"), Outcome.DONE)
    assert "--run.resume=auto" in plan()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, True),
        ({"model": {"config": {"hidden_dropout_prob": 0.1}}}, False),
        ({"grid": "model.config.hidden_dropout_prob=0,0.1"}, False),
        ({"BERT": {"classifier_dropout": 0.1, "hidden_dropout_prob": 0}, "ours": {"classifier_dropout": 0.1}}, False),
        ({"BERT": {"hidden_dropout_prob": 0.0, "classifier_dropout": 0.0}}, False),
    ],
)
def test_rows_with_different_dropout(
    write_files: Callable[..., Path],
    encoder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    said: bool,
) -> None:
    """Catches models that are fine-tuned with different dropout in silence, advice that does not help, and warnings
    about 0 and 0.0, or about a default beside its value."""
    rows = {}
    for row, fields in {"BERT": {}, "ours": {"hidden_dropout_prob": 0.0}}.items():
        folder = Path(shutil.copytree(encoder, tmp_path / row))
        config = json.loads((folder / "config.json").read_text()) | fields | changes.get(row, {})
        (folder / "config.json").write_text(json.dumps(config))
        rows[row] = {"init_from": str(folder)}
    file = write_files(rows=rows, **{key: value for key, value in changes.items() if key == "grid"})
    tree = yaml.safe_load((tmp_path / "toy.yaml").read_text())
    tree["model"] |= changes.get("model", {})
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(tree))
    assert main(["compare", str(file), "--dry_run"]) == 0
    warning = (
        f"{tmp_path}/toy.yaml: the rows have different dropout: hidden_dropout_prob is 0.1 in BERT, 0.0 in ours; to "
        "train them alike, set model.config.hidden_dropout_prob"
    )
    assert (warning in caplog.text) == said
    assert ("different dropout" in caplog.text) == said


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_models_with_different_fields_for_dropout(
    write_files: Callable[..., Path], encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, dropout: float
) -> None:
    """Catches BERT with dropout beside a ModernBERT without it in silence, the advice to set a key that one of them
    rejects, and a warning if both have none, or if nothing is trained."""
    modern = Path(shutil.copytree(encoder, tmp_path / "modern"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    vocabulary = json.loads((encoder / "config.json").read_text())["vocab_size"]
    ModernBertForMaskedLM(ModernBertConfig(vocab_size=vocabulary, **sizes, **tokens)).save_pretrained(modern)
    bert = Path(shutil.copytree(encoder, tmp_path / "bert"))
    config = json.loads((bert / "config.json").read_text())
    changed = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    (bert / "config.json").write_text(json.dumps({**config, **changed}))
    file = write_files(rows={"BERT": {"init_from": str(bert)}, "modern": {"init_from": str(modern)}})
    assert main(["compare", str(file), "--dry_run"]) == 0
    assert ("the rows have different kinds of dropout, which no key sets for all: BERT: " in caplog.text) == bool(
        dropout
    )
    assert "to train them alike" not in caplog.text
    caplog.clear()
    exam = {"article": "ba _ de", "options": [["fi", "go"]], "answers": ["A"]}
    (tmp_path / "exam.jsonl").write_text(json.dumps(exam) + "\n")
    task = {"name": "exam", "kind": "cloze", "scoring": "zero_shot", "test": str(tmp_path / "exam.jsonl")}
    tree = yaml.safe_load((tmp_path / "toy.yaml").read_text())
    (tmp_path / "exam.yaml").write_text(yaml.safe_dump({**tree, "task": task}))
    assert main(["compare", str(file), f"--tasks={tmp_path}/exam.yaml", "--dry_run"]) == 0
    assert "dropout" not in caplog.text


def test_a_chain_may_extend_a_model_that_is_too_short_for_the_task(
    write_files: Callable[..., Path], wordpiece_corpus: Path, encoder: Path, tmp_path: Path
) -> None:
    """Catches a comparison that is refused because of the positions that a model has before its pretraining."""
    folder = Path(shutil.copytree(encoder, tmp_path / "short"))
    config = {**json.loads((encoder / "config.json").read_text()), "max_position_embeddings": 8}
    BertForMaskedLM(BertConfig(**config)).save_pretrained(folder)
    pretraining = {
        "run": {"dir": "replaced"},
        "model": {"max_positions": 16},
        "corpus": {"train": str(wordpiece_corpus)},
        "batch": {"max_seq_length": 16},
        "schedule": {"steps": 6, "warmup_steps": 2},
        "engine": {"ds_config": "fp32_zero1"},
    }
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(pretraining))
    chain = {"init_from": str(folder), "pretrain": str(tmp_path / "more.yaml")}
    rows = {"a": {"init_from": str(encoder)}, "chain": chain}
    assert main(["compare", str(write_files(rows=rows)), "--dry_run"]) == 0


def test_tasks_have_names_of_their_own(
    write_files: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches two runs in one folder, such as a task in that of the pretraining."""
    messages = {"toy": "the name 'toy' is used twice", "(pretrain)": "the folder 'pretrain' of '(pretrain)' is for"}
    for other, message in messages.items():
        file = write_files(tasks=[str(tmp_path / "toy.yaml"), str(tmp_path / f"{other}.yaml")])
        (tmp_path / f"{other}.yaml").write_text((tmp_path / "toy.yaml").read_text())
        assert main(["compare", str(file)]) == 2
        assert f"tasks: {message}" in capsys.readouterr().err


def test_data_are_checked_before_anything_runs(
    write_files: Callable[..., Path], started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a label that occurs in the test split only, which each fine-tuning rejects after a long pretraining."""
    file = write_files()
    with (tmp_path / "test.csv").open("a") as test:
        test.write("medium,ba de fi\n")
    assert main(["compare", str(file)]) == 2
    said = capsys.readouterr().err
    assert re.search(r"toy\.yaml: .*test\.csv:42: unknown label 'medium'", said), said
    assert not started
    assert not (tmp_path / "compare").exists()


def test_models_of_all_rows_are_checked_before_anything_runs(
    write_files: Callable[..., Path],
    started: list[str],
    encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a model in the second row that cannot be loaded or is too short, and a device or an alert that a task
    cannot have: all would show after the runs of the first row."""
    second = tmp_path / "second"
    rows = {"ours": {"init_from": str(encoder)}, "second": {"init_from": str(second)}}

    def message(row: str, files: dict[str, str | None], **sections: object) -> str:
        """Return the message about other files of the second model, or sections of the task. None: no such file."""
        shutil.copytree(encoder, second, dirs_exist_ok=True)
        for name, content in files.items():
            (second / name).unlink() if content is None else (second / name).write_text(content)
        file, task = write_files(rows=rows), tmp_path / "toy.yaml"
        task.write_text(yaml.safe_dump({**yaml.safe_load(task.read_text()), **sections}))
        assert main(["compare", str(file)]) == 2
        before, _, said = capsys.readouterr().err.splitlines()[-1].partition(f"compare.yaml: rows.{row}: {task}: ")
        assert before == f"deepcloze: {tmp_path}/"
        return said

    short = json.dumps({**json.loads((encoder / "config.json").read_text()), "max_position_embeddings": 8})
    assert "max_seq_length is 16, the model in" in message("second", {"config.json": short})
    assert "cannot load the weights in" in message("second", {"model.safetensors": "garbage"})
    no_tokenizer = dict.fromkeys(("tokenizer.json", "tokenizer_config.json"))
    assert message("second", no_tokenizer).startswith(f"tokenizer: {second}")
    assert "fp16 needs a CUDA device" in message("ours", {}, training={"precision": "fp16"})
    assert "set DEEPCLOZE_SMTP_HOST" in message("ours", {}, tracking={"alerts": {"email": "me@example.org"}})
    assert not started
    assert not (tmp_path / "compare").exists()


def test_changed_data_and_encoders_are_not_mixed_in(
    write_files: Callable[..., Path],
    started: list[str],
    encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches one table of other training data, and of an encoder whose files were replaced; and a row alone that
    has no interval."""
    shutil.copytree(encoder, tmp_path / "encoder")
    rows = {"ours": {"init_from": str(tmp_path / "encoder")}}
    file = write_files(rows=rows, seeds=[1])
    assert main(["compare", str(file)]) == 0
    assert len(read_tables(tmp_path / "compare")["ours"]["toy"]["interval"]) == 2
    train = (tmp_path / "train.csv").read_bytes()
    (tmp_path / "train.csv").write_bytes(train + b"low,ba de fi\n")
    assert main(["compare", str(file)]) == 2
    assert f"toy was started with other content of {tmp_path}/train.csv; choose" in capsys.readouterr().err
    (tmp_path / "train.csv").write_bytes(train)
    weights = tmp_path / "encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    assert main(["compare", str(file)]) == 2
    assert f"toy was started with other content of {weights}; choose" in capsys.readouterr().err
    other = shutil.copytree(weights.parent, tmp_path / "other")
    for key, value in {"weights": "random", "init_from": str(other)}.items():
        assert main(["compare", str(write_files(rows={"ours": {**rows["ours"], key: value}}, seeds=[1]))]) == 2
        assert re.search(rf"toy was started with another model\.{key}: '.*', now '{value}'; ", capsys.readouterr().err)
    assert started == ["ours/toy"]


def test_a_comparison_has_one_precision(
    write_files: Callable[..., Path],
    started: list[str],
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches one table of bf16 and fp32 because the comparison was resumed on another machine, and one of an earlier
    version that cannot be resumed."""
    file, record = write_files(rows={"ours": {"init_from": str(encoder)}}, seeds=[1]), tmp_path / "compare/runs.json"
    task = tmp_path / "toy.yaml"
    task.write_text(task.read_text().replace("precision: fp32", "precision: auto"))
    monkeypatch.setattr("finetune.device.has_native_bf16", lambda _: False)
    assert main(["compare", str(file)]) == 0
    monkeypatch.setattr("finetune.device.has_native_bf16", lambda _: True)
    assert main(["compare", str(file)]) == 2
    advice = "'fp32', now 'bf16' (set training.precision: fp32 to resume); choose"
    assert f"was started with another training.precision: {advice}" in capsys.readouterr().err
    record.write_text(record.read_text().replace('"training.precision": "fp32"', '"training.precision": "auto"'))
    assert main(["compare", str(file)]) == 0
    assert started == ["ours/toy"]


def test_a_row_starts_from_one_checkpoint(
    write_files: Callable[..., Path],
    started: list[str],
    encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a row whose tasks start from different checkpoints, because its run saved a newer or better one; a
    comparison that cannot be resumed, or seeds that are added to other weights; and a row that keeps a checkpoint,
    which may be deleted, after its folder was removed."""

    def save(step: int, last_bytes: bytes = b"") -> Path:
        checkpoint = checkpoint_path(tmp_path / "run" / "checkpoints", step)
        shutil.copytree(encoder, checkpoint / "hf")
        weights = checkpoint / "hf" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[: -len(last_bytes) or None] + last_bytes)
        mark_complete(checkpoint)
        return checkpoint / "hf"

    first = save(1)
    file = write_files(rows={"ours": {"init_from": str(tmp_path / "run")}}, seeds=[1])
    assert main(["compare", str(file), "--dry_run"]) == 0
    assert f"--model.init_from={first}" in capsys.readouterr().out
    assert main(["compare", str(file)]) == 0
    cell = read_tables(tmp_path / "compare")["ours"]["toy"]
    assert (cell["init_from"], cell["step"]) == (str(first), 1)
    save(2)
    assert main(["compare", str(file)]) == 0
    newest = save(3, b"\1\2\3\4")
    capsys.readouterr()
    assert main(["compare", str(file)]) == 0
    line = f"{tmp_path}/run: keeping step 1, with which this began; to start from step 3, choose another run folder, or"
    assert capsys.readouterr().err.count(line) == 1
    assert started == ["ours/toy"]
    write_best(tmp_path / "run" / "checkpoints", 3)
    names = {"ours": "run/checkpoints/best", "second": "run"}
    rows = {row: {"init_from": str(tmp_path / name)} for row, name in names.items()}
    capsys.readouterr()
    assert main(["compare", str(write_files(rows=rows, seeds=[1, 2])), "--dry_run"]) == 0
    assert re.findall(r"init_from=(\S+)", capsys.readouterr().out) == [str(first), str(newest)]
    shutil.rmtree(first.parent)
    assert main(["compare", str(file)]) == 2
    expected = f"compare.yaml: rows.ours.init_from: recorded by earlier runs: {first} does not exist; restore it, or "
    assert f"{expected}remove the folders of these runs to run them again" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "compare" / "ours")
    assert main(["compare", str(file), "--dry_run"]) == 0
    assert f"--model.init_from={newest}" in capsys.readouterr().out


def test_rows_fork_one_checkpoint(
    write_files: Callable[..., Path],
    wordpiece_corpus: Path,
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches rows that fork the checkpoint that is the newest one when they begin, also after a restart, a row that
    cannot be resumed because another one names a checkpoint of the same run, and one whose `init_from` is another
    checkpoint than it forks."""
    first, second, third = (checkpoint_path(tmp_path / "run" / "checkpoints", step) for step in (1, 2, 3))
    rows = {}
    for name, parent in {"a": first, "b": tmp_path / "run", "c": tmp_path / "run", "d": tmp_path / "run"}.items():
        file = tmp_path / f"{name}.yaml"
        rows[name] = {"init_from": str(parent if name == "d" else encoder), "pretrain": str(file)}
        tree = {"run": {"dir": "replaced", "resume": str(parent)}, "schedule": {"steps": 6}}
        file.write_text(yaml.safe_dump({**tree, "corpus": {"train": str(wordpiece_corpus)}}))
    planned = {"evaluation.best_metric": None, "model.max_positions": None}
    monkeypatch.setattr(compare_plan, "validate_pretraining", lambda *_: planned)  # the checkpoints have no state
    path = write_files(rows=rows)
    shutil.copytree(encoder, first / "hf")
    mark_complete(first)
    for newest in (second, third):
        shutil.copytree(first, newest)
        assert main(["compare", str(path), "--dry_run"]) == 0
        printed = capsys.readouterr().out
        assert re.findall(r"--run.resume=(\S+)", printed) == [str(first), *[str(second)] * 3]
        assert re.findall(r"--model.init_from=(\S+) --run.dir=\S+/d/pretrain", printed) == [f"{second}/hf"]
        began = {"a/pretrain": first, "c/pretrain": second}
        for name in began:
            (tmp_path / "compare" / name).mkdir(parents=True, exist_ok=True)
        record = {name: {"config": {"run.resume": str(checkpoint)}} for name, checkpoint in began.items()}
        write_json(tmp_path / "compare" / "runs.json", record)


def test_a_run_that_has_not_finished_is_named(
    write_files: Callable[..., Path], encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a row of half a pretraining, or of its overfitted end, beside finished ones, without a word; and a
    traceback for a model that is not of the checkpoints beside it."""
    run = RunFolder(tmp_path / "run")
    for step in (1000, 2000):
        shutil.copytree(encoder, checkpoint_path(run.checkpoints, step) / "hf")
        mark_complete(checkpoint_path(run.checkpoints, step))
    write_best(run.checkpoints, 1000)
    run.logs.mkdir()
    time = {"start": 1.0, "time": 2.0, "step": 2000, "reached": 2000, "activity": "training", "seconds": {}}
    file = write_files(rows={"ours": {"init_from": str(run.path)}})
    line = f"{run.path}: this run has not finished (stopped): its newest checkpoint is step 2,000 of 9,000\n"
    for outcome, steps, said in ((Outcome.STOPPED, 9000, 1), (Outcome.DONE, 9000, 0), (Outcome.STOPPED, 2000, 0)):
        write_outcome(run, outcome)
        run.goodput.write_text(json.dumps({**time, "total_steps": steps}) + "\n")
        assert main(["compare", str(file), "--dry_run"]) == 0
        error = capsys.readouterr().err
        assert (error.count(line), error.count("has not finished")) == (said, said)
        assert error.count("this is its newest checkpoint; the best one is step 1,000") == 1
    file = write_files(rows={"ours": {"init_from": str(run.checkpoints / "best")}})
    assert main(["compare", str(file), "--dry_run"]) == 0
    assert "newest" not in capsys.readouterr().err
    shutil.copytree(encoder, run.path, dirs_exist_ok=True)
    assert main(["compare", str(write_files(rows={"ours": {"init_from": str(run.path)}})), "--dry_run"]) == 0
    assert "newest" not in capsys.readouterr().err


def test_a_run_whose_folder_was_removed_runs_again(
    write_files: Callable[..., Path],
    started: list[str],
    encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches one table of cells that were trained differently, and a removed cell that ends in a message on missing
    results or may not change its config."""
    file = write_files(rows={"ours": {"init_from": str(encoder)}}, seeds=[1])
    assert main(["compare", str(file)]) == 0
    task = tmp_path / "toy.yaml"
    task.write_text(task.read_text().replace("epochs: 2", "epochs: 1"))
    assert main(["compare", str(file)]) == 2
    error = capsys.readouterr().err
    assert "ours/toy was started with another training.epochs: 2, now 1; choose another run.dir" in error
    shutil.rmtree(tmp_path / "compare/ours/toy")
    assert main(["compare", str(file)]) == 0
    assert started == ["ours/toy"] * 2


def test_dry_run_prints_the_commands(
    write_files: Callable[..., Path], started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a dry run that starts or writes something, and rows that do not reach the commands."""
    assert main(["compare", str(write_files()), "--dry_run"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert f"--run.dir={tmp_path}/compare/ours/toy" in first
    assert "--model.weights=random" in second
    assert "--training.seeds=1,2" in first
    assert not started
    assert not (tmp_path / "compare").exists()


def test_rows_of_the_hub_keep_their_commit(
    hub: HubServer, encoder: Path, write_files: Callable[..., Path], started: list[str], tmp_path: Path
) -> None:
    """Catches a comparison that is refused, or mixes models, because someone has pushed to the Hub since it began."""
    commit = hub.repository("org/tiny").push_folder(encoder)
    file = write_files(rows={"hub": {"init_from": "org/tiny", "weights": "random"}}, seeds=[1])
    assert main(["compare", str(file)]) == 0
    record = json.loads((tmp_path / "compare" / "runs.json").read_text())
    assert record["hub/toy"]["config"]["model.init_from"] == f"org/tiny@{commit}"
    hub.repository("org/tiny").push_folder(encoder, notes__txt=b"new")
    assert main(["compare", str(file)]) == 0
    assert started == ["hub/toy"]
