"""Pretraining runs of a tiny model, as cases for a pool of ranks, and what they wrote."""

import itertools
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiment.config import build_config
from experiment.files import cache_folder, read_json
from experiment.run_files.checkpoints import checkpoint_path, read_state
from experiment.run_files.goodput import EVALUATING, ActivityTimer
from experiment.run_files.retention import Retention
from experiment.run_files.run_folder import RunFolder
from pretrain.batching.batch import Microbatch, RankBatch, flatten_batch, unflatten_batch
from pretrain.batching.loader import Batches, BatchLoader
from pretrain.config import PretrainConfig
from pretrain.training.checkpoint_tensors import FragmentReader
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
SHALLOW = TINY | {"num_hidden_layers": 1}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
COMPILED = "TEST_COMPILE" in os.environ  # runs compile their layers, see `make soak`
Tree = dict[str, Any]


def soak(*cases: Any) -> list[Any]:
    """Parameters of soak tests. A tuple is one case of several arguments."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.soak) for case in cases]


def sampled(cases: Iterable[Any], sample: Collection[Any]) -> list[Any]:
    """Parameters of a test. Cases that are not in `sample` are soak tests."""
    return [case if case in sample else soak(case)[0] for case in cases]


def run_config(folder: Path, corpus: Path, ds_config: str = "fp32_zero1", **changes: Any) -> Tree:
    """Config of a run of 6 steps that logs every step. `changes`: `section__key=value`.

    The model has one layer, which saves a quarter of the time: pass `TINY` where its place among others matters.

    No size divides another: 29 sequences a batch, rows of 40 slots, six rows a microbatch. With one to three ranks, a
    rank has at least two microbatches in most steps.
    """
    tree: Tree = {
        "run": {"dir": str(folder), "seed": 8, "log_every": 1},
        "model": {"config": SHALLOW},
        "corpus": {"train": str(corpus)},
        "batch": {"sequences": 29, "max_seq_length": 40, "microbatch_tokens": 260},
        "optimizer": {"lr": 3e-3},
        "schedule": {"steps": 6, "warmup_steps": 2},
        "checkpoint": {"every_steps": None, "keep_last": 100},
        "engine": {"ds_config": f"ds_configs/{ds_config}.json", "compile": COMPILED},
    }
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        tree[section] = tree.get(section, {}) | {key: value}
    return tree


def small_tree(folder: Path, corpus: Path, /, **sections: Any) -> Tree:
    """Config of a run of two steps, to be checked rather than run. `sections`: to add, or to replace."""
    tree = {
        "run": {"dir": str(folder)},
        "model": {"config": SHALLOW},
        "corpus": {"train": str(corpus)},
        "batch": {"sequences": 8, "max_seq_length": 32, "microbatch_tokens": 64},
        "schedule": {"steps": 2},
        "engine": {"ds_config": "ds_configs/fp32_zero1.json"},
    }
    return tree | sections


def pretrain_case(
    world: World,
    tree: Mapping[str, Any],
    stop_after: int | None = None,
    times: ActivityTimer | None = None,
    data_worker: bool = False,
    stop: StopRequest | None = None,
) -> str:
    """Run on this rank and return the outcome. `stop_after`: steps after which the last rank is asked to stop. `times`:
    of this attempt; default: it starts now. `data_worker`: make batches in another process, as runs of users do.
    `stop`: of this rank; default: it gets no signals."""
    from pretrain.rank_process import RankRecorder
    from pretrain.run import pretrain
    from pretrain.training import batch_feed

    times = times or ActivityTimer(time.time())
    if stop_after is not None and world.rank == world.size - 1:
        stop = _StopAfter(stop_after, times)
    config, recorder = build_config(PretrainConfig, tree), RankRecorder(RunFolder(Path(tree["run"]["dir"])), world.rank)
    with pytest.MonkeyPatch.context() as patch:
        if not data_worker:
            patch.setattr(batch_feed, "BatchLoader", _load_in_this_process)
        outcome = pretrain(config, world, stop or StopRequest(), recorder, times).outcome.value
    if COMPILED:
        start = tree["model"].get("init_from")
        shape = read_json(Path(start, "config.json")) if start else tree["model"].get("config") or {}
        only_layer = shape.get("num_hidden_layers") == 1  # is not compiled, being the last
        assert only_layer or torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    return outcome


def _load_in_this_process(
    batches: Batches, first: int, last: int | None, workers: int, *, timeout: float, pin_memory: bool, unused: Any
) -> Iterator[RankBatch]:
    """`BatchLoader`, without workers unless they serve a GPU: they take longer to start than to make a few batches."""
    if pin_memory:
        return BatchLoader(batches, first, last, workers, timeout=timeout, pin_memory=True, unused=unused)
    steps = itertools.count(first) if last is None else range(first, last)
    flat = (flatten_batch(batches[step]) for step in steps)
    return (unflatten_batch(each, torch.from_numpy(each.data)) for each in flat)


class _StopAfter(StopRequest):
    """Asks to stop after `steps` steps: it is checked once at the start of training, once in each step, and now and
    then in evaluations."""

    def __init__(self, steps: int, times: ActivityTimer) -> None:
        super().__init__()
        self._left = steps + 1
        self._times = times

    @property
    def reason(self) -> str | None:
        self._left -= self._times.doing.activity != EVALUATING
        return "requested by the test" if self._left <= 0 else None


def planned(tree: Tree, ranks: int) -> Any:
    """The plan that `deepcloze plan` states."""
    from pretrain.plan.cost import Device, Rates
    from pretrain.plan.plan import plan_run
    from pretrain.resolve import resolve

    run = resolve(build_config(PretrainConfig, tree), ranks)
    return plan_run(run, [ranks], Device("cpu", None, None), Rates(None, 0.4, 25e9, None, None))


def build_engine(world: World, tree: Tree, seed: int | None = None, compiled: bool = False) -> tuple[Any, Any]:
    """The engine that a run would build, and the transformers model in it. `compiled`: its layers. Collective."""
    from pretrain.engine.engine import Engine
    from pretrain.modeling.build import build_model
    from pretrain.modeling.masked_lm import MaskedLanguageModel
    from pretrain.resolve import resolve

    run = resolve(build_config(PretrainConfig, tree), world.size)
    config = run.config
    built = build_model(config.model, run.model_config, config.run.seed if seed is None else seed)
    module = MaskedLanguageModel(built.model)
    layers = set()
    if compiled:
        from pretrain.modeling.compiled_layers import compile_layers

        layers = compile_layers(module, cache_folder() / "compiled")
    engine = Engine(
        module,
        run.deepspeed,
        config.optimizer,
        config.model,
        seed=config.run.seed,
        world=world,
        swap_folder=run.deepspeed.swap_folder(run.folder.path),
        unused=built.unused,
        compiled=layers,
    )
    return engine, built.model


def save_engine(
    engine: Any,
    checkpoints: Path,
    step: int,
    write_model: Callable[[dict[str, Tensor], Path], None] = lambda _, hf: hf.mkdir(),
    keep: Retention = Retention(100),  # noqa: B008
) -> None:
    """Save a checkpoint, by default with an empty Hugging Face folder, and wait for it. Collective."""
    from pretrain.training.background_save import BackgroundSave, Snapshot
    from pretrain.training.checkpoint_tensors import HostMemory
    from pretrain.training.cpu_group import CpuGroup

    state = {"step": step, "loss_scaler": engine.loss_scaler_state()}
    group = CpuGroup(engine.world, timedelta(seconds=100))
    saves = BackgroundSave(checkpoints, group, ActivityTimer(time.time()), None)
    saves.begin(Snapshot(step, HostMemory().copy(engine), state, write_model, keep))
    saves.wait()
    RunFolder(checkpoints.parent).saved.unlink(missing_ok=True)  # else a run in this folder could not start


def copy_case(world: World, tree: Tree, copies: Mapping[Path, Path], other: Path | None = None) -> None:
    """Load each checkpoint of `copies` into an engine of this layout, with other initial weights or those of the
    checkpoint `other`, and save it as step 2 in its folder."""
    from pretrain.training.checkpoint_tensors import load_checkpoint

    engine, _ = build_engine(world, tree, seed=99)
    for number, (source, target) in enumerate(copies.items()):
        if number and other is not None:
            load_checkpoint(engine, other)
        load_checkpoint(engine, source)
        save_engine(engine, target, 2)
    engine.close()


def microbatch() -> Microbatch:
    """Two sequences of 12 tokens, three of which are masked."""
    ids = torch.arange(10, 34).view(2, 12)
    segments = torch.ones(2, 12, dtype=torch.int32)
    positions = torch.arange(12).expand(2, 12).contiguous()
    return Microbatch(ids, positions, segments, torch.tensor([0, 12, 24], dtype=torch.int32), ids[0, :3], ids[1, :3])


def step_events(folder: Path) -> list[Tree]:
    """The log events of a run's steps, in order, without evaluations."""
    return [event for event in _events(folder) if "loss" in event]


def evaluation_events(folder: Path) -> list[Tree]:
    return [event for event in _events(folder) if "loss" not in event]


def logged(folder: Path, key: str = "loss") -> list[Any]:
    """A metric at every logged step."""
    return [event[key] for event in step_events(folder)]


def events_without_timing(folder: Path) -> list[Tree]:
    """All events of a run, evaluations too, without the metrics that differ from run to run."""
    measured = ("tokens_per_second", "mfu", "data_wait", "goodput", "checkpoint_seconds", "memory")
    measured += ("slowest_rank", "slowest_rank_ratio")
    return [{key: value for key, value in event.items() if key not in measured} for event in _events(folder)]


def _events(folder: Path) -> list[Tree]:
    """Without the end of the file, if it is a part of a line: a run may be writing it, or was killed meanwhile."""
    *lines, _ = RunFolder(folder).metrics.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def saved_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: "parameter/kind" -> flattened master weights or optimizer state, or a scalar."""
    reader = FragmentReader(checkpoint / "engine")
    index = json.loads((checkpoint / "engine" / "index.json").read_text(encoding="utf-8"))
    return {f"{name}/{kind}": reader.read(name, kind) for name in sorted(index) for kind in reader.kinds(name)}


def assert_same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Bit by bit."""
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def saved_progress(folder: Path, step: int) -> Tree:
    """The progress and the loss scaler in a checkpoint of a run, without the time."""
    state = read_state(checkpoint_path(folder / "checkpoints", step))
    progress = {key: value for key, value in state["progress"].items() if key != "seconds"}
    return progress | {"loss_scaler": state["loss_scaler"]}


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Events, progress and tensors of two run folders are equal, bit by bit."""
    assert events_without_timing(one) == events_without_timing(other)
    assert saved_progress(one, step) == saved_progress(other, step)
    saved = [saved_tensors(checkpoint_path(folder / "checkpoints", step)) for folder in (one, other)]
    assert_same_tensors(*saved)
