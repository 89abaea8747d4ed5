"""Damaged files of every kind give one message and exit code 2."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli import main
from runs import sampled, small_tree

CONTENTS: dict[str, bytes | None] = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "object": b"{}",
    "text": b'"x"',
    "cut": b'{"model_type": "be',
    "NUL": b"\0" * 40,
    "not UTF-8": b'{"a": "\xff"}',
    "long number": b'{"a": ' + b"9" * 10_000 + b"}",
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "missing": None,
}
VALUES: dict[str, Any] = {
    "null": None,
    "list": [],
    "object": {},
    "text": "x",
    "negative": -1,
    "huge": 10**30,
    "fraction": 0.5,
    "true": True,
    "deep": [[[{"a": None}]]],
}


@pytest.fixture(scope="session")
def model_folder(wordpiece: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("models") / "model"
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=200, max_position_embeddings=64, **shape)).save_pretrained(folder)
    shutil.copytree(wordpiece, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def files(tmp_path: Path, model_folder: Path, wordpiece_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a corpus, a model, a DeepSpeed JSON and a config that uses them."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    shutil.copytree(model_folder, tmp_path / "model")
    shutil.copytree(wordpiece_corpus, tmp_path / "corpus")
    shutil.copy("ds_configs/fp32_zero1.json", tmp_path / "ds.json")
    sections = {"model": {"init_from": str(tmp_path / "model")}, "engine": {"ds_config": str(tmp_path / "ds.json")}}
    tree = small_tree(tmp_path / "run", tmp_path / "corpus", **sections)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def damage(path: Path, content: str) -> None:
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif (data := CONTENTS[content]) is not None:
        path.write_bytes(data)


def assert_refused(capfd: pytest.CaptureFixture[str], *argv: str, valid: bool = False, shows: str = "") -> None:
    """`valid`: the input may be accepted, too. `shows`: a part of the message."""
    capfd.readouterr()
    code = main(argv)
    error = capfd.readouterr().err
    assert "Traceback" not in error
    if not (valid and code == 0):
        assert code == 2, error
        messages = [line for line in error.splitlines() if line.startswith("deepcloze: ")]
        assert len(messages) == 1, error
        assert error.splitlines()[-1] == messages[0], "more than a line"
        assert len(messages[0]) < 1000
        assert shows in messages[0]


JSON_FILES = [
    "corpus/manifest.json",
    "corpus/tokenizer/tokenizer.json",
    "model/config.json",
    "model/tokenizer.json",
    "ds.json",
]


@pytest.mark.parametrize("content", [*CONTENTS, "folder"])
@pytest.mark.parametrize(
    "name", [*JSON_FILES, "corpus/tokenizer/tokenizer_config.json", "model/tokenizer_config.json", "run.yaml"]
)
def test_a_damaged_file(files: Path, capfd: pytest.CaptureFixture[str], name: str, content: str) -> None:
    """Catches a traceback for a file that is torn, of another kind or a folder."""
    damage(files / name, content)
    valid = name.endswith("tokenizer_config.json") or (name, content) in {("ds.json", "object")}
    assert_refused(capfd, "pretrain", "--config", str(files / "run.yaml"), "--dry_run", valid=valid)


READERS = ["validate FILE", "plan --config FILE", "finetune --config FILE", "compare FILE"]
READERS += ["sweep --config FILE --grid a=1"]
DAMAGED_CONFIGS = [(command, content) for command in READERS for content in (*CONTENTS, "folder")]


@pytest.mark.parametrize(
    ("command", "content"),
    sampled(
        DAMAGED_CONFIGS, [case for case in DAMAGED_CONFIGS if case[1] != "nested lists"]
    ),  # see `test_a_damaged_file`
)
def test_a_damaged_config(files: Path, capfd: pytest.CaptureFixture[str], command: str, content: str) -> None:
    """Catches a traceback of one of the commands that read a config before it is loaded."""
    damage(files / "run.yaml", content)
    assert_refused(capfd, *command.replace("FILE", str(files / "run.yaml")).split())


def keys(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values, except below the second item of a list and the 20th key of an object."""
    items = (
        list(value.items())[:20]
        if isinstance(value, dict)
        else list(enumerate(value))[:1]
        if isinstance(value, list)
        else []
    )
    for key, child in items:
        yield (*above, key)
        yield from keys(child, (*above, key))


@pytest.mark.soak
@pytest.mark.parametrize("name", JSON_FILES)
def test_a_file_with_a_wrong_value(files: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    """Catches a traceback for a JSON file that lacks a key, or has a value of another type or size."""
    original = json.loads((files / name).read_text())
    failed = []
    for path in keys(original):
        for kind in [*VALUES, "missing"]:
            tree = json.loads(json.dumps(original))
            *parents, last = path
            at: Any = tree
            for key in parents:
                at = at[key]
            if kind == "missing":
                del at[last]
            else:
                at[last] = VALUES[kind]
            (files / name).write_text(json.dumps(tree))
            try:
                assert_refused(capfd, "pretrain", "--config", str(files / "run.yaml"), "--dry_run", valid=True)
            except BaseException as error:
                failed.append(f"{path} {kind}: {type(error).__name__} {str(error)[:200]}")
    assert not failed, "\n".join(failed)


ROWS = {
    "empty": b"",
    "NUL": b"text\na\0b\n\0\n",
    "only NUL": b"\0",
    "header only": b"text\n",
    "line ends only": b"\n\n\r\n",
    "UTF-16": "text\nä\n".encode("utf-16"),
    "open quote": b'text\n"a\n',
}


@pytest.mark.parametrize(
    "name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.txt", "a.zip", "a.tar.gz", "a.txt.gz", "a.txt.zst"]
)
@pytest.mark.parametrize("content", [*ROWS, "folder"])
def test_a_damaged_source(
    tmp_path: Path, wordpiece: Path, capfd: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    """Catches a traceback for text that cannot be read."""
    if content == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(ROWS[content])
    command = f"corpus --source {tmp_path / name} --tokenizer {wordpiece} --output {tmp_path}/c --workers=1"
    assert_refused(capfd, *command.split(), valid=True)


@pytest.mark.parametrize("what", ["tokenizer", "output", "corpus", "checkpoint", "new tokenizer"])
def test_a_file_in_place_of_a_folder(files: Path, capfd: pytest.CaptureFixture[str], what: str) -> None:
    """Catches a traceback for a file where a folder is expected."""
    (files / "file").write_text("x\n")
    for given in ("file", "file/below"):
        here = {name: str(files / given) if name == what else str(files / name) for name in ("corpus", "checkpoint")}
        tokenizer = files / given if what == "tokenizer" else files / "corpus" / "tokenizer"
        if what == "new tokenizer":
            command = f"tokenizer --source {files}/file --output {files / given} --vocab_size 60"
        elif what in ("tokenizer", "output"):
            output = files / given if what == "output" else files / "new"
            command = f"corpus --source {files}/file --tokenizer {tokenizer} --output {output}"
        else:
            model = here["checkpoint"] if what == "checkpoint" else files / "model"
            command = f"evaluate --checkpoint {model} --corpus {here['corpus']}"
        assert_refused(capfd, *command.split())


@pytest.fixture
def model_commands(files: Path, model_folder: Path) -> list[list[str]]:
    """The commands that build `files/model`, or `files/classifier`, from its config."""
    from transformers import BertConfig, BertForSequenceClassification

    BertForSequenceClassification(BertConfig.from_pretrained(model_folder)).save_pretrained(files / "classifier")
    shutil.copytree(model_folder, files / "classifier", dirs_exist_ok=True, ignore=lambda *_: ["model.safetensors"])
    config = json.loads((files / "model" / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (files / "classifier" / "config.json").write_text(json.dumps(config))
    (files / "rows.csv").write_text("label,sentence1\n0,ba de\n1,fi go\n")
    task = {
        "run": {"dir": str(files / "finetuned")},
        "model": {"init_from": str(files / "model"), "max_seq_length": 16},
        "task": {"train": str(files / "rows.csv"), "validation": str(files / "rows.csv")},
    }
    (files / "task.yaml").write_text(yaml.safe_dump(task))
    model, classifier = str(files / "model"), str(files / "classifier")
    return [
        ["predict", "--model", classifier, "--input", str(files / "rows.csv"), "--output", str(files / "out.csv")],
        ["serve", "--model", model, "--port", "0"],
        ["export", "--checkpoint", classifier, "--output", str(files / "onnx"), "--format", "onnx"],
        ["finetune", "--config", str(files / "task.yaml")],
        ["pretrain", "--config", str(files / "run.yaml"), "--dry_run"],
        ["evaluate", "--checkpoint", model, "--corpus", str(files / "corpus")],
    ]


IMPOSSIBLE: list[tuple[str, Any, str]] = [
    ("num_labels", 10**9, "'num_labels' is 1,000,000,000; expected at most"),
    ("num_hidden_layers", 10**9, "'num_hidden_layers' is 1,000,000,000; expected 1 to 1,000"),
    ("num_hidden_layers", 0, "'num_hidden_layers' is 0; expected 1 to 1,000"),
    ("hidden_size", 10**9, "it makes a model far larger than its weights"),
    ("vocab_size", 10**9, "it makes a model far larger than its weights"),
    ("max_position_embeddings", 10**9, "it makes a model far larger than its weights"),
    ("hidden_size", -8, "cannot build a 'bert' model"),
    ("intermediate_size", -1, "cannot build a 'bert' model"),
    ("num_attention_heads", 0, "cannot build a 'bert' model"),
    ("hidden_act", "none", "cannot build a 'bert' model"),
    ("hidden_size", "8", "'hidden_size'"),
    ("num_attention_heads", -1, "model cannot compute with its config"),
    ("return_dict", False, "model cannot compute"),
    ("architectures", 5, "architectures'"),
]


@pytest.mark.parametrize(("key", "value", "message"), IMPOSSIBLE)
def test_a_model_config_with_an_impossible_value(
    files: Path,
    model_commands: list[list[str]],
    capfd: pytest.CaptureFixture[str],
    key: str,
    value: Any,
    message: str,
) -> None:
    """Catches a config of a stranger that fills the memory, never ends, or gives a traceback."""
    for folder in ("model", "classifier"):
        path = files / folder / "config.json"
        tree = json.loads(path.read_text()) | {key: value}
        if key == "num_labels":
            tree = {name: child for name, child in tree.items() if name not in ("id2label", "label2id")}
        path.write_text(json.dumps(tree))
    for argv in model_commands:
        assert_refused(capfd, *argv, shows=message, valid=argv[0] == "pretrain" and "compute" in message)


INDEXES: list[tuple[Any, str]] = [
    ({"weight_map": {"a": "../model.safetensors"}}, "'../model.safetensors' is not in this folder"),
    ({"weight_map": {"a": "/etc/model.safetensors"}}, "'/etc/model.safetensors' is not in this folder"),
    ({"weight_map": {"a": "sub/../../b"}}, "'sub/../../b' is not in this folder"),
    ({"weight_map": {"a": 5}}, "expected 'weight_map', which names a file for each tensor"),
    ({"weight_map": []}, "expected 'weight_map'"),
    ([], "expected 'weight_map'"),
]


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize(("index", "message"), INDEXES)
def test_an_index_of_weights_that_are_elsewhere(
    files: Path, model_commands: list[list[str]], capfd: pytest.CaptureFixture[str], name: str, index: Any, message: str
) -> None:
    """Catches a folder of a stranger that makes the process read other files, and a traceback for a damaged index."""
    for folder in ("model", "classifier"):
        (files / folder / "model.safetensors").replace(files / "model.safetensors")
        (files / folder / name).write_text(json.dumps(index))
    for argv in model_commands[::2] if name.startswith("model") else model_commands[1::2]:
        assert_refused(capfd, *argv, shows=message)


@pytest.mark.soak
@pytest.mark.parametrize("command", ["predict", "export", "finetune", "evaluate"])
def test_a_model_config_with_a_wrong_value(
    files: Path, model_commands: list[list[str]], capfd: pytest.CaptureFixture[str], command: str
) -> None:
    """Catches a traceback for a config that lacks a key, or has a value of another type or size, wherever it fails."""
    (argv,) = (argv for argv in model_commands if argv[0] == command)
    path = files / ("classifier" if command in ("predict", "export") else "model") / "config.json"
    original = json.loads(path.read_text())
    failed = []
    for key in [*original, "num_labels", "return_dict", "chunk_size_feed_forward", "output_hidden_states"]:
        for kind, value in {**VALUES, "zero": 0, "large": 10**9}.items():
            path.write_text(json.dumps(original | {key: value}))
            for output in ("onnx", "finetuned"):
                shutil.rmtree(files / output, ignore_errors=True)
            try:
                assert_refused(capfd, *argv, valid=True)
            except BaseException as error:
                failed.append(f"{key} {kind}: {type(error).__name__} {str(error)[:200]}")
    assert not failed, "\n".join(failed)
