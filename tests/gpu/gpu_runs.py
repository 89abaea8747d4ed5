"""Runs of a small model for tests on GPUs."""

from pathlib import Path
from typing import Any

from runs import NO_DROPOUT, Tree, run_config

MODEL: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 64,
}
STEPS = 20


def gpu_run(folder: Path, corpus: Path, ds_config: str, **changes: Any) -> Tree:
    """Config of a run of `STEPS` steps without dropout. Its layers are not compiled, which would take most of its time.
    `changes`: `section__key=value`."""
    changes = {"model__config": MODEL | NO_DROPOUT, "batch__microbatch_tokens": 400, "schedule__steps": STEPS} | changes
    return run_config(folder, corpus, ds_config, engine__compile=False, **changes)
