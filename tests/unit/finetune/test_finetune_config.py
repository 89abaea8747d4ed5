import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from experiment.config import build_config, load_config
from experiment.config.field_types import PathName
from experiment.config.recipes import find_recipe
from experiment.errors import UserError
from finetune.config import FinetuneConfig
from finetune.data.splits import read_splits

MINIMAL = {"run": {"dir": "r"}, "task": {"train": "a.csv", "validation": "b.csv"}, "model": {"init_from": "m"}}


def config(**overrides: str) -> FinetuneConfig:
    return build_config(FinetuneConfig, MINIMAL, {key.replace("__", "."): raw for key, raw in overrides.items()})


def test_the_recipe_of_afqmc_reads_the_files_of_clue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a recipe for another format than that of CLUE's archive: a JSON object per line, no labels in test."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data/AFQMC"
    folder.mkdir(parents=True)
    pair = {"sentence1": "花呗怎么还款", "sentence2": "怎么还花呗"}
    for name in ("train", "dev"):
        lines = [json.dumps(pair | {"label": label}) for label in "01"]
        (folder / f"{name}.json").write_text("\n".join(lines), encoding="utf-8")
    (folder / "test.json").write_text(json.dumps({"id": 0} | pair), encoding="utf-8")
    task = load_config(FinetuneConfig, find_recipe("afqmc").path, {"model.init_from": "m"}).task
    splits = read_splits(task, None)
    assert {name: len(table) for name, table in splits.items()} == {"train": 2, "validation": 2, "test": 1}
    assert [record.values["label"] for record in splits["train"].records] == ["0", "1"]


def test_labels_and_columns_may_look_like_numbers() -> None:
    """Catches `labels: [0, 1]` and `columns: {label: 1}` being rejected as not text."""
    made = config(task__labels="[0, 1]", task__columns="{label: 1, text: 3}", task__header="null")
    assert made.task.labels == ("0", "1")
    assert made.task.columns.model_dump() == {"label": "1", "text": "3", "text_pair": None}


@pytest.mark.parametrize("written", ["none", "null"])
def test_files_without_a_header(written: str) -> None:
    """Catches a value that messages advise, and that the config rejects or takes for a header."""
    made = config(task__labels="[0, 1]", task__columns="{label: 1, text: 3}", task__header=written)
    assert made.task.header is None
    assert not made.task.file_format().csv.header


def test_a_tab_can_be_typed() -> None:
    r"""Catches `--task.sep='\t'` being rejected as two characters: shells do not turn it into a tab."""
    assert config(task__sep=r"\t").task.sep == "\t"


@pytest.mark.parametrize(
    ("key", "raw", "message"),
    [
        ("task.header", "null", r"task.*columns\.text: without a header .* found 'sentence1'"),
        ("task.labels", "[a]", "needs two or more"),
        ("task.labels", "[a, b, a]", "named twice: a"),
        ("task.metric", "f1", "task.metric"),
        ("task.kind", "clasification", "unknown kind 'clasification'; did you mean 'classification'"),
        ("task.colums", "{}", "did you mean 'task.columns'"),
        ("task.test", "{train: a.csv}", r"^command line: 'task\.test\.train': cannot name a test split"),
        ("task.test", "{a/b: a.csv}", r"^command line: 'task\.test\.a/b': cannot name a test split: expected letters"),
        ("task.validation_share", "0.6", r"task\.validation_share"),
        ("training", "{patience: 2, fit_on: train+validation}", "patience: needs a validation split"),
        ("training.seeds", "[]", "needs one or more"),
        ("training.seeds", "[1, 1]", "each once"),
        ("training.lr", "high", r"training\.lr.*number"),
        ("training.epochs", "0", r"training\.epochs"),
        ("model.max_seq_length", "2", r"model\.max_seq_length"),
        ("task.sep", "ab", r"'task\.sep': expected one character \(\\t is a tab\), found 'ab'"),
    ],
)
def test_bad_values_are_rejected_by_key(key: str, raw: str, message: str) -> None:
    """Catches a bad value that ends in a traceback, or is found only after minutes of training."""
    tree: dict[str, Any] = MINIMAL
    with pytest.raises(UserError, match=message):
        build_config(FinetuneConfig, tree, {key: raw})


def test_a_task_with_a_typo_is_no_comparison() -> None:
    """Catches a misspelled section that is taken for one of another command."""
    tree = {key: value for key, value in MINIMAL.items() if key != "task"} | {"tasks": {}}
    with pytest.raises(UserError, match="unknown config key 'tasks'; did you mean 'task'"):
        build_config(FinetuneConfig, tree)


@pytest.mark.parametrize("key", ["run.dir", "task.train", "task.validation", "task.test"])
def test_a_path_with_a_nul_character_is_rejected(key: str) -> None:
    """Catches a traceback: YAML can write such a path, but no system can open it."""
    with pytest.raises(UserError, match=rf"'{key}': a path cannot contain a NUL character"):
        build_config(FinetuneConfig, MINIMAL, {key: "a\0b"})


@pytest.mark.parametrize("key", ["run.dir", "task.train", "task.test", "model.init_from"])
def test_a_home_folder_can_be_abbreviated(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a folder called `~` in the working directory: neither YAML nor `--run.dir=~/run` is expanded."""
    monkeypatch.setenv("HOME", "/home/me")
    section, _, name = key.partition(".")
    for written, path in {"~/a": "/home/me/a", "a~": "a~", "~nobody-here/a": "~nobody-here/a"}.items():
        config = build_config(FinetuneConfig, MINIMAL, {key: written})
        assert getattr(getattr(config, section), name) == path


def test_a_variable_in_a_path_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a folder called `$SCRATCH` in the working directory, and an existing path like that which is refused."""
    monkeypatch.chdir(tmp_path)
    for path, variable in {"$SCRATCH/runs/a": "SCRATCH", "/data/${USER}/b": "{USER}"}.items():
        with pytest.raises(UserError, match=rf"'run\.dir': only a shell replaces \${variable} by its value"):
            build_config(FinetuneConfig, MINIMAL, {"run.dir": path})
        with pytest.raises(ValidationError, match=rf"only a shell replaces \${variable} by its value"):
            TypeAdapter(PathName).validate_python(path)
    (tmp_path / "$a.csv").touch()
    (tmp_path / "$proj").mkdir()
    for path in ("$a.csv", "cost$US.csv", "a/$", "a/$(b)", "$proj/new", "s3://b/$x/y"):
        assert build_config(FinetuneConfig, MINIMAL, {"task.train": path}).task.train == path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build_config(FinetuneConfig, MINIMAL, {"task.train": "~/$a.csv"}).task.train == f"{tmp_path}/$a.csv"


@pytest.mark.parametrize("kind", ["regression", "question_answering"])
def test_labels_of_a_kind_without_any_are_rejected(kind: str) -> None:
    """Catches a setting that is ignored silently."""
    with pytest.raises(UserError, match=f"labels: tasks of kind '{kind}' have none"):
        build_config(FinetuneConfig, MINIMAL, {"task.kind": kind, "task.labels": "[a, b]"})


def test_an_unknown_kind_is_the_only_complaint() -> None:
    """Catches keys of the meant kind that are called unknown too: the misspelled name hides them; and no line."""
    tree = {**MINIMAL, "task": {"train": "a.csv", "kind": "regresion", "columns": {"label": "score"}}}
    with pytest.raises(UserError) as caught:
        build_config(FinetuneConfig, tree, origin="a.yaml", lines={("task",): 1, ("task", "kind"): 3})
    assert str(caught.value) == "a.yaml, line 3: 'task.kind': unknown kind 'regresion'; did you mean 'regression'?"
