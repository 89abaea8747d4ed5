"""Write and read the tensors of a checkpoint. A checkpoint is complete or does not exist.

    RUN/checkpoints/step-00000100/
        engine/rank-00000.safetensors   each rank's fragments of the fp32 masters and optimizer state
        engine/index.json               which slice of which parameter is in which file
        hf/                             fp32 weights, config and tokenizer, for transformers
        hf-ema/                         the same with the averaged weights, if they are kept
        state.json                      everything that is not a tensor
        COMPLETE                        checksums of all of the above, written last

It is written to a temporary folder, synced, checksummed, marked complete and renamed. Fragments are named by parameter
and slice, not by rank or ZeRO stage, so a checkpoint loads at any world size, stage and precision. Saving needs no
collective on tensors.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from experiment.checkpoints import (
    checkpoint_path,
    checkpoint_step,
    mark_complete,
    read_state,
    replace_state,
    write_best,
)
from experiment.disk_errors import describe_disk_error
from experiment.errors import UserError
from experiment.files import fsync, write_json
from experiment.retention import Retention, apply_retention, discard
from pretrain.engine.engine import Engine
from pretrain.world import World

# Kinds of tensors that are saved of a parameter, besides the optimizer's own (exp_avg, exp_avg_sq, step).
MASTER = "fp32"
AVERAGE = "ema"

WriteModel = Callable[[dict[str, Tensor], Path], None]
"""Writes a Hugging Face folder from fp32 weights by parameter name."""


class UnwritableError(Exception):
    """A checkpoint cannot be written; the message says on which ranks, and why."""


def save_checkpoint(
    engine: Engine, checkpoints: Path, step: int, state: dict[str, Any], write_model: WriteModel, keep: Retention
) -> Path:
    """Write the checkpoint of `step` and delete old ones. Collective; raises UnwritableError on all ranks if one
    cannot write, and then leaves nothing of it behind: the disk may be full."""
    final = checkpoint_path(checkpoints, step)
    partial = checkpoints / f".{final.name}.partial"
    try:
        _write_partial(engine, partial, state | {"step": step}, write_model)
        with _all_ranks_or_none(engine.world):
            if engine.world.rank == 0:
                _publish(partial, final, keep)
    except UnwritableError:
        if engine.world.rank == 0 and partial.exists():
            discard(partial)
        raise
    return final


def _write_partial(engine: Engine, partial: Path, state: dict[str, Any], write_model: WriteModel) -> None:
    """Write a complete checkpoint under its temporary name."""
    is_rank0 = engine.world.rank == 0
    with _all_ranks_or_none(engine.world):
        if is_rank0:
            if partial.exists():
                discard(partial)
            (partial / "engine").mkdir(parents=True)
    entries: dict[str, Any] = {}
    with _all_ranks_or_none(engine.world):
        entries = _write_fragments(engine, partial / "engine" / f"rank-{engine.world.rank:05d}.safetensors")
    gathered: list[Any] = [None] * engine.world.size
    dist.all_gather_object(gathered, entries)
    with _all_ranks_or_none(engine.world):
        if is_rank0:
            write_json(partial / "engine" / "index.json", _merge(gathered), indent=1)
            reader = FragmentReader(partial / "engine")
            write_model(reader.read_all(MASTER), partial / "hf")
            if engine.ema is not None:
                write_model(reader.read_all(AVERAGE), partial / "hf-ema")
            write_json(partial / "state.json", state | {"loss_scaler": engine.loss_scaler_state()}, indent=1)
            mark_complete(partial)


def _publish(partial: Path, final: Path, keep: Retention) -> None:
    """Give a complete checkpoint its name, and delete those that need not be kept."""
    if final.exists():  # incomplete or damaged: a good one is never written again
        discard(final)
    partial.rename(final)
    fsync(final.parent)
    if keep.best is not None:
        write_best(final.parent, keep.best)  # before the previous best may be deleted
    apply_retention(final.parent, keep, newest=checkpoint_step(final))


def update_progress(world: World, checkpoint: Path, progress: dict[str, Any], best: int | None) -> None:
    """Replace the progress in a complete checkpoint, and name the best one. Collective; raises UnwritableError on all
    ranks if rank 0 cannot write, and the checkpoint stays usable."""
    with _all_ranks_or_none(world):
        if world.rank == 0:
            replace_state(checkpoint, read_state(checkpoint) | {"progress": progress})
            if best is not None:
                write_best(checkpoint.parent, best)


def load_checkpoint(engine: Engine, checkpoint: Path, load_optimizer_state: bool = True) -> None:
    """Overwrite the engine's weights and optimizer state with those of a verified checkpoint. Collective.

    `load_optimizer_state`: False if the checkpoint was written with another optimizer.

    Raises UserError if its parameters are not the model's.
    """
    reader = FragmentReader(checkpoint / "engine")
    engine.clear_optimizer_state()
    for fragment in engine.fragments():
        shape = reader.shape(fragment.name)
        if shape != fragment.shape:
            raise UserError(
                f"{checkpoint}: parameter '{fragment.name}' has shape {shape}, the model's has {fragment.shape}"
            )
        span = (fragment.start, fragment.start + fragment.numel)
        master, kinds = reader.read(fragment.name, MASTER, span), reader.kinds(fragment.name)
        state = {
            kind: reader.read(fragment.name, kind, span)
            for kind in kinds
            if load_optimizer_state and kind not in (MASTER, AVERAGE)
        }
        engine.restore_fragment(fragment, master, state)
        if engine.ema is not None:  # a fork may have enabled it: then it starts at the weights
            average = reader.read(fragment.name, AVERAGE, span) if AVERAGE in kinds else master
            engine.ema.of(fragment).copy_(average)
    engine.copy_masters_to_model()
    engine.load_loss_scaler_state(read_state(checkpoint)["loss_scaler"])


class FragmentReader:
    """Reads any slice of any parameter from the files of all ranks."""

    def __init__(self, folder: Path) -> None:
        """`folder`: engine/ of a checkpoint."""
        self._folder = folder
        self._index: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self._files: dict[str, Any] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises UserError for a parameter that the checkpoint does not have."""
        if name not in self._index:
            raise UserError(f"{self._folder.parent} has no parameter '{name}': it is a checkpoint of another model")
        return tuple(self._index[name]["shape"])

    def kinds(self, name: str) -> list[str]:
        """What is saved of a parameter: the fp32 master, optimizer states, the average."""
        return list(self._index[name]["kinds"])

    def read(self, name: str, kind: str, span: tuple[int, int] | None = None) -> Tensor:
        """Elements [start, end) of the flattened parameter (default: all); a scalar state whole."""
        entry = self._index[name]
        start, end = span or (0, torch.Size(entry["shape"]).numel())
        if not entry["kinds"][kind]:
            first = entry["fragments"][0]
            scalar: Tensor = self._open(first["file"]).get_tensor(_key(name, first["start"], kind))
            return scalar
        whole: Tensor | None = None
        for piece in entry["fragments"]:
            low, high = max(start, piece["start"]), min(end, piece["start"] + piece["numel"])
            if low < high:
                stored = self._open(piece["file"]).get_slice(_key(name, piece["start"], kind))
                part = stored[low - piece["start"] : high - piece["start"]]
                whole = torch.empty(end - start, dtype=part.dtype) if whole is None else whole
                whole[low - start : high - start] = part
        assert whole is not None
        return whole

    def read_all(self, kind: str) -> dict[str, Tensor]:
        """Whole parameters in their own shapes, by name."""
        return {name: self.read(name, kind).view(self.shape(name)) for name in self._index}

    def _open(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self._folder / name, framework="pt")
        return self._files[name]


def _write_fragments(engine: Engine, path: Path) -> dict[str, Any]:
    """Write this rank's fragments and return their index. At ZeRO 0 every rank owns everything: rank 0 writes."""
    if engine.zero_stage == 0 and engine.world.rank != 0:
        return {}
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    for fragment in engine.fragments():
        kept = {MASTER: fragment.master} | engine.optimizer_state(fragment)
        if engine.ema is not None:
            kept[AVERAGE] = engine.ema.of(fragment)
        for kind, tensor in kept.items():
            tensors[_key(fragment.name, fragment.start, kind)] = tensor.detach().to("cpu", copy=True).contiguous()
        entries[fragment.name] = {
            "shape": list(fragment.shape),
            "kinds": {kind: tensor.dim() > 0 for kind, tensor in kept.items()},  # False: one scalar for all elements
            "fragments": [{"file": path.name, "start": fragment.start, "numel": fragment.numel}],
        }
    save_file(tensors, path)
    fsync(path)
    return entries


def _key(name: str, start: int, kind: str) -> str:
    return f"{name}@{start}/{kind}"


def _merge(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for entries in ranks:
        for name, entry in entries.items():
            if name in merged:
                merged[name]["fragments"] += entry["fragments"]
            else:
                merged[name] = entry
    for name, entry in merged.items():
        whole = torch.Size(entry["shape"]).numel()
        assert sum(piece["numel"] for piece in entry["fragments"]) == whole, f"fragments of {name} do not add up"
    return merged


@contextmanager
def _all_ranks_or_none(world: World) -> Iterator[None]:
    """A part of a save that fails on all ranks if it fails on one, so that no rank waits for the others.

    Raises UnwritableError if what failed is writing. Any other error is raised on its rank, RuntimeError on the others.
    """
    raised: Exception | None = None
    try:
        yield
    except Exception as error:
        raised = error
    refusal = raised and describe_disk_error(raised)
    unwritable = refusal is not None or isinstance(raised, OSError)
    problem = (
        None if raised is None else refusal or (str(raised) if unwritable else f"{type(raised).__name__}: {raised}")
    )
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, (problem, unwritable))
    if raised is not None and not unwritable:
        raise raised
    problems = [problem for problem, _ in gathered]
    if any(problems):
        all_unwritable = all(unwritable for problem, unwritable in gathered if problem)
        raise (UnwritableError if all_unwritable else RuntimeError)(_join(problems)) from raised


def _join(problems: Sequence[str | None]) -> str:
    """The problems of the ranks in one line; one that all of them have, once."""
    if len(set(problems)) == 1:
        return str(problems[0])
    return "; ".join(f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem)
