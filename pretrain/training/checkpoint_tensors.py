"""Write and read the tensors of a checkpoint. A checkpoint is complete or does not exist.

    RUN/checkpoints/step-00000100/
        engine/rank-00000.safetensors   each rank's fragments of the fp32 masters and optimizer state
        engine/index.json               which slice of which parameter is in which file
        hf/                             fp32 weights, config and tokenizer, for transformers
        hf-ema/                         the same with the averaged weights, if they are kept
        state.json                      everything that is not a tensor
        COMPLETE                        checksums of all of the above, written last

It is written to a temporary folder, synced, checksummed, marked complete and renamed, while training continues (see
`background_save`). Fragments are named by parameter and slice, not by rank or ZeRO stage, so a checkpoint loads at any
world size, stage and precision. Saving needs no collective on tensors.
"""

import copy
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from experiment.errors import UserError, describe_disk_error
from experiment.files import checksum, fsync, write_json
from experiment.models.tensor_files import save_tensors
from experiment.models.tokenizer import save_model_tokenizer
from experiment.models.transformers_models import saved_names
from experiment.run_files.checkpoints import checkpoint_step, mark_complete, read_state, write_best
from experiment.run_files.retention import Retention, apply_retention, discard
from pretrain.engine.engine import Engine

# Kinds of tensors that are saved of a parameter, besides the optimizer's own (exp_avg, exp_avg_sq, step).
MASTER = "fp32"
AVERAGE = "ema"

_BLOCK = 1 << 25  # bytes of pinned memory that tensors share, at least: a power of two
_ALIGNMENT = 64  # bytes

WriteModel = Callable[[dict[str, Tensor], Path], None]
"""Writes a Hugging Face folder from fp32 weights by parameter name."""


@dataclass(frozen=True)
class Share:
    """The part of a checkpoint that a rank writes, in host memory."""

    rank: int
    tensors: dict[str, Tensor]  # by name in the file
    index: dict[str, Any]  # which slice of which parameter that is


@dataclass(frozen=True)
class WrittenShare:
    index: dict[str, Any]
    checksums: dict[str, str]  # by path in the checkpoint


class HostMemory:
    """Host memory for a rank's share. It is kept, because allocating it costs more than the copy."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._pinned = PinnedMemory()

    @torch.no_grad()
    def copy(self, engine: Engine) -> Share:
        """Return the masters and optimizer state as they are now. The next call overwrites them.

        At ZeRO 0 every rank owns everything: rank 0 writes.
        """
        rank = engine.world.rank
        if engine.zero_stage == 0 and rank != 0:
            return Share(rank, {}, {})
        tensors: dict[str, Tensor] = {}
        index: dict[str, Any] = {}
        for fragment in engine.partitions.fragments():
            kept = {MASTER: fragment.master} | engine.partitions.optimizer_state(fragment)
            if engine.ema is not None:
                kept[AVERAGE] = engine.ema.of(fragment)
            for kind, tensor in kept.items():
                key = _key(fragment.name, fragment.start, kind)
                tensors[key] = self._buffer_for(key, tensor).copy_(tensor, non_blocking=True)
            index[fragment.name] = {
                "shape": list(fragment.shape),
                "kinds": {kind: tensor.dim() > 0 for kind, tensor in kept.items()},  # False: one scalar for all
                "fragments": [{"file": _file_name(rank), "start": fragment.start, "numel": fragment.numel}],
            }
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        self.tensors = tensors
        return Share(rank, tensors, index)

    def _buffer_for(self, key: str, tensor: Tensor) -> Tensor:
        known = self.tensors.get(key)
        if known is not None and known.shape == tensor.shape:
            return known
        return self._pinned.like(tensor) if tensor.is_cuda else torch.empty(tensor.shape, dtype=tensor.dtype)


class PinnedMemory:
    """Pinned memory in blocks that tensors share.

    torch rounds each allocation up to a power of two: tensors of a BERT-base alone would take 1.7 times their size.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []  # the rest of each block

    def like(self, tensor: Tensor) -> Tensor:
        """Return memory for a tensor of this shape and type."""
        size = -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        fitting = (number for number, rest in enumerate(self._free) if len(rest) >= size)
        if (number := next(fitting, None)) is None:
            number, block = len(self._free), max(_BLOCK, 1 << (size - 1).bit_length())
            self._free.append(torch.empty(block, dtype=torch.uint8, device="cpu", pin_memory=True))
        rest = self._free[number]
        self._free[number] = rest[size:]
        return rest[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def write_share(share: Share, checkpoint: Path) -> WrittenShare:
    """Write a rank's share to the folder of a checkpoint, and wait until it is on disk."""
    if not share.tensors:
        return WrittenShare({}, {})
    path = checkpoint / "engine" / _file_name(share.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(share.tensors, path)
    return WrittenShare(share.index, {f"engine/{path.name}": checksum(path)})


def complete_checkpoint(
    checkpoint: Path, shares: Sequence[WrittenShare], state: dict[str, Any], write_model: WriteModel
) -> None:
    """Write everything else when the shares of all ranks are on disk."""
    write_json(checkpoint / "engine" / "index.json", _merge([share.index for share in shares]), indent=1)
    reader = FragmentReader(checkpoint / "engine")
    write_model(reader.read_all(MASTER), checkpoint / "hf")
    if reader.has_averages():
        write_model(reader.read_all(AVERAGE), checkpoint / "hf-ema")
    write_json(checkpoint / "state.json", state, indent=1)
    mark_complete(checkpoint, {name: digest for share in shares for name, digest in share.checksums.items()})


def write_hugging_face_folder(
    weights: dict[str, Tensor], model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write a folder that transformers opens without deepcloze: safetensors, config and tokenizer.

    `weights`: fp32, by the model's own parameter names, tied ones once; with the `persistent_buffers`.
    """
    names = saved_names(model)
    weights = {names.get(name, name): tensor for name, tensor in weights.items()}
    folder.mkdir(parents=True)
    save_tensors(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    save_model_tokenizer(tokenizer, model, folder)


def persistent_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copy the buffers that belong to the weights of a model, on the host."""
    persistent = model.state_dict().keys()
    return {
        name: buffer.detach().to("cpu", copy=True).contiguous()
        for name, buffer in model.named_buffers()
        if name in persistent
    }


def publish(partial: Path, final: Path, keep: Retention, before: int | None) -> str | None:
    """Give a complete checkpoint its name, and delete the ones that need not be kept, see `apply_retention`.

    Returns the problem if it has its name, but naming the best one or deleting others failed; None without one.
    """
    if final.exists():  # incomplete or damaged: a good one is never written again
        discard(final)
    partial.rename(final)
    try:
        fsync(final.parent)  # others stay if the new name may be lost
        try:
            if keep.best is not None:
                write_best(final.parent, keep.best)  # before the previous best may be deleted
        finally:  # the disk may be full; the best one that is named stays
            apply_retention(final.parent, keep, newest=checkpoint_step(final), before=before)
    except OSError as error:
        return describe_disk_error(error) or str(error)
    return None


def load_checkpoint(engine: Engine, checkpoint: Path, load_optimizer_state: bool = True) -> None:
    """Load the engine's weights and optimizer state from a verified checkpoint. Collective.

    `load_optimizer_state`: False if the checkpoint was written with another optimizer.

    Raises UserError if its parameters are not the model's.
    """
    reader = FragmentReader(checkpoint / "engine")
    engine.partitions.clear_optimizer_state()
    for fragment in engine.partitions.fragments():
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
        engine.partitions.restore(fragment, master, state)
        if engine.ema is not None:  # a fork may have enabled it: then it starts at the weights
            average = reader.read(fragment.name, AVERAGE, span) if AVERAGE in kinds else master
            engine.ema.of(fragment).copy_(average)
    engine.partitions.copy_masters_to_model()
    engine.load_loss_scaler_state(read_state(checkpoint)["loss_scaler"])


def check_step_counts(checkpoint: Path, frozen: Collection[str], unused: Collection[str]) -> None:
    """Raise UserError if the parameters that the run freezes, or the others, were not updated equally often: ZeRO keeps
    them in flat tensors, each with one step count. `frozen`, `unused`: the model's own names of parameters."""
    reader = FragmentReader(checkpoint / "engine")
    counts: dict[bool, dict[int, str]] = {True: {}, False: {}}
    for name in reader.names():
        own, states = name.removeprefix("model."), set(reader.kinds(name)) - {MASTER, AVERAGE}
        if own not in unused and ("step" in states or not states):  # Muon's matrices have no count
            counts[own in frozen][int(reader.read(name, "step")) if states else 0] = own
    for names in counts.values():
        if len(names) > 1:
            fewest, most = min(names), max(names)
            raise UserError(
                f"{checkpoint} cannot be resumed with model.freeze: '{names[fewest]}' was updated in {fewest} steps, "
                f"'{names[most]}' in {most}. The version of deepcloze that wrote it has frozen other parameters: "
                "finish the run with that version, or start again"
            )


class FragmentReader:
    """Reads any slice of any parameter from the files of all ranks."""

    def __init__(self, folder: Path) -> None:
        """`folder`: engine/ of a checkpoint."""
        self._folder = folder
        self._index: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self._files: dict[str, Any] = {}

    def names(self) -> list[str]:
        return list(self._index)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises UserError for a parameter that the checkpoint does not have."""
        if name not in self._index:
            raise UserError(f"{self._folder.parent} has no parameter '{name}': it is a checkpoint of another model")
        return tuple(self._index[name]["shape"])

    def kinds(self, name: str) -> list[str]:
        """Return the saved tensors of a parameter: the fp32 master, optimizer states, the average."""
        return list(self._index[name]["kinds"])

    def has_averages(self) -> bool:
        return all(AVERAGE in entry["kinds"] for entry in self._index.values())

    def read(self, name: str, kind: str, span: tuple[int, int] | None = None) -> Tensor:
        """Read elements [start, end) of the flattened parameter (default: all); a scalar state whole."""
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
                # Bytes, by NumPy: torch would use the threads that train.
                _bytes(whole[low - start : high - start])[:] = _bytes(part)
        assert whole is not None
        return whole

    def read_all(self, kind: str) -> dict[str, Tensor]:
        """Whole parameters in their own shapes, by name."""
        return {name: self.read(name, kind).view(self.shape(name)) for name in self._index}

    def _open(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self._folder / name, framework="pt")
        return self._files[name]


def _bytes(tensor: Tensor) -> Any:
    return tensor.view(torch.uint8).numpy()


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


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
