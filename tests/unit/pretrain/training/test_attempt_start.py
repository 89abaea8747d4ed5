from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiment.config import build_config
from experiment.run_files.provenance import wandb_id
from experiment.run_files.run_folder import RunFolder
from pretrain.config import PretrainConfig
from pretrain.resume import ResumePlan
from pretrain.training.attempt_start import record_start


@pytest.mark.parametrize(
    ("logged", "resumed", "starts_over"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_a_run_that_starts_over_with_another_config_is_another_one_in_wandb(
    tmp_path: Path, logged: bool, resumed: bool, starts_over: bool
) -> None:
    """Catches W&B that keeps the curve of an attempt without a checkpoint, because it ignores steps that it has; and
    another W&B run for a config that gives the same result, or for a resumed run."""
    folder, plan = RunFolder(tmp_path), ResumePlan(tmp_path if resumed else None)
    found = []
    for lr, halved in ((1e-3, False), (1e-4, False), (1e-4, True)):  # as after running out of memory
        tree: dict[str, Any] = {
            "run": {"dir": str(tmp_path), "resume": "auto" if halved else "never"},
            "batch": {"microbatch_tokens": 512 if halved else 1024},
            "model": {"config": {"model_type": "bert"}, "activation_checkpointing": halved},
            "corpus": {"train": "c", "cache": str(tmp_path) if halved else None},
            "optimizer": {"lr": lr},
        }
        config = build_config(PretrainConfig, {**tree, "schedule": {"steps": 1}})
        source = SimpleNamespace(init_from=None)
        run: Any = SimpleNamespace(corpora=(), folder=folder, config=config, resume_plan=plan, model_source=source)
        provenance = record_start(run, world_size=1, hosts=1)
        found.append(wandb_id(provenance))
        if logged:
            folder.metrics.write_text('{"step": 1}\n')
    run_id = provenance["run_id"]
    assert found == [run_id, *[f"{run_id}-2" if starts_over else run_id] * 2]
    assert folder.saved.exists() == resumed
