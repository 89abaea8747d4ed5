"""The memory of one rank, by part, at each ZeRO stage.

Bytes per parameter follow Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054, section 3) and the allocations of DeepSpeed
0.19, with N parameters, w ranks, and b bytes (2 or 4) for a weight that the model computes with:

    ZeRO           0 (fp32)   1                  2                      3
    weights        4 N        b N                b N                    b N / w, and those that are gathered
    gradients      4 N        4 N                4 N / w                4 N / w
    optimizer      8 N        12 N / w           12 N / w               12 N / w

The optimizer's part is the fp32 masters, its two moments, and the averaged weights (4 N / w more) if they are kept. The
highest use of a step is in the backward pass, or, for a large model with small microbatches, when gradients are
reduced or weights are updated; a rank on a CPU also needs memory to build the model and to save a checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedModel

from experiment.process.hardware import lacks_avx512
from pretrain.engine.deepspeed_settings import OffloadDevice, Precision, uses_zero1_optimizer
from pretrain.engine.muon import orthogonalization_dtype
from pretrain.engine.shared_memory import BUFFER_BYTES
from pretrain.modeling.structure import hidden_matrices, in_embeddings
from pretrain.plan.activations import MicrobatchMemory
from pretrain.resolve import ResolvedRun

_FP32 = 4
# oneDNN generates code for each shape of a matrix product and keeps it: 0.6 MB each with torch 2.13 and AVX-512. There
# are 3 shapes of linear layers for all slots and 5 for each number of predicted ones, of which two are assumed; each
# needs 3 products, forward and backward. Attention needs 6 for all slots and 6 for predicted ones. Without AVX-512
# OpenBLAS computes most of them, and code for the rest is smaller.
_CPU_KERNELS = 50 * (300_000 if lacks_avx512() else 600_000)

# DeepSpeed's defaults (deepspeed/runtime/zero/config.py), in elements
_REDUCE_BUCKET = 500_000_000
_PREFETCH_BUCKET = 50_000_000
_PERSISTENCE_THRESHOLD = 100_000
_MAX_REUSE_DISTANCE = 1_000_000_000


@dataclass(frozen=True)
class ParameterCounts:
    """Shared parameters, such as a decoder tied to the embeddings, count once."""

    total: int
    embeddings: int  # lookup tables, and modules called `embeddings`
    encoder: int  # the rest of the base model
    head: int  # outside the base model
    hidden_matrices: int  # elements of those that the function of this name returns
    largest: int  # of one parameter
    sizes: tuple[int, ...]  # of each parameter


def count_parameters(model: PreTrainedModel) -> ParameterCounts:
    """Count the parameters of a model that is not partitioned, such as one on the meta device."""
    embeddings, matrices = in_embeddings(model), hidden_matrices(model)
    in_base = {id(parameter) for parameter in model.base_model.parameters()}
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    return ParameterCounts(
        total=sum(sizes.values()),
        embeddings=sum(size for key, size in sizes.items() if key in embeddings),
        encoder=sum(size for key, size in sizes.items() if key in in_base and key not in embeddings),
        head=sum(size for key, size in sizes.items() if key not in in_base),
        hidden_matrices=sum(parameter.numel() for name, parameter in model.named_parameters() if name in matrices),
        largest=max(sizes.values()),
        sizes=tuple(sizes.values()),
    )


@dataclass(frozen=True)
class Parts:
    """Bytes of one rank at one moment."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    buffers: int = 0  # DeepSpeed's buckets, gathered weights (ZeRO 3), exchanged data, copies, and a CPU's kernels

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class RankMemory:
    moments: Mapping[str, Parts]  # of the run -> bytes on the device
    host: int  # host memory of a rank on a GPU during training: offloaded parts
    checkpoint: int  # host memory of the first machine with GPUs for checkpoints, see docs/checkpoints.md
    disk: int  # NVMe offload

    @property
    def peak(self) -> str:
        """The moment of the highest use."""
        return max(self.moments, key=lambda moment: self.moments[moment].total)

    @property
    def parts(self) -> Parts:
        return self.moments[self.peak]


@dataclass(frozen=True)
class ShardedModel:
    """The parameters of a model and how they are distributed over ranks: what the memory of a rank depends on, besides
    microbatches."""

    counts: ParameterCounts
    zero_stage: int
    ranks: int
    host_ranks: int  # the most on a machine
    precision: Precision
    on_gpu: bool
    average_bytes: int  # of an averaged weight; 0 without model.ema_decay
    optimizer: str
    orthogonalization_bytes: int  # of an element, in Muon's update: 2 or 4
    offload: OffloadDevice
    offloads_weights: bool
    reduce_bucket: int  # elements
    prefetch_bucket: int
    persistence_threshold: int
    max_reuse_distance: int

    @property
    def weight_bytes(self) -> int:
        """b: 2 or 4."""
        return 4 if self.precision == "fp32" else 2

    @property
    def gradients_stay(self) -> bool:
        """Whether gradients stay in `parameter.grad` until the update; else they go to a sum in fp32 or a bucket."""
        return self.zero_stage == 0

    @property
    def uses_zero1_optimizer(self) -> bool:
        return uses_zero1_optimizer(self.zero_stage, self.offload)

    def memory(self, microbatch: MicrobatchMemory) -> RankMemory:
        """Estimate the memory of a rank. `microbatch`: of the stage whose microbatches take the most."""
        resident = self._resident() + Parts(buffers=0 if self.on_gpu else _CPU_KERNELS)
        computing = Parts(activations=microbatch.activations, logits=microbatch.logits, gradients=microbatch.gradients)
        moments = {
            "backward": resident + computing + Parts(buffers=self._backward_buffers()),
            "update": resident + self._update(),
        }
        if self.zero_stage == 3:
            buffers = self._backward_buffers() + self._prefetched()
            moments["forward"] = resident + Parts(activations=microbatch.activations, buffers=buffers)
        moments["start"] = self._start(resident)
        if not self.on_gpu:
            moments["checkpoint"] = resident + Parts(buffers=self._copied(1))
        swapped = 2 * _FP32 * self.counts.total + self._moments()  # masters, gradients and moments
        return RankMemory(
            moments,
            host=self._offloaded() if self.on_gpu else 0,
            checkpoint=self._copied(self.host_ranks) if self.on_gpu else 0,
            disk=swapped // self.ranks if self.offload == "nvme" else 0,
        )

    @property
    def _share(self) -> int:
        """The parameters of one rank, where they are partitioned."""
        return -(-self.counts.total // self.ranks)

    def _moments(self) -> int:
        """Return the bytes of moments on all ranks together. Muon has no second moment of hidden matrices."""
        return 2 * _FP32 * self.counts.total - (_FP32 * self.counts.hidden_matrices if self.optimizer == "muon" else 0)

    def _shares_memory(self) -> bool:
        """Return whether ranks exchange weights and gradients in memory, as CPU ranks of one host do."""
        return not self.on_gpu and self.ranks == self.host_ranks > 1

    def _resident(self) -> Parts:
        """Permanent allocations. Without a GPU, parts that are offloaded to the host are in the same memory."""
        total, share, size = self.counts.total, self._share, self.weight_bytes
        if self.offload != "none":
            weights = 0 if self.offloads_weights else size * share if self.zero_stage == 3 else size * total
            gradients = _FP32 * share if self.zero_stage < 3 and size < _FP32 else 0
            return Parts(weights=weights, gradients=gradients, optimizer=0 if self.on_gpu else self._offloaded())
        if self.zero_stage == 0:
            return Parts(weights=_FP32 * total, optimizer=self._moments() + self.average_bytes * total)
        return Parts(
            weights=size * (share if self.zero_stage == 3 else total),
            gradients=_FP32 * (share if self.zero_stage >= 2 else total),  # outside `parameter.grad`
            optimizer=(_FP32 + self.average_bytes) * share + self._moments() // self.ranks,
            buffers=BUFFER_BYTES if self.zero_stage < 3 and self._shares_memory() else 0,
        )

    def _copied(self, ranks: int) -> int:
        """Return the bytes of rank 0, or of a machine with it and so many ranks, for a checkpoint: each copies its part
        of masters, moments and averages, at ZeRO 0 only rank 0; rank 0 the whole model, too."""
        states = (_FP32 + self.average_bytes) * self.counts.total + self._moments()
        return (states if self.zero_stage == 0 else -(-states * ranks // self.ranks)) + _FP32 * self.counts.total

    def _start(self, resident: Parts) -> Parts:
        """Return the memory of building the engine: DeepSpeed moves the whole model to the device, then copies it to
        flat tensors (ZeRO 1 and 2) or partitions it (ZeRO 3). On a CPU the fp32 model is in the same memory."""
        whole = self.weight_bytes * self.counts.total
        model = whole if self.on_gpu or self.weight_bytes == _FP32 else whole + _FP32 * self.counts.total
        flat = whole if self.zero_stage in (1, 2) else resident.weights if self.zero_stage == 3 else 0
        masters = 0 if self.zero_stage == 0 else min(_FP32 * self._share, resident.optimizer)
        return Parts(weights=model + flat, gradients=resident.gradients, optimizer=masters)

    def _offloaded(self) -> int:
        """Host memory of a rank: masters, moments, gradients, and a copy of the gradients or of updated weights. See
        the table in ds_configs/README.md."""
        if self.offload == "none":
            return 0
        size = self.weight_bytes
        weights = size if self.offloads_weights else 0
        if self.offload == "nvme":
            return (_FP32 + weights + self.average_bytes) * self._share
        copies = _FP32 if self.zero_stage == 3 else size + (_FP32 if size == _FP32 else 0)
        others = (_FP32 + _FP32 + copies + weights + self.average_bytes) * self._share
        return others + self._moments() // self.ranks

    def _backward_buffers(self) -> int:
        """Return the bytes of buckets and gathered weights in the backward pass.

        The bucket is allocated whole, but a CPU's memory is taken only as far as it is written: at ZeRO 2 when most
        activations are freed already.
        """
        if self.zero_stage == 0:
            return 0
        if self.zero_stage == 3:
            bucket = self.reduce_bucket if self.on_gpu else min(self.counts.total, self.reduce_bucket)
            return _FP32 * bucket + self.weight_bytes * self.gathered_weights()
        return 0 if self.uses_zero1_optimizer or not self.on_gpu else self._bucket_element() * self.reduce_bucket

    def _bucket_element(self) -> int:
        """Bytes: at ZeRO 2 gradients are reduced before they are added up in fp32, elsewhere after that."""
        return self.weight_bytes if self.zero_stage == 2 else _FP32

    def _update(self) -> Parts:
        """Return the memory of reducing gradients and updating weights: gradients, the flattened copy of a bucket, and
        temporary tensors of the optimizer."""
        total = self.counts.total
        share = total if self.zero_stage == 0 else self._share
        bucket = min(total, self.reduce_bucket)
        allocated = self.reduce_bucket if self.on_gpu else bucket
        match self.zero_stage:
            case 3:  # the flat gradient of a sub-group, beside the bucket
                buffers = _FP32 * allocated + _FP32 * share
            case 1 if self.uses_zero1_optimizer:
                # The other ranks' parts. In fp32, the default of `communication_data_type`, they are sent uncopied.
                received = not self.on_gpu and self.ranks > 1 and not self._shares_memory()
                buffers = _FP32 * total if received else 0
            case 1 | 2:
                buffers = self._bucket_element() * allocated + _FP32 * bucket
            case _:
                buffers = _FP32 * bucket
        gradients = self.weight_bytes * total if self.gradients_stay else 0
        return Parts(gradients=gradients, buffers=buffers + self._temporary(share))

    def _temporary(self, share: int) -> int:
        """Return the bytes of the optimizer's tensors during an update of `share` parameters. Muon's: the matrices that
        this rank orthogonalizes, and, with several ranks, the data that it sends and receives."""
        if self.optimizer == "muon":
            copies = 1 if self.ranks == 1 else 3
            return copies * self.orthogonalization_bytes * self.counts.hidden_matrices // self.ranks
        return {"adamw": 0, "lamb": _FP32, "stableadamw": 2 * _FP32}[self.optimizer] * share

    def _persistent(self) -> int:
        """Return the elements of small parameters, which ZeRO 3 keeps gathered."""
        return sum(size for size in self.counts.sizes if size <= self.persistence_threshold)

    def _prefetched(self) -> int:
        """Return the bytes of the flat tensor of weights that ZeRO 3 gathers ahead and copies each weight from; it is
        freed when the last one is used, for a small model in the head."""
        return self.weight_bytes * min(self.counts.total - self._persistent(), self.prefetch_bucket)

    def gathered_weights(self) -> int:
        """Return the elements of the weights that are whole on a rank at the end of the forward pass of ZeRO 3.

        Small parameters stay gathered; of the others, those whose next use is at most `max_reuse_distance` elements
        away, there and back; and the next ones are prefetched.
        """
        near = max(self.max_reuse_distance // 2 + self.prefetch_bucket, self.counts.largest)
        return self._persistent() + min(self.counts.total - self._persistent(), near)


def shard_model(counts: ParameterCounts, run: ResolvedRun, ranks_by_host: Sequence[int], on_gpu: bool) -> ShardedModel:
    """Return a model with these parameters at the run's own ZeRO stage."""
    deepspeed = run.deepspeed
    zero: Mapping[str, Any] = deepspeed.raw.get("zero_optimization", {})
    offload_param = zero.get("offload_param", {}).get("device", "none")
    return ShardedModel(
        counts,
        zero_stage=deepspeed.zero_stage,
        ranks=sum(ranks_by_host),
        host_ranks=max(ranks_by_host),
        precision=deepspeed.precision,
        on_gpu=on_gpu,
        average_bytes=0 if run.config.model.ema_decay is None else _FP32,
        optimizer=run.config.optimizer.name,
        orthogonalization_bytes=orthogonalization_dtype(run.config.optimizer.muon, deepspeed.precision).itemsize,
        offload=deepspeed.offload,
        offloads_weights=offload_param != "none",
        reduce_bucket=int(zero.get("reduce_bucket_size", _REDUCE_BUCKET)),
        prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", _PREFETCH_BUCKET)),
        persistence_threshold=int(zero.get("stage3_param_persistence_threshold", _PERSISTENCE_THRESHOLD)),
        max_reuse_distance=int(zero.get("stage3_max_reuse_distance", _MAX_REUSE_DISTANCE)),
    )
