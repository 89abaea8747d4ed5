"""A linear probe of a tiny encoder."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModel, AutoTokenizer

from finetune.model import build_model
from finetune.probe import features, main, probe
from finetune.resolve import load_run_config, resolve


@pytest.fixture
def task(tmp_path: Path, encoder: Path, task_files: dict[str, str]) -> Path:
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "task": {**task_files, "columns": {"label": "label", "text": "text"}},
        "model": {"init_from": str(encoder), "max_seq_length": 16},
        "training": {"precision": "fp32"},
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_probe_separates_what_the_encoder_separates(task: Path) -> None:
    """Catches labels in another order than their rows, features of other rows, and a score on train."""
    scores = probe(resolve(load_run_config(task)))
    assert set(scores) == {"accuracy", "macro_f1", "weighted_f1", "uar", "matthews"}
    assert scores["accuracy"] > 0.85
    assert scores == probe(resolve(load_run_config(task)))


def test_features_are_the_mean_over_the_tokens(task: Path, encoder: Path) -> None:
    """Catches padding in the mean, hidden states of another layer, and rows in the order of their lengths."""
    run = resolve(load_run_config(task))
    split = run.task.splits["validation"]
    found = features(build_model(run.model).model.base_model, split, run)
    tokenizer, alone = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    assert len({example.longest for example in split.examples}) > 1
    for record, row in list(zip(split.table.records, found, strict=True))[:8]:
        with torch.no_grad():
            hidden = alone(**tokenizer(record.values["text"], return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(row, hidden.mean(dim=0).numpy(), atol=1e-5)


def test_the_process_writes_results_or_says_why_not(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches scores that `deepcloze watch` does not find, a head that is announced and not used, and a traceback for a
    mistake."""
    assert main([str(task), f"run.dir={tmp_path / 'probe'}", "task.test=null"]) == 0
    assert " head" not in capsys.readouterr().err
    results = json.loads((tmp_path / "probe" / "results.json").read_text())
    assert list(results["splits"]) == ["validation"]
    assert results["splits"]["validation"]["accuracy"]["mean"] > 0.85
    assert main([str(task), "model.init_from=/nowhere"]) == 2
    assert "deepcloze: model.init_from: /nowhere does not exist" in capsys.readouterr().err


def test_a_model_without_hidden_states_of_tokens_is_rejected(
    task: Path, classifier_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback for an encoder that shortens sequences."""
    assert main([str(task), f"model.init_from={classifier_of('funnel')}"]) == 2
    assert "deepcloze: the model has no hidden state for each token" in capsys.readouterr().err


def test_a_train_split_with_one_class_is_rejected(
    task: Path, task_files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback of scikit-learn where the labels are given, so that reading the data does not find it."""
    train = Path(task_files["train"])
    header, *rows = train.read_text().splitlines()
    label = rows[0].split("\t")[0]
    train.write_text("\n".join([header, *(row for row in rows if row.startswith(label))]) + "\n")
    assert main([str(task), "task.labels=[high, low]"]) == 2
    assert f"{train}: every row has the label '{label}'" in capsys.readouterr().err
