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

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pretrain.config import PretrainConfig
from pretrain.engine.deepspeed_settings import DeepSpeedSettings, OffloadDevice, Precision, uses_zero1_optimizer
from pretrain.engine.muon import orthogonalization_dtype
from pretrain.engine.shared_memory import BUFFER_BYTES
from pretrain.modeling.structure import ParameterCounts
from pretrain.plan.activations import MicrobatchMemory

_FP32 = 4
# oneDNN generates code for each shape of a matrix product and keeps it: 0.6 MB each in fp32 with torch 2.13 and
# AVX-512, less in bf16; without AVX-512 OpenBLAS computes most of them and keeps none. There are 3 shapes of linear
# layers for all slots and 5 for each number of predicted ones, of which two are assumed; each needs 3 products, forward
# and backward. Attention needs 6 for all slots and 6 for predicted ones.
_CPU_KERNELS = 50 * 300_000

# DeepSpeed's defaults (deepspeed/runtime/zero/config.py), in elements
_REDUCE_BUCKET = 500_000_000
_PREFETCH_BUCKET = 50_000_000
_PERSISTENCE_THRESHOLD = 100_000
_MAX_REUSE_DISTANCE = 1_000_000_000


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
    """The memory of one rank."""

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
class MemorySettings:
    """Settings that the memory of a rank depends on, besides parameters and microbatches."""

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


def memory_settings(
    config: PretrainConfig, deepspeed: DeepSpeedSettings, ranks: int, host_ranks: int, on_gpu: bool
) -> MemorySettings:
    zero: Mapping[str, Any] = deepspeed.raw.get("zero_optimization", {})
    offload_param = (zero.get("offload_param") or {}).get("device", "none")
    return MemorySettings(
        zero_stage=deepspeed.zero_stage,
        ranks=ranks,
        host_ranks=host_ranks,
        precision=deepspeed.precision,
        on_gpu=on_gpu,
        average_bytes=0 if config.model.ema_decay is None else _FP32,
        optimizer=config.optimizer.name,
        orthogonalization_bytes=orthogonalization_dtype(config.optimizer.muon, deepspeed.precision).itemsize,
        offload=deepspeed.offload,
        offloads_weights=offload_param != "none",
        reduce_bucket=int(zero.get("reduce_bucket_size", _REDUCE_BUCKET)),
        prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", _PREFETCH_BUCKET)),
        persistence_threshold=int(zero.get("stage3_param_persistence_threshold", _PERSISTENCE_THRESHOLD)),
        max_reuse_distance=int(zero.get("stage3_max_reuse_distance", _MAX_REUSE_DISTANCE)),
    )


def rank_memory(counts: ParameterCounts, microbatch: MicrobatchMemory, settings: MemorySettings) -> RankMemory:
    """Estimate the memory. `microbatch`: of the stage of the schedule whose microbatches take the most."""
    resident = _resident(counts, settings) + Parts(buffers=0 if settings.on_gpu else _CPU_KERNELS)
    computing = Parts(activations=microbatch.activations, logits=microbatch.logits, gradients=microbatch.gradients)
    moments = {
        "backward": resident + computing + Parts(buffers=_backward_buffers(counts, settings)),
        "update": resident + _update(counts, settings),
    }
    if settings.zero_stage == 3:
        moments["forward"] = resident + Parts(
            activations=microbatch.activations,
            buffers=_backward_buffers(counts, settings) + _prefetched(counts, settings),
        )
    moments["start"] = _start(counts, settings, resident)
    if not settings.on_gpu:
        moments["checkpoint"] = resident + Parts(buffers=_copied(counts, settings, 1))
    host = _offloaded(counts, settings)
    swapped = 2 * _FP32 * counts.total + _moments(counts, settings)  # masters, gradients and moments
    disk = swapped // settings.ranks if settings.offload == "nvme" else 0
    checkpoint = _copied(counts, settings, settings.host_ranks) if settings.on_gpu else 0
    return RankMemory(moments, host if settings.on_gpu else 0, checkpoint, disk)


def _resident(counts: ParameterCounts, settings: MemorySettings) -> Parts:
    """Permanent allocations. Without a GPU, parts that are offloaded to the host are in the same memory."""
    total, share, size = counts.total, -(-counts.total // settings.ranks), settings.weight_bytes
    if settings.offload != "none":
        host = 0 if settings.on_gpu else _offloaded(counts, settings)
        weights = 0 if settings.offloads_weights else size * share if settings.zero_stage == 3 else size * total
        gradients = _FP32 * share if settings.zero_stage < 3 and size < _FP32 else 0
        return Parts(weights=weights, gradients=gradients, optimizer=host)
    if settings.zero_stage == 0:
        return Parts(weights=_FP32 * total, optimizer=_moments(counts, settings) + settings.average_bytes * total)
    return Parts(
        weights=size * (share if settings.zero_stage == 3 else total),
        gradients=_FP32 * (share if settings.zero_stage >= 2 else total),  # outside `parameter.grad`
        optimizer=(_FP32 + settings.average_bytes) * share + _moments(counts, settings) // settings.ranks,
        buffers=BUFFER_BYTES if settings.zero_stage < 3 and _shares_memory(settings) else 0,
    )


def _moments(counts: ParameterCounts, settings: MemorySettings) -> int:
    """Return bytes on all ranks together. Muon has no second moment of hidden matrices."""
    return 2 * _FP32 * counts.total - (_FP32 * counts.hidden_matrices if settings.optimizer == "muon" else 0)


def _copied(counts: ParameterCounts, settings: MemorySettings, ranks: int) -> int:
    """Return the bytes of rank 0, or of a machine with it and so many ranks, for a checkpoint: each copies its part of
    masters, moments and averages, at ZeRO 0 only rank 0; rank 0 the whole model, too."""
    states = (_FP32 + settings.average_bytes) * counts.total + _moments(counts, settings)
    return (states if settings.zero_stage == 0 else -(-states * ranks // settings.ranks)) + _FP32 * counts.total


def _shares_memory(settings: MemorySettings) -> bool:
    """Return whether ranks exchange weights and gradients in memory, as CPU ranks of one host do."""
    return not settings.on_gpu and settings.ranks == settings.host_ranks > 1


def _start(counts: ParameterCounts, settings: MemorySettings, resident: Parts) -> Parts:
    """Return the memory of building the engine: DeepSpeed moves the whole model to the device, then copies it to flat
    tensors (ZeRO 1 and 2) or partitions it (ZeRO 3). On a CPU the fp32 model is in the same memory."""
    whole = settings.weight_bytes * counts.total
    model = whole if settings.on_gpu else max(whole, _FP32 * counts.total)
    flat = whole if settings.zero_stage in (1, 2) else resident.weights if settings.zero_stage == 3 else 0
    masters = 0 if settings.zero_stage == 0 else min(_FP32 * -(-counts.total // settings.ranks), resident.optimizer)
    return Parts(weights=model + flat, gradients=resident.gradients, optimizer=masters)


def _offloaded(counts: ParameterCounts, settings: MemorySettings) -> int:
    """Host memory of a rank: masters, moments, gradients, and a copy of the gradients or of updated weights. See the
    table in ds_configs/README.md."""
    if settings.offload == "none":
        return 0
    share, size = -(-counts.total // settings.ranks), settings.weight_bytes
    weights = size if settings.offloads_weights else 0
    if settings.offload == "nvme":
        return (_FP32 + weights + settings.average_bytes) * share
    copies = _FP32 if settings.zero_stage == 3 else size + (_FP32 if size == _FP32 else 0)
    others = (_FP32 + _FP32 + copies + weights + settings.average_bytes) * share
    return others + _moments(counts, settings) // settings.ranks


def _backward_buffers(counts: ParameterCounts, settings: MemorySettings) -> int:
    """Return the bytes of buckets and gathered weights in the backward pass.

    The bucket is allocated whole, but a CPU's memory is taken only as far as it is written: at ZeRO 2 when most
    activations are freed already.
    """
    if settings.zero_stage == 0:
        return 0
    if settings.zero_stage == 3:
        bucket = settings.reduce_bucket if settings.on_gpu else min(counts.total, settings.reduce_bucket)
        return _FP32 * bucket + settings.weight_bytes * gathered_weights(counts, settings)
    if uses_zero1_optimizer(settings.zero_stage, settings.offload) or not settings.on_gpu:
        return 0
    return _bucket_element(settings) * settings.reduce_bucket


def _bucket_element(settings: MemorySettings) -> int:
    """Bytes: at ZeRO 2 gradients are reduced before they are added up in fp32, elsewhere after that."""
    return settings.weight_bytes if settings.zero_stage == 2 else _FP32


def _update(counts: ParameterCounts, settings: MemorySettings) -> Parts:
    """Return the memory of reducing gradients and updating weights: gradients, the flattened copy of a bucket, and
    temporary tensors of the optimizer."""
    total, size = counts.total, settings.weight_bytes
    share = total if settings.zero_stage == 0 else -(-total // settings.ranks)
    temporary = _temporary(counts, share, settings)
    gradients = size * total if settings.gradients_stay else 0
    bucket = min(total, settings.reduce_bucket)
    match settings.zero_stage:
        case 3:  # the flat gradient of a sub-group, beside the bucket
            buffers = _FP32 * (settings.reduce_bucket if settings.on_gpu else bucket) + _FP32 * share
        case 1 if uses_zero1_optimizer(settings.zero_stage, settings.offload):
            # The parts of the other ranks. In fp32, the default of `communication_data_type`, they are sent uncopied.
            received = not settings.on_gpu and settings.ranks > 1 and not _shares_memory(settings)
            buffers = _FP32 * total if received else 0
        case 1 | 2:
            whole = settings.reduce_bucket if settings.on_gpu else bucket
            buffers = _bucket_element(settings) * whole + _FP32 * bucket
        case _:
            buffers = _FP32 * bucket
    return Parts(gradients=gradients, buffers=buffers + temporary)


def _temporary(counts: ParameterCounts, share: int, settings: MemorySettings) -> int:
    """Return the bytes of the optimizer's tensors during an update. Muon's: the matrices that this rank orthogonalizes,
    and, with several ranks, the data that it sends and receives."""
    if settings.optimizer == "muon":
        copies = 1 if settings.ranks == 1 else 3
        return copies * settings.orthogonalization_bytes * counts.hidden_matrices // settings.ranks
    return {"adamw": 0, "lamb": _FP32, "stableadamw": 2 * _FP32}[settings.optimizer] * share


def _prefetched(counts: ParameterCounts, settings: MemorySettings) -> int:
    """Return the bytes of the flat tensor of weights that ZeRO 3 gathers ahead and copies each weight from; it is freed
    when the last one is used, for a small model in the head."""
    kept = sum(size for size in counts.sizes if size <= settings.persistence_threshold)
    return settings.weight_bytes * min(counts.total - kept, settings.prefetch_bucket)


def gathered_weights(counts: ParameterCounts, settings: MemorySettings) -> int:
    """Return the elements of the weights that are whole on a rank at the end of the forward pass of ZeRO 3.

    Small parameters stay gathered; of the others, those whose next use is at most `max_reuse_distance` elements away,
    there and back; and the next ones are prefetched.
    """
    kept = sum(size for size in counts.sizes if size <= settings.persistence_threshold)
    others = counts.total - kept
    near = max(settings.max_reuse_distance // 2 + settings.prefetch_bucket, counts.largest)
    return kept + min(others, near)
