"""What editors know of configs: the JSON Schema, and the line that names it."""

import json
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from documented import PAGES, configs
from experiment.config import build_config, dump_config, flatten, load_config
from experiment.config.json_schema import json_schema
from experiment.config.recipes import all_recipes
from experiment.config.yaml_dialect import read_yaml
from experiment.errors import UserError
from launcher.cli import main
from launcher.configs import CONFIGS

SECTIONS = {"corpus": "pretrain", "task": "finetune", "rows": "compare", "steps": "clean"}
DOCUMENTED = [
    pytest.param(text, id=f"{page}-{name}") for page in PAGES for name, text in configs(page).items()
]  # also those of cleanings, which have no recipes
MINIMAL: Mapping[str, dict[str, Any]] = {
    "pretrain": {
        "run": {"dir": "run"},
        "model": {"config": {"model_type": "bert"}},
        "corpus": {"train": "corpus"},
        "schedule": {"steps": 10},
    },
    "finetune": {"run": {"dir": "run"}, "task": {"train": "train.csv"}, "model": {"init_from": "model"}},
    "compare": {"run": {"dir": "run"}, "rows": {"bert": {"init_from": "model"}}, "tasks": ["task.yaml"]},
    "clean": {"source": "raw", "output": "clean"},
}


@cache
def validator(kind: str) -> Draft202012Validator:
    schema = json_schema(CONFIGS[kind])
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def changed(kind: str, changes: str) -> dict[str, Any]:
    """The minimal config with some keys of its sections, in YAML."""
    config = dict(MINIMAL[kind])
    for name, value in read_yaml(changes).items():
        before = config.get(name)
        config[name] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    return config


@pytest.mark.parametrize("recipe", all_recipes(), ids=lambda recipe: f"{recipe.kind}-{recipe.name}")
def test_recipes_are_valid(recipe: Any, tmp_path: Path) -> None:
    """Catches a recipe that does not match the config or in which an editor marks mistakes, and a written config that
    does not read back the same."""
    tree = read_yaml(recipe.path.read_text(encoding="utf-8"))
    overrides = {}
    if recipe.kind == "finetune":  # to be set by the user
        overrides = {"model.init_from": "model"}
        tree["model"].setdefault("init_from", "model")
    validator(recipe.kind).validate(tree)
    loaded = load_config(CONFIGS[recipe.kind], recipe.path, overrides)
    (tmp_path / "config.yaml").write_text(dump_config(loaded))
    assert load_config(CONFIGS[recipe.kind], tmp_path / "config.yaml") == loaded


@pytest.mark.parametrize(("task", "validators"), [({}, ["required"]), ({"task": None}, ["type"])])
def test_a_task_that_is_not_written_yet_is_one_mistake(task: dict[str, None], validators: list[str]) -> None:
    """Catches an editor that marks it once for each kind of task."""
    config = {key: value for key, value in MINIMAL["finetune"].items() if key != "task"} | task
    assert [error.validator for error in validator("finetune").iter_errors(config)] == validators


def test_editors_complete_presets() -> None:
    """Catches a key whose names are known to no editor."""
    (examples,) = [
        section["properties"]["ds_config"]["examples"]
        for section in json_schema(CONFIGS["pretrain"])["$defs"].values()
        if "ds_config" in section.get("properties", {})
    ]
    assert "bf16_zero1" in examples


@pytest.mark.parametrize("text", DOCUMENTED)
def test_configs_in_the_docs_are_valid(text: str) -> None:
    """Catches an editor that marks mistakes in an example."""
    config = read_yaml(text)
    kind = next(kind for section, kind in SECTIONS.items() if section in config)
    errors = validator(kind).iter_errors(config)
    assert [error for error in errors if error.validator != "required"] == [], "a command may give the other keys"


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("pretrain", "optimizer: {lr: 1e-3, betas: [0, 1e-1]}"),
        ("pretrain", "schedule: {steps: null, tokens: 3e9, stages: []}"),
        ("pretrain", "checkpoint: {every_steps: null, every_minutes: 5}"),
        ("pretrain", "masking: {rate: [.3, 0.15], schedule: linear}"),
        ("pretrain", "corpus: {train: [{path: a}, {path: s3://b/c, weight: 2}], eval: {books: b}, cache: d}"),
        ("pretrain", "engine: {compile: true, ds_config: bf16_zero1}"),
        ("pretrain", "engine: {compile: on}"),
        ("pretrain", "model: {config: {model_type: bert, anything: [1, {a: null}]}}"),
        ("finetune", "task: {labels: [0, 1], columns: {text: 0, label: '1'}, header: null}"),
        ("clean", "header: 0"),
        ("clean", "header: null"),
        ("finetune", "task: {test: {matched: a.csv, mismatched: b.csv}, metric: macro_f1}"),
        ("finetune", "task: {kind: regression, metric: spearman}"),
        ("finetune", "task: {kind: multiple_choice, columns: {choices: [a, b]}}"),
        ("finetune", "training: {evaluate_every: 100, seeds: [1, 2], warmup_steps: null}"),
        ("compare", "rows: {random: {init_from: a, weights: random}}"),
        ("clean", "steps: [exact_dedup: {}, minhash: {threshold: 0.8}, gopher_quality: null]"),
        ("clean", "source: [a, b]"),
    ],
)
def test_all_spellings_are_accepted(kind: str, changes: str) -> None:
    """Catches a valid value that an editor marks as a mistake."""
    config = changed(kind, changes)
    build_config(CONFIGS[kind], config)
    validator(kind).validate(config)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("pretrain", "optimiser: {lr: 1}"),
        ("pretrain", "batch: {sequence: 64}"),
        ("pretrain", "optimizer: {lr: fast}"),
        ("pretrain", "optimizer: {lr: '1e-3'}"),
        ("pretrain", "optimizer: {lr: 0}"),
        ("pretrain", "optimizer: {betas: [0.9]}"),
        ("pretrain", "optimizer: {name: adam}"),
        ("pretrain", "schedule: {steps: 1.5}"),
        ("pretrain", "schedule: null"),
        ("pretrain", "corpus: {train: [{weight: 1}]}"),
        ("pretrain", "engine: {compile: yes}"),
        ("pretrain", "run: {dir: null}"),
        ("finetune", "task: {kind: clasification}"),
        ("finetune", "task: {kind: regression, metric: accuracy}"),
        ("finetune", "task: {metric: rmse}"),
        ("finetune", "task: {columns: {texts: a}}"),
        ("finetune", "task: {zero_shot: true}"),
        ("finetune", "task: [train.csv]"),
        ("finetune", "training: {seeds: 42}"),
        ("finetune", "training: {class_weights: yes}"),
        ("finetune", "training: {warmup_ratio: 2}"),
        ("finetune", "epochs: 3"),
        ("compare", "tasks: []"),
        ("compare", "rows: {bert: {init_form: a}}"),
        ("compare", "seeds: [-1]"),
        ("clean", "steps: [min_hash: {}]"),
        ("clean", "steps: [minhash: {threshhold: 0.8}]"),
        ("clean", "steps: {minhash: {}}"),
    ],
)
def test_mistakes_are_rejected(kind: str, changes: str) -> None:
    """Catches a mistake that an editor does not mark."""
    config = changed(kind, changes)
    with pytest.raises(UserError):
        build_config(CONFIGS[kind], config)
    assert not validator(kind).is_valid(config)


@pytest.mark.parametrize("kind", CONFIGS)
def test_all_keys_are_described(kind: str) -> None:
    """Catches a key that editors show without its meaning, such as one that inherits its docstring."""
    sections = json_schema(CONFIGS[kind])["$defs"].values()
    fields = {name: field for section in sections for name, field in section.get("properties", {}).items()}
    assert len(fields) > 5
    assert [name for name, field in fields.items() if not field.get("description")] == []


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_new_config_names_its_schema(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a schema that is not where the first line says, a config whose keys it does not know, and a next command
    that does not find a file with a space in its name."""
    file = tmp_path / "my configs" / "mine.yaml"
    assert main(["config", kind, "--new", str(file)]) == 0
    assert shlex.split(capsys.readouterr().out.partition("run: ")[2])[-1] == str(file)
    text = file.read_text(encoding="utf-8")
    schema = file.parent / text.partition("\n")[0].removeprefix("# yaml-language-server: $schema=")
    assert json.loads(schema.read_text(encoding="utf-8")) == json_schema(CONFIGS[kind])
    assert {error.validator for error in validator(kind).iter_errors(read_yaml(text))} <= {"type", "anyOf"}, "no values"
    assert main(["config", kind, "--new", str(file)]) == 2
    assert "mine.yaml exists already" in capsys.readouterr().err
    (tmp_path / "link.yaml").symlink_to("missing.yaml")
    assert main(["config", kind, "--new", str(tmp_path / "link.yaml")]) == 2
    assert (tmp_path / "link.yaml").is_symlink()


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("pretrain", ["run.dir", "model.config", "corpus.train", "schedule.steps"]),
        ("finetune", ["run.dir", "task.train", "task.columns.text", "task.columns.label", "model.init_from"]),
        ("compare", ["run.dir", "rows.NAME.init_from", "tasks"]),
        ("clean", ["source", "output", "steps"]),
    ],
)
def test_a_new_config_has_the_keys_that_runs_need(kind: str, keys: list[str], tmp_path: Path) -> None:
    """Catches a new config that is rejected when its keys have values."""
    assert main(["config", kind, "--new", str(tmp_path / "mine.yaml")]) == 0
    assert list(flatten(read_yaml((tmp_path / "mine.yaml").read_text(encoding="utf-8")))) == keys


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches output that is not JSON."""
    assert main(["config", "pretrain", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema(CONFIGS["pretrain"])
    assert main(["config", "pretrain", "optimizer", "--schema"]) == 2
