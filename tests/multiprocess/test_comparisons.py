"""`deepcloze compare` with real runs."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from experiment.run_files.run_folder import RunFolder
from experiment.run_files.run_lock import is_locked
from launches import Start, wait_for_exit
from runs import TINY, run_config
from waiting import wait_until


@pytest.mark.soak
def test_a_chain_is_compared_with_its_start(
    start: Start, wordpiece: Path, wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a row that is fine-tuned from where its pretraining began, and runs that a killed comparison repeats."""
    tokenizer = AutoTokenizer.from_pretrained(wordpiece)
    tokenizer.save_pretrained(tmp_path / "encoder")
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **TINY)).save_pretrained(tmp_path / "encoder")
    pretraining = run_config(tmp_path / "replaced", wordpiece_corpus)
    del pretraining["model"]["config"]
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(pretraining))
    with (tmp_path / "train.csv").open("w", newline="") as file:
        rows = [("low", "ba de fi"), ("high", "pol rin sta")] * 40
        csv.writer(file).writerows([("label", "text"), *rows])
    task = {"train": str(tmp_path / "train.csv"), "test": str(tmp_path / "train.csv")}
    tree = {
        "run": {"dir": "replaced"},
        "task": {**task, "columns": {"label": "label", "text": "text"}},
        "model": {"init_from": "replaced", "max_seq_length": 16},
        "training": {"epochs": 1, "precision": "fp32"},
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(tree))
    begin = {"init_from": str(tmp_path / "encoder")}
    comparison = {
        "run": {"dir": str(tmp_path / "compare")},
        "rows": {"start": begin, "continued": {**begin, "pretrain": str(tmp_path / "more.yaml")}},
        "tasks": [str(tmp_path / "toy.yaml")],
        "seeds": [1, 2],
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(comparison, sort_keys=False))
    command = (sys.executable, "-m", "launcher", "compare", str(tmp_path / "compare.yaml"), "--num_gpus=1")

    folder = tmp_path / "compare" / "continued"
    killed = start(*command)
    wait_until((folder / "pretrain" / "metrics.jsonl").exists, killed)
    killed.kill()  # its pretraining runs on
    killed.wait()
    wait_until(lambda: not is_locked(RunFolder(folder.parent)))  # its process, which the fork server kills
    code, output = wait_for_exit(start(*command))
    assert code == 0, output
    assert "[1/3] start/toy: already finished" in output

    results = json.loads((folder / "toy" / "results.json").read_text())
    assert results["init"] == str(folder / "pretrain" / "checkpoints" / "step-00000006" / "hf")
    table = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert list(table) == ["start", "continued"]
    assert len(table["continued"]["toy"]["values"]) == 2
    attempts = json.loads((folder / "pretrain" / "provenance.json").read_text())["attempts"]
    assert len(attempts) == 1, "the pretraining that was left is waited for, not run again"
    done = subprocess.run(command, env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("already finished") == 3
