"""A tiny pretrained encoder, and a task that it can learn."""

import csv
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    ConvBertConfig,
    ConvBertForMaskedLM,
)

from empty_figures import leave_figures_empty
from experiment.models.tokenizer import load_tokenizer
from finetune import run as run_module
from finetune.export.command import export_command
from finetune.options import ExportOptions
from finetune.run import finetune
from tiny_models import tiny_fields

WORDS = [f"word{number}" for number in range(40)]
SIZES = {"train": 80, "validation": 20, "test": 20}  # rows of a task that a tiny model learns in seconds
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: more slow tiny models down, most of all on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a masked-LM BERT of 1 layer x 32, 64 positions, with the vocabulary of WORDS."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIALS + WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(SPECIALS + WORDS) + "\n")
    return folder


Rows = Iterable[Iterable[str]]


@pytest.fixture
def write_tsv(tmp_path: Path) -> Callable[[str, Rows], Path]:
    """Writes rows of fields as a TSV file of a given name."""

    def write(name: str, rows: Rows) -> Path:
        path = tmp_path / name
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t").writerows(rows)
        return path

    return write


def labelled_rows(count: int, seed: int) -> list[list[str]]:
    """A header, then rows whose label says which half of WORDS their text is drawn from."""
    draw = random.Random(seed)
    rows = [["label", "text"]]
    for _ in range(count):
        label = draw.choice(["low", "high"])
        half = WORDS[:20] if label == "low" else WORDS[20:]
        rows.append([label, " ".join(draw.choices(half, k=draw.randint(2, 9)))])
    return rows


@pytest.fixture
def task_files(write_tsv: Callable[[str, Rows], Path]) -> dict[str, str]:
    """train, validation and test of a task, with SIZES rows."""
    return {
        split: str(write_tsv(f"{split}.tsv", labelled_rows(size, seed)))
        for seed, (split, size) in enumerate(SIZES.items())
    }


@pytest.fixture
def config_file(tmp_path: Path, encoder: Path, task_files: dict[str, str]) -> Path:
    """A config with seeds 1 and 2, to be changed by overrides."""
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "task": {**task_files, "columns": {"label": "label", "text": "text"}, "metric": "macro_f1"},
        "model": {"init_from": str(encoder), "max_seq_length": 16},
        "training": {"lr": 3e-2, "epochs": 2, "batch_size": 16, "seeds": [1, 2], "precision": "fp32"},
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def seeds_trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that were trained, in order."""
    trained: list[int] = []
    original = run_module.train_seed

    def spy(seed: int, *rest: Any) -> Any:
        trained.append(seed)
        return original(seed, *rest)

    monkeypatch.setattr(run_module, "train_seed", spy)
    return trained


@pytest.fixture(scope="session")
def trained_run(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with seeds 1 and 2, which tests must not change. Its data is in the folder above."""
    folder = tmp_path_factory.mktemp("trained")
    for seed, (split, size) in enumerate(SIZES.items()):
        with (folder / f"{split}.tsv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t").writerows(labelled_rows(size, seed))
    tree = {
        "run": {"dir": str(folder / "run")},
        "task": {split: str(folder / f"{split}.tsv") for split in ("train", "validation", "test")},
        "model": {"init_from": str(encoder), "max_seq_length": 16},
        "training": {"lr": 3e-2, "epochs": 2, "batch_size": 16, "seeds": [1, 2], "precision": "fp32"},
    }
    tree["task"] |= {"columns": {"label": "label", "text": "text"}, "metric": "macro_f1"}
    (folder / "toy.yaml").write_text(yaml.safe_dump(tree))
    with pytest.MonkeyPatch.context() as patch:
        leave_figures_empty(patch)
        finetune(folder / "toy.yaml")
    return folder / "run"


@pytest.fixture
def classifier_of(encoder: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes the folder of a tiny classifier of a model type, untrained."""

    def make(model_type: str) -> Path:
        config = AutoConfig.for_model(model_type, **tiny_fields(model_type), num_labels=2, pad_token_id=0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / model_type)
        load_tokenizer(encoder).save_pretrained(tmp_path / model_type)
        return tmp_path / model_type

    return make


@pytest.fixture
def convolutions(encoder: Path, tmp_path: Path) -> Path:
    """A ConvBERT of transformers with a masked-LM head. Large weights, so that padding shows."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "embedding_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ConvBertConfig(vocab_size=45, intermediate_size=64, initializer_range=0.3, **sizes)
    ConvBertForMaskedLM(config).save_pretrained(tmp_path / "convolutions")
    shutil.copy(encoder / "vocab.txt", tmp_path / "convolutions")
    return tmp_path / "convolutions"


@pytest.fixture(scope="session")
def export_onnx(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports a model: export_onnx(folder, int8=False) is the folder with the ONNX model."""

    def export(folder: Path, int8: bool = False) -> Path:
        output = tmp_path_factory.mktemp("exported") / "model"
        export_command(ExportOptions(checkpoint=str(folder), output=str(output), format="onnx", int8=int8))
        return output

    return export
