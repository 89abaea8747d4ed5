import json
from pathlib import Path

import pytest

from experiment.config import build_config
from finetune import kinds
from finetune.config import FinetuneConfig, config_of_kind
from finetune.kinds import kind_names
from finetune.prediction.predictor import Predictor
from finetune.run import run
from finetune.task_kind import find_kind

MINIMAL = {"run": {"dir": "r"}, "task": {"train": "a.csv", "validation": "b.csv"}, "model": {"init_from": "m"}}
ADDED = """
from typing import Literal

import torch.nn.functional as F

from finetune.data.columns import Columns, ContextColumn, LabelColumn
from finetune.data.task_config import TaskConfig
from finetune.encoding.examples import Example
from finetune.task_kind import Loss, TaskKind

class Shouts(Columns):
    shout: ContextColumn = "shout"
    mood: LabelColumn = "mood"

class Config(TaskConfig):
    kind: Literal["shouting"] = "shouting"
    columns: Shouts = Shouts()
    metric: Literal["hits"] = "hits"
    volume: int = 11
    "How loud."

class Kind(TaskKind[Config]):
    config_type = Config
    answer = "mood"

    @classmethod
    def find_labels(cls, config, train):
        return tuple(sorted({record.values["mood"] for record in train.records}))

    def expand(self, record, encoder, training):
        target = self.label_id(record.values["mood"], record.place) if "mood" in record.values else None
        return [Example((encoder.encode(record.values["shout"].upper()),), target)]

    def loss(self, outputs, batch, options):
        return Loss.of(F.cross_entropy(outputs, batch.targets, reduction="sum"), len(outputs))

    def decode(self, record, examples, outputs):
        return {"mood": self.labels[outputs[0].argmax()]}

    def scorer(self, records, predictions):
        hits = [r.values["mood"] == p["mood"] for r, p in zip(records, predictions)]
        return lambda rows: {"hits": sum(hits[row] for row in rows) / len(rows)}
"""


@pytest.mark.parametrize("name", kind_names())
def test_a_kind_declares_what_is_derived_from_it(name: str) -> None:
    """Catches a misspelled metric, and a kind whose name is not its file's."""
    kind = find_kind(name)
    fields = kind.config_type.model_fields
    assert fields["kind"].default == name
    assert set(kind.lower_is_better) <= set(kind.metrics())
    assert fields["metric"].default == kind.metrics()[0]


def test_a_kind_is_one_file(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a list of kinds or names of columns somewhere: a file in finetune/kinds must be enough to add one, which
    is trained, scored and predicted with."""
    (tmp_path / "shouting.py").write_text(ADDED)
    monkeypatch.setattr(kinds, "__path__", [*kinds.__path__, str(tmp_path)])
    assert "shouting" in kind_names()
    assert "kind: shouting" in FinetuneConfig.variants()
    made = build_config(FinetuneConfig, MINIMAL, {"task.kind": "shouting", "task.volume": "3"})
    assert isinstance(made, config_of_kind("shouting"))
    assert made.model_dump()["task"]["volume"] == 3

    rows = [{"shout": f"word{number}", "mood": "glad" if number % 4 else "sad"} for number in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "task": {"kind": "shouting", "train": str(tmp_path / "train.jsonl")},
        "model": {"init_from": str(encoder), "max_seq_length": 16},
        "training": {"steps": 1, "precision": "fp32"},
    }
    results = run(build_config(FinetuneConfig, tree, {}))
    assert results["splits"]["validation"]["hits"]["mean"] in (0.25, 0.75)  # of 3 glad and 1 sad row
    assert Predictor.load(tmp_path / "run" / "seed-42" / "model").predict([{"shout": "word1"}])[0]["mood"]
