import json
from pathlib import Path
from typing import Any

import pytest

from experiment.configuration import build_config
from experiment.errors import UserError
from experiment.folder import RunFolder
from experiment.provenance import ancestors_of, write_origin, write_provenance
from pretrain.config import PretrainConfig, RunConfig
from pretrain.training.checkpoint_store import checkpoint_path, mark
from pretrain.training.resume import Beginning, check_fork, check_resume, find_beginning, identity

CONFIG = {"run": {"dir": "/runs/a"}, "model": {"config": {"model_type": "bert"}}, "corpus": {"train": "/data/a"}}
MODEL = {"model_type": "bert", "hidden_size": 24, "transformers_version": "5.0", "dtype": None}
STAGES = [{"steps": 3, "max_seq_length": 64}, {"sequences": 32}]


def who(
    model: dict[str, Any] = MODEL, corpora: tuple[tuple[str, float], ...] = (("f1", 1.0),), **changes: Any
) -> dict[str, Any]:
    tree: dict[str, Any] = {**CONFIG, "schedule": {"steps": 10}}
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        tree[section] = tree.get(section, {}) | {key: value}
    return identity(build_config(PretrainConfig, tree), model, corpora)


@pytest.mark.parametrize(
    ("now", "key"),
    [
        (who(run__seed=1), "run.seed"),
        (who(batch__sequences=64), "batch.sequences"),
        (who(batch__max_seq_length=64), "batch.max_seq_length"),
        (who(masking__rate=0.3), "masking.rate"),
        (who(model=MODEL | {"hidden_size": 32}), "model.hidden_size"),
        (who(model__freeze=["embeddings"], model__freeze_steps=5), "model.freeze"),
        (who(model__ema_decay=0.99), "model.ema_decay"),
        (who(optimizer__name="lamb"), "optimizer.name"),
        (who(fingerprint="f2"), "corpus.train"),
