"""Gradients and updates at ZeRO 1 in bf16, in place of DeepSpeed's.

DeepSpeed's `BF16_Optimizer` keeps the flat tensors and their partition. After each microbatch it converts all gradients
in a Python loop, and for an update every rank all-reduces, measures and clips the whole gradient. Here each gradient is
added to the fp32 sum as soon as backward has computed it, a rank reduces only its own partition, and the norm is summed
from the partitions. A step waits for the device once, for the norm.
"""

import math

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

_EPSILON = 1e-6  # added to the norm that gradients are divided by, as torch does


class Bf16Optimizer(BF16_Optimizer):  # type: ignore[misc]
    """Gradients are summed over ranks, not averaged. One step is `reduce_gradients`, then perhaps `update`, then
    `clear_gradients`."""

    communication_dtype: torch.dtype  # in which gradients are sent and summed

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
            sum_over_ranks(whole, partition, self.communication_dtype)
        squares = torch.stack(torch._foreach_norm(self.fp32_groups_gradient_flat_partition)).square().sum()
        if dist.get_world_size() > 1:
            dist.all_reduce(squares)
        return math.sqrt(squares.item())

    @torch.no_grad()
    def update(self, norm: float) -> None:
        """Clip the gradient, whose norm is given, and update weights and masters. Collective."""
        gradients = self.fp32_groups_gradient_flat_partition
        if self.clip_grad and norm > self.clip_grad:
            torch._foreach_mul_(gradients, self.clip_grad / (norm + _EPSILON))
        for master, gradient in zip(self.fp32_groups_flat_partition, gradients, strict=True):
            master.grad = gradient
        self.optimizer.step()
        self.update_lp_params()

    def clear_gradients(self) -> None:
        for received in self.fp32_groups_has_gradients:
            received[:] = [False] * len(received)

    def _zero_missing_gradients(self) -> None:
        """Those of parameters that the model did not use in this step."""
        for gradients, received in zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True):
            for gradient, has_gradient in zip(gradients, received, strict=True):
                if not has_gradient:
                    gradient.zero_()


def install_bf16_optimizer(engine: DeepSpeedEngine) -> Bf16Optimizer | None:
    """Replace DeepSpeed's optimizer of ZeRO 1 in bf16; None where it built another one."""
    optimizer = engine.optimizer
    if type(optimizer) is not BF16_Optimizer:
        return None
    optimizer.__class__ = Bf16Optimizer
    assert isinstance(optimizer, Bf16Optimizer)
    assert optimizer.immediate_grad_update
    optimizer.communication_dtype = engine.communication_data_type
    return optimizer


def sum_over_ranks(whole: Tensor, partition: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Reduce-scatter in `dtype`: `partition`, this rank's equal part of the flat tensor `whole`, becomes the sum of the
    ranks' values.

    gloo would all-reduce the whole tensor, so ranks on CPUs exchange the parts with each other. They are added in the
    order of the ranks, so that the sum does not depend on which arrives first.
    """
    if dist.get_world_size() == 1:
        return
    sent = whole.to(dtype)
    if whole.is_cuda:
        total = partition if dtype == partition.dtype else torch.empty_like(partition, dtype=dtype)
        dist.reduce_scatter_tensor(total, sent)
    else:
        total, *others = _exchange(list(sent.chunk(dist.get_world_size())))
        for other in others:
            total.add_(other)
    partition.copy_(total)


def _exchange(parts: list[Tensor]) -> list[Tensor]:
    """Send part n to rank n; returns what the ranks sent to this one, in the order of the ranks."""
    ranks, rank = len(parts), dist.get_rank()
    received = [torch.empty_like(parts[rank]) for _ in parts]
    received[rank].copy_(parts[rank])
    transfers = []
    for distance in range(1, ranks):
        receiver, sender = (rank + distance) % ranks, (rank - distance) % ranks
        transfers += [dist.isend(parts[receiver], receiver), dist.irecv(received[sender], sender)]
    for transfer in transfers:
        assert transfer is not None
        transfer.wait()
    return received
