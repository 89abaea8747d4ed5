"""Whole pretraining runs of a tiny model, as cases for a pool of ranks."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiment.config import build_config
from experiment.run_folder import RunFolder
from pretrain.batching.batch import Microbatch
from pretrain.config import PretrainConfig
from pretrain.training.checkpoint_io import FragmentReader
from pretrain.training.health import HEALTH_LIMITS, HealthLimits
from pretrain.training.stop_request import StopRequest
from pretrain.world import World

TINY = {
    "model_type": "bert",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
Tree = dict[str, Any]


def settings(folder: Path, corpus: Path, ds_config: str = "fp32_zero1", **changes: Any) -> Tree:
    """The config of a run of 6 steps that logs each of them; `changes` are given as `section__key=value`.

    Nothing divides anything: 29 sequences a batch, windows of 40 slots, three of which make a microbatch.
    """
    tree: Tree = {
        "run": {"dir": str(folder), "seed": 8, "log_every": 1},
        "model": {"config": TINY},
        "corpus": {"train": str(corpus)},
        "batch": {"sequences": 29, "max_seq_length": 40, "microbatch_tokens": 130},
        "optimizer": {"lr": 3e-3},
        "schedule": {"steps": 6, "warmup_steps": 2},
        "checkpoint": {"every_steps": None, "keep_last": 100},
        "engine": {"ds_config": f"ds_configs/{ds_config}.json"},
    }
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        tree[section] = tree.get(section, {}) | {key: value}
    return tree


def pretrain_case(
    world: World,
    tree: Mapping[str, Any],
    stop_after: int | None = None,
    limits: HealthLimits = HEALTH_LIMITS,
) -> str:
    """Carry out a run on this rank; its outcome. `stop_after`: so many steps on, the last rank is asked to stop."""
    from pretrain.run import pretrain

    asked = stop_after is not None and world.rank == world.size - 1
    stop_request = functools.partial(_StopAfter, stop_after) if asked else StopRequest
    return pretrain(build_config(PretrainConfig, tree), world, stop_request, limits).value


class _StopAfter(StopRequest):
    """Wishes to stop once so many steps have begun, since each step asks once before it begins."""

    def __init__(self, steps: int, stop_file: Path | None) -> None:
        super().__init__(stop_file)
        self._left = steps

    @property
    def reason(self) -> str | None:
        self._left -= 1
        return "the test wants it" if self._left <= 0 else None


def build_engine(world: World, tree: Tree, seed: int | None = None) -> tuple[Any, Any]:
    """The engine of a run, as a case, and its model as it was built."""
    from pretrain.engine.engine import Engine
    from pretrain.modeling.build import build_model
    from pretrain.modeling.masked_lm import MaskedLanguageModel
    from pretrain.resolve import resolve

    run = resolve(build_config(PretrainConfig, tree), world.size)
    config = run.config
    built = build_model(config.model, run.model_config, config.run.seed if seed is None else seed)
    engine = Engine(
        MaskedLanguageModel(built.model, built.packed),
        run.deepspeed,
        config.optimizer,
        config.model,
        seed=config.run.seed,
        world=world,
        swap_folder=run.deepspeed.swap_folder(run.folder.path),
    )
    return engine, built.model


def microbatch() -> Microbatch:
    """Two sequences of 12 tokens, three of them predicted."""
    ids = torch.arange(10, 34).view(2, 12)
    segments = torch.ones(2, 12, dtype=torch.int32)
    positions = torch.arange(12).expand(2, 12).contiguous()
    return Microbatch(ids, positions, segments, torch.tensor([0, 12, 24], dtype=torch.int32), ids[0, :3], ids[1, :3])


def events(folder: Path) -> list[Tree]:
    """What a run has logged of its steps, in order."""
    lines = RunFolder(folder).metrics.read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if "loss" in event]


def curve(folder: Path, key: str = "loss") -> list[Any]:
    return [event[key] for event in events(folder)]


def untimed(folder: Path) -> list[Tree]:
    """All events of a run, evaluations too, without what depends on the clock."""
    timed = ("tokens_per_second", "mfu", "data_wait", "memory")
    lines = RunFolder(folder).metrics.read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in timed} for line in lines]


def everything(checkpoint: Path) -> dict[str, Tensor]:
    """All that a checkpoint keeps of the parameters: "name/kind" -> the flattened fp32 master or state, or a scalar."""
    reader = FragmentReader(checkpoint / "engine")
    index = json.loads((checkpoint / "engine" / "index.json").read_text(encoding="utf-8"))
    return {f"{name}/{kind}": reader.read(name, kind) for name in sorted(index) for kind in reader.kinds(name)}
