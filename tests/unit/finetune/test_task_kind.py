from pathlib import Path
from typing import get_args

import pytest

from experiment.config import build_config
from finetune import kinds
from finetune.config import FinetuneConfig, config_of_kind
from finetune.kinds import kind_names
from finetune.task_kind import find_kind

MINIMAL = {"run": {"dir": "r"}, "task": {"train": "a.csv", "validation": "b.csv"}, "model": {"init_from": "m"}}
ADDED = """
from typing import Literal
from finetune.kinds import classification

class Config(classification.Config):
    kind: Literal["shouting"] = "shouting"
    volume: int = 11
    "How loud."

class Kind(classification.Kind):
    config_type = Config
"""


@pytest.mark.parametrize("name", kind_names())
def test_a_kind_declares_what_is_derived_from_it(name: str) -> None:
    """Catches a kind whose config accepts a metric that it does not score, or whose name is not its file's."""
    kind = find_kind(name)
    fields = kind.config_type.model_fields
    assert fields["kind"].default == name
    assert set(get_args(fields["metric"].annotation)) == set(kind.metrics)
    assert kind.config_type.model_fields["metric"].default == next(iter(kind.metrics))


def test_a_kind_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a list of kinds somewhere: a file in finetune/kinds must be enough to add one."""
    (tmp_path / "shouting.py").write_text(ADDED)
    monkeypatch.setattr(kinds, "__path__", [*kinds.__path__, str(tmp_path)])
    assert "shouting" in kind_names()
    assert "kind: shouting" in FinetuneConfig.variants()
    made = build_config(FinetuneConfig, MINIMAL, {"task.kind": "shouting", "task.volume": "3"})
    assert isinstance(made, config_of_kind("shouting"))
    assert made.model_dump()["task"]["volume"] == 3
