"""Gradients and updates at ZeRO 1 and 2, in place of DeepSpeed's. Offload and ZeRO 3 are DeepSpeed's own.

DeepSpeed's optimizers keep the flat tensors and their partition. A step of theirs reads values of the device up to six
times: whether gradients overflow, and the norm of each parameter group. Here it reads once, the norm of the whole
gradient, which is summed from the partitions; it is not finite if a gradient overflows.

At ZeRO 1 in bf16, gradients are accumulated and reduced here too. DeepSpeed converts all of them in a Python loop after
each microbatch, and every rank all-reduces, measures and clips the whole gradient. Here each one is added to the fp32
sum as soon as backward has computed it, and a rank reduces only its own partition.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import Tensor

from pretrain.engine.shared_memory import SharedMemory, open_shared_memory, sum_in_order

_EPSILON = 1e-6  # added to the norm that gradients are divided by, as torch does


class Bf16Optimizer(BF16_Optimizer):  # type: ignore[misc]
    """ZeRO 1 in bf16. Gradients are summed over ranks, not averaged.

    One step is `reduce_gradients`, then perhaps `update`, then `clear_gradients`.
    """

    communication_dtype: torch.dtype  # in which gradients are sent and summed
    shared_memory: SharedMemory | None

    # Called by DeepSpeed during a backward pass

    @torch.no_grad()
    def accumulate_hp_grads_and_remove_lp(self, parameter: Tensor, group: int, number: int) -> None:
        """The gradient of a parameter is complete in this backward pass."""
        assert parameter.grad is not None
        total, received = self.fp32_groups_gradients[group][number], self.fp32_groups_has_gradients[group]
        gradient = parameter.grad.view(-1)
        if not received[number]:
            total.copy_(gradient)
        elif gradient.is_cuda:
            total.add_(gradient)
        else:
            total.add_(gradient.float())  # three times as fast on a CPU as adding bf16 to fp32
        received[number] = True
        parameter.grad = None

    def backward_prologue(self) -> None:
        """There are no gradients to clear."""

    # Called by the engine

    @torch.no_grad()
    def reduce_gradients(self) -> float:
        """Sum this rank's partition of the gradient over all ranks. Returns the norm of the whole gradient, NaN or
        infinite if it is not finite. Collective."""
        self._zero_missing_gradients()
        for whole, partition in zip(
            self.fp32_groups_gradients_flat, self.fp32_groups_gradient_flat_partition, strict=True
        ):
            sum_over_ranks(whole, partition, self.communication_dtype, self.shared_memory)
        return _global_norm(self.fp32_groups_gradient_flat_partition)

    @torch.no_grad()
    def update(self, norm: float) -> None:
        """Clip the gradient, whose norm is given, and update weights and masters. Collective."""
        gradients = self.fp32_groups_gradient_flat_partition
        _clip(gradients, norm, self.clip_grad)
        for master, gradient in zip(self.fp32_groups_flat_partition, gradients, strict=True):
            master.grad = gradient
        self.optimizer.step()
        self.update_lp_params()

    def clear_gradients(self) -> None:
        for received in self.fp32_groups_has_gradients:
            received[:] = [False] * len(received)

    @torch.no_grad()
    def update_lp_params(self) -> None:
        """Copy the masters to the weights, on all ranks. Called by DeepSpeed and `partitions` too. Collective."""
        if self.bf16_groups_flat[0].is_cuda:
            super().update_lp_params()
        else:
            _copy_masters(self.fp32_groups_flat_partition, self.bf16_partitioned_groups, self.shared_memory)

    def _zero_missing_gradients(self) -> None:
        """Those of parameters that the model did not use in this step."""
        for gradients, received in zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True):
            for gradient, has_gradient in zip(gradients, received, strict=True):
                if not has_gradient:
                    gradient.zero_()


class Zero12Optimizer(DeepSpeedZeroOptimizer):  # type: ignore[misc]
    """ZeRO 1 and 2 without offload: DeepSpeed accumulates and averages gradients."""

    shared_memory: SharedMemory | None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Called by DeepSpeed's engine after the last microbatch. Collective."""
        self.micro_step_id = INITIAL_MICRO_STEP_ID
        gradients = [self._take_gradient(group) for group in range(len(self.bit16_groups))]
        scale = self.loss_scale
        norm = _global_norm(gradients) / scale
        self._global_grad_norm = norm
        self.overflow = not math.isfinite(norm)
        self._update_scale(self.overflow)
        if not self.overflow:
            _clip(gradients, norm, self.clip_grad, scale)
            for master, gradient in zip(self.single_partition_of_fp32_groups, gradients, strict=True):
                master.grad = gradient
            self.optimizer.step()
            for master in self.single_partition_of_fp32_groups:
                master.grad = None
            self.update_lp_params()
        self.zero_grad()

    @torch.no_grad()
    def update_lp_params(self) -> None:
        """Copy the masters to the weights, on all ranks. Called by DeepSpeed and `partitions` too. Collective."""
        if self.bit16_groups_flat[0].is_cuda:
            super().update_lp_params()
        else:
            _copy_masters(
                self.single_partition_of_fp32_groups, self.parallel_partitioned_bit16_groups, self.shared_memory
            )

    def _take_gradient(self, group: int) -> Tensor:
        """This rank's part of a group's averaged gradient, flat and in fp32. Frees what it is made of."""
        gradient = self._get_preflattened_grad_partition(group)
        if gradient is None:
            gradient = self.flatten_dense_tensors_aligned(self.averaged_gradients[group], self.partition_size[group])
        flat: Tensor = gradient.to(torch.float32, copy=True)
        self._release_preflattened_grad_buffers(group)
        self.averaged_gradients[group] = self.all_grad_tensors[group] = None
        self.free_grad_in_param_list(self.bit16_groups[group])
        return flat


def install_zero_optimizer(engine: DeepSpeedEngine) -> Bf16Optimizer | None:
    """Replace DeepSpeed's optimizer at ZeRO 1 and 2 without offload. Returns it at ZeRO 1 in bf16, where the caller has
    to reduce gradients; elsewhere DeepSpeed does it. Collective."""
    optimizer = engine.optimizer
    if type(optimizer) is DeepSpeedZeroOptimizer and not optimizer.cpu_offload:
        optimizer.__class__ = Zero12Optimizer
    elif type(optimizer) is BF16_Optimizer:
        optimizer.__class__ = Bf16Optimizer
        optimizer.communication_dtype = engine.communication_data_type
        assert optimizer.immediate_grad_update
    else:
        return None
    optimizer.shared_memory = open_shared_memory() if torch.device(engine.device).type == "cpu" else None
    return optimizer if isinstance(optimizer, Bf16Optimizer) else None


def _global_norm(partitions: list[Tensor]) -> float:
    """Norm of a gradient of which each rank holds partitions. Collective. The only read from the device in a step."""
    squares = torch.stack(torch._foreach_norm(partitions)).double().square().sum()
    if dist.get_world_size() > 1:
        dist.all_reduce(squares)
    return math.sqrt(squares.item())


def _clip(gradients: list[Tensor], norm: float, limit: float, scale: float = 1.0) -> None:
    """Divide gradients by `scale`, and shrink them to the norm `limit` unless that is 0. norm: after the division."""
    factor = 1.0 / scale
    if limit and norm > limit:
        factor *= limit / (norm + _EPSILON)
    if factor != 1.0:
        torch._foreach_mul_(gradients, factor)


def sum_over_ranks(
    whole: Tensor, partition: Tensor, dtype: torch.dtype = torch.float32, shared_memory: SharedMemory | None = None
) -> None:
    """Reduce-scatter in `dtype`: `partition`, this rank's equal part of the flat tensor `whole`, becomes the sum of the
    ranks' values.

    gloo would all-reduce the whole tensor, so ranks on CPUs exchange the parts with each other. They are added in the
    order of the ranks, so that the sum does not depend on which arrives first.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if ranks == 1:
        return
    sent = whole.to(dtype)
    if whole.is_cuda:
        total = partition if dtype == partition.dtype else torch.empty_like(partition, dtype=dtype)
        dist.reduce_scatter_tensor(total, sent)
        partition.copy_(total)
    elif shared_memory is not None:
        shared_memory.reduce_scatter(sent.chunk(ranks), partition)
    else:
        parts = sent.chunk(ranks)
        terms = [parts[rank] if number == rank else torch.empty_like(parts[rank]) for number in range(ranks)]
        _exchange(parts, terms)
        sum_in_order(terms, partition)


def _copy_masters(masters: list[Tensor], weights: list[list[Tensor]], shared_memory: SharedMemory | None) -> None:
    """Copy this rank's masters, [groups], to its partition of the weights, [groups][ranks], and those of other ranks to
    theirs. gloo's all-gather takes about twice as long as an exchange, in fp32 three times."""
    rank = dist.get_rank()
    for master, partitions in zip(masters, weights, strict=True):
        parts = [partition.detach() for partition in partitions]
        parts[rank].copy_(master)
        if shared_memory is not None:
            shared_memory.all_gather(parts)
        else:
            _exchange([parts[rank]] * len(parts), parts)


def _exchange(sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
    """Send `sent[n]` to rank n, and receive `received[n]` from it, for all ranks but this one."""
    ranks, rank = len(sent), dist.get_rank()
    transfers = []
    for distance in range(1, ranks):
        receiver, sender = (rank + distance) % ranks, (rank - distance) % ranks
        transfers += [dist.isend(sent[receiver], receiver), dist.irecv(received[sender], sender)]
    for transfer in transfers:
        assert transfer is not None
        transfer.wait()
