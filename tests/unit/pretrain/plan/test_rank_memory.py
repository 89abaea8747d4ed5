"""The memory of a rank, by part and ZeRO stage, against the bytes per parameter that ZeRO promises."""

from dataclasses import replace

import pytest

from pretrain.engine.deepspeed_settings import Precision
from pretrain.engine.shared_memory import BUFFER_BYTES
from pretrain.plan.activations import MicrobatchMemory
from pretrain.plan.communication import sent_per_step
from pretrain.plan.memory import ParameterCounts, Parts, ShardedModel
from pretrain.plan.plan import _alternatives

N = 1_000_000_000
COUNTS = ParameterCounts(
    N, N // 10, 8 * N // 10, N // 10, hidden_matrices=8 * N // 10, largest=N // 10, sizes=(N // 10,) * 10
)
NOTHING = MicrobatchMemory(0, 0, 0)
BF16 = ShardedModel(
    COUNTS,
    zero_stage=1,
    ranks=8,
    host_ranks=8,
    precision="bf16",
    on_gpu=True,
    average_bytes=0,
    optimizer="adamw",
    orthogonalization_bytes=4,
    offload="none",
    offloads_weights=False,
    reduce_bucket=500_000_000,
    prefetch_bucket=50_000_000,
    persistence_threshold=100_000,
    max_reuse_distance=1_000_000_000,
)


def resident(model: ShardedModel) -> Parts:
    parts = model.memory(NOTHING).moments["backward"]
    return replace(parts, buffers=0)


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [
        (0, "fp32", 4 + 0 + 8),  # gradients are in `parameter.grad`: counted with the microbatch
        (1, "fp32", 4 + 4 + 12 / 8),
        (1, "bf16", 2 + 4 + 12 / 8),
        (1, "fp16", 2 + 4 + 12 / 8),
        (2, "bf16", 2 + 4 / 8 + 12 / 8),
        (3, "bf16", 2 / 8 + 4 / 8 + 12 / 8),
        (3, "fp32", 4 / 8 + 4 / 8 + 12 / 8),
    ],
)
def test_bytes_per_parameter(stage: int, precision: Precision, expected: float) -> None:
    """Catches a part that is partitioned, or not, at the wrong stage (table in ds_configs/README.md)."""
    model = replace(BF16, zero_stage=stage, precision=precision)
    assert resident(model).total == pytest.approx(expected * N)
    start = model.memory(NOTHING).moments["start"]  # before the first backward pass
    assert start.gradients == resident(model).gradients


def test_ranks_on_one_host_do_not_copy_what_others_send() -> None:
    """Catches a plan for gloo, which needs the parts of the gradient from all ranks at once, where memory is shared."""
    cpu = replace(BF16, on_gpu=False)
    shared, sent = (replace(cpu, host_ranks=ranks).memory(NOTHING).moments["update"] for ranks in (8, 4))
    assert sent.total - shared.total == 4 * N - BUFFER_BYTES


def test_averages_and_offload() -> None:
    """Catches averaged weights that are not partitioned, and offloaded states that stay on the device."""
    assert resident(replace(BF16, average_bytes=4)).total - resident(BF16).total == 4 * N // 8
    offloaded = replace(BF16, zero_stage=2, offload="cpu")
    assert resident(offloaded).optimizer == 0
    memory = offloaded.memory(NOTHING)
    assert (memory.host, memory.disk) == (18 * N // 8, 0)
    on_cpu = replace(offloaded, on_gpu=False).memory(NOTHING)
    assert on_cpu.host == 0
    assert on_cpu.moments["backward"].optimizer == 18 * N // 8
    assert replace(offloaded, zero_stage=3, offload="nvme").memory(NOTHING).disk == 16 * N // 8
    weights_too = replace(offloaded, zero_stage=3, offloads_weights=True)
    assert [resident(each).weights for each in _alternatives(weights_too)] == [2 * N, 2 * N, 0]
    assert [resident(each).gradients for each in _alternatives(weights_too)] == [4 * N // 8, 4 * N // 8, 0]


def test_checkpoints_are_copied_to_the_host() -> None:
    """Catches pinned memory that is missing in a plan, and copies that all ranks make although rank 0 alone writes."""
    two_machines = replace(BF16, host_ranks=4, average_bytes=4)
    assert two_machines.memory(NOTHING).checkpoint == (16 // 2 + 4) * N
    assert replace(two_machines, host_ranks=6).memory(NOTHING).checkpoint == (16 * 6 // 8 + 4) * N
    assert replace(two_machines, zero_stage=0, precision="fp32").memory(NOTHING).checkpoint == 20 * N
    on_cpu = replace(BF16, on_gpu=False).memory(NOTHING)
    assert on_cpu.checkpoint == 0
    assert on_cpu.moments["checkpoint"].buffers - on_cpu.moments["update"].buffers == (12 / 8 + 4) * N


def test_more_ranks_and_higher_stages_need_less() -> None:
    """Catches a share that grows with the ranks."""
    for stage in (1, 2, 3):
        model = replace(BF16, zero_stage=stage)
        assert resident(model).total > resident(replace(model, ranks=16)).total
    totals = [resident(replace(BF16, zero_stage=stage)).total for stage in (1, 2, 3)]
    assert totals == sorted(totals, reverse=True)


def test_gathered_weights_are_limited_by_the_distance_of_their_reuse() -> None:
    """Catches a large model that ZeRO 3 would hold whole, and a small one that it would not."""
    model = replace(BF16, zero_stage=3)
    assert model.gathered_weights() == 550_000_000
    assert replace(model, max_reuse_distance=0).gathered_weights() == 100_000_000
    small = replace(COUNTS, total=1000, sizes=(100,) * 10, largest=100)
    assert replace(model, counts=small).gathered_weights() == 1000


@pytest.mark.parametrize(
    ("stage", "microbatches", "expected"),
    [(0, 3, 8), (1, 3, 4 + 2), (2, 3, 3 * 8 + 2), (3, 3, 3 * (4 + 2 * 2))],
)
def test_communication_per_step(stage: int, microbatches: int, expected: float) -> None:
    """Catches a reduction per microbatch where there is one per step, or the other way round."""
    model = replace(BF16, zero_stage=stage)
    assert sent_per_step(model, microbatches) == pytest.approx(expected * N * 7 / 8)
    assert sent_per_step(replace(model, ranks=1), microbatches) == 0


def test_deepspeed_reduces_the_whole_gradient_for_all_ranks() -> None:
    """Catches the communication of our optimizer in a run whose gradients DeepSpeed reduces."""
    assert sent_per_step(replace(BF16, offload="cpu"), 1) == pytest.approx((8 + 2) * N * 7 / 8)


@pytest.mark.parametrize(("stage", "shares"), [(0, 1), (1, 2 / 8), (2, 2 / 8), (3, 2 / 8)])
def test_muon_exchanges_matrices(stage: int, shares: float) -> None:
    """Catches a plan without Muon's exchanges: at two ranks in bf16 they are a quarter of what a rank sends."""
    adamw = replace(BF16, zero_stage=stage)
    muon = replace(adamw, optimizer="muon", orthogonalization_bytes=2)
    more = sent_per_step(muon, 3) - sent_per_step(adamw, 3)
    assert more == pytest.approx(2 * COUNTS.hidden_matrices * shares * 7 / 8)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_gradients_at_zero_1(precision: Precision) -> None:
    """Catches a bucket that our optimizer does not need, and gradients that are counted twice: each is added to an fp32
    sum as soon as it is computed."""
    model = replace(BF16, precision=precision)
    assert not model.gradients_stay
    moments = model.memory(NOTHING).moments
    assert moments["backward"].buffers == moments["update"].buffers == 0
    assert moments["backward"].gradients == moments["update"].gradients == 4 * N
