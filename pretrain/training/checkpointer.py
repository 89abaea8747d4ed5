"""A checkpoint is complete or does not exist.

    RUN/checkpoints/step-00000100/
        engine/rank-00000.safetensors   each rank's fragments of the fp32 masters and optimizer state
        engine/index.json               which slice of which parameter stands in which file
        hf/                             fp32 weights, config and tokenizer, for transformers
        hf-ema/                         the same with the averaged weights, where they are kept
        state.json                      everything that is not a tensor
        COMPLETE                        checksums of all of the above, written last

Written aside, synced to disk, checksummed, marked, renamed. Fragments name the parameter and the slice, not the rank or
the ZeRO stage, so a checkpoint loads at any world size, stage and precision. Saving needs no collective on tensors.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from experiment.checkpoints import (
    Retention,
    apply_retention,
    checkpoint_path,
    mark_complete,
    read_state,
    write_best,
)
from experiment.errors import UserError
from experiment.files import fsync, write_json
from pretrain.engine.engine import Engine
from pretrain.engine.partitions import (
    forget_state,
    fragments,
    loss_scaler_state,
    refresh_model,
    restore_fragment,
    restore_loss_scaler,
    state_of,
)
from pretrain.world import World

# Kinds of tensors that are kept of a fragment, besides the optimizer's own (exp_avg, exp_avg_sq, step).
_MASTER = "fp32"
_AVERAGE = "ema"

WriteModel = Callable[[dict[str, Tensor], Path], None]
"""Writes a Hugging Face folder from fp32 weights by parameter name."""


def save(
    engine: Engine, checkpoints: Path, step: int, state: dict[str, Any], write_model: WriteModel, keep: Retention
) -> Path:
    """Write the checkpoint of a step boundary. Called by all ranks; raises UnwritableError on all where one cannot."""
    final = checkpoint_path(checkpoints, step)
    aside = checkpoints / f".{final.name}.partial"
    rank0 = engine.world.rank == 0
    with _AllOrNone(engine.world):
        if rank0:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / "engine").mkdir(parents=True)
    entries: dict[str, Any] = {}
    with _AllOrNone(engine.world):
        entries = _write_fragments(engine, aside / "engine" / f"rank-{engine.world.rank:05d}.safetensors")
    gathered: list[Any] = [None] * engine.world.size
    dist.all_gather_object(gathered, entries)
    with _AllOrNone(engine.world):
        if rank0:
            index = _merge(gathered)
            write_json(aside / "engine" / "index.json", index, indent=1)
            reader = FragmentReader(aside / "engine")
            write_model(reader.read_all(_MASTER), aside / "hf")
            if engine.average is not None:
                write_model(reader.read_all(_AVERAGE), aside / "hf-ema")
            state = state | {"step": step, "loss_scaler": loss_scaler_state(engine.deepspeed)}
            write_json(aside / "state.json", state, indent=1)
            mark_complete(aside)
            if final.exists():  # unmarked or damaged: a marked one is never written again
                shutil.rmtree(final)
            aside.rename(final)
            fsync(checkpoints)
            if keep.best is not None:
                write_best(checkpoints, keep.best)  # before the one that was the best is forgotten
            apply_retention(checkpoints, keep, newest=step)
    return final


def load(engine: Engine, checkpoint: Path, moments: bool = True) -> None:
    """Overwrite the engine's weights and optimizer state with a checkpoint's. Collective.

    moments: False leaves the optimizer's state as new, for one that cannot take over what another optimizer kept.

    Raises UserError where its parameters are not the model's.
    """
    reader = FragmentReader(checkpoint / "engine")
    forget_state(engine.deepspeed)
    for fragment in fragments(engine.deepspeed):
        shape = reader.shape(fragment.name)
        if shape != fragment.shape:
            raise UserError(
                f"{checkpoint}: parameter '{fragment.name}' has shape {shape}, the model's has {fragment.shape}"
            )
        span = (fragment.start, fragment.start + fragment.numel)
        master, kinds = reader.read(fragment.name, _MASTER, span), reader.kinds(fragment.name)
        state = {
            kind: reader.read(fragment.name, kind, span)
            for kind in kinds
            if moments and kind not in (_MASTER, _AVERAGE)
        }
        restore_fragment(engine.deepspeed, fragment, master, state)
        if engine.average is not None:  # which begins at the weights where a fork has switched it on
            average = reader.read(fragment.name, _AVERAGE, span) if _AVERAGE in kinds else master
            engine.average.of(fragment).copy_(average)
    refresh_model(engine.deepspeed)
    restore_loss_scaler(engine.deepspeed, read_state(checkpoint)["loss_scaler"])


class UnwritableError(Exception):
    """A checkpoint cannot be written; the message says by which ranks, and why."""


class FragmentReader:
    """Reads any slice of any parameter, from whichever ranks' files hold it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self._files: dict[str, Any] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises UserError for a parameter the checkpoint does not have."""
        if name not in self._index:
            raise UserError(f"{self._folder.parent} has no parameter '{name}': it is a checkpoint of another model")
        return tuple(self._index[name]["shape"])

    def kinds(self, name: str) -> list[str]:
        """What is kept of a parameter: the fp32 master, the optimizer's states, the average."""
        return list(self._index[name]["kinds"])

    def read(self, name: str, kind: str, span: tuple[int, int] | None = None) -> Tensor:
        """Elements [start, end) of the flattened parameter (all of them by default); a scalar state as it is."""
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
    """This rank's share; at stage 0, where every rank owns everything, rank 0's share is all of it."""
    if engine.deepspeed.zero_optimization_stage() == 0 and engine.world.rank != 0:
        return {}
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    for fragment in fragments(engine.deepspeed):
        kept = {_MASTER: fragment.master} | state_of(engine.deepspeed, fragment)
        if engine.average is not None:
            kept[_AVERAGE] = engine.average.of(fragment)
        for kind, tensor in kept.items():
            tensors[_key(fragment.name, fragment.start, kind)] = tensor.detach().to("cpu", copy=True).contiguous()
        entries[fragment.name] = {
            "shape": list(fragment.shape),
            "kinds": {kind: tensor.dim() > 0 for kind, tensor in kept.items()},  # per element, or one for all
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


class _AllOrNone:
    """A part of saving that fails on all ranks where it fails on one, so that none waits for the others for ever."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> bool:
        # What safetensors and tokenizers, written in Rust, raise where they cannot write is no OSError.
        if error is not None and not isinstance(error, OSError) and "(os error " not in str(error):
            return False
        found: list[str | None] = [None] * self._world.size
        dist.all_gather_object(found, str(error) if error else None)
        problems = {f"rank {rank}: {problem}" for rank, problem in enumerate(found) if problem}
        if problems:
            raise UnwritableError("; ".join(sorted(problems))) from error
        return True
