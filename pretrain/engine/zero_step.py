"""Gradients and updates under ZeRO, in place of DeepSpeed's. With offload, they are DeepSpeed's, but for a correction.

DeepSpeed's optimizers keep the flat tensors and their partition. A step of theirs reads values of the device up to six
times: whether gradients overflow, and the norm of each parameter group. Here it reads once, the norm of the whole
gradient, which is summed from the partitions; it is not finite if a gradient overflows.

At ZeRO 1, gradients are accumulated and reduced here too. DeepSpeed copies or converts all of them in a Python loop,
and every rank all-reduces the whole gradient. Here each one is added to an fp32 sum as soon as backward has computed
it, and a rank reduces only its own partition.

At ZeRO 3 on a GPU, streams wait for each other where DeepSpeed lets the host wait for the GPU: after each backward pass
until gradients are reduced, at the end of a step until weights are updated and the small ones gathered, and on a single
GPU before each layer, although its weights are not partitioned. The GPU is idle until the host has queued more work.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import Tensor, nn

from pretrain.engine.host_copy import read_numbers
from pretrain.engine.shared_memory import SharedMemory, open_shared_memory, sum_in_order

_EPSILON = 1e-6  # added to the norm that gradients are divided by, as torch does
_NORM_CHUNK = 1 << 14  # elements
_COPIED_TOGETHER, _MOST_ELEMENTS = 16, 1 << 22  # gradients; of each. Larger ones are copied, and freed, at once.


class _FlatOptimizer(DeepSpeedZeroOptimizer):  # type: ignore[misc]
    """ZeRO 1 and 2: one flat tensor per parameter group, of which each rank updates an equal part."""

    shared_memory: SharedMemory | None

    @torch.no_grad()
    def _update_weights(self, gradients: list[Tensor]) -> None:
        """Update weights and masters with this rank's part of the gradient, one flat fp32 tensor per group.
        Collective."""
        for master, gradient in zip(self.single_partition_of_fp32_groups, gradients, strict=True):
            master.grad = gradient
        self.optimizer.step()
        for master in self.single_partition_of_fp32_groups:
            master.grad = None
        self.update_lp_params()

    @torch.no_grad()
    def update_lp_params(self) -> None:
        """Copy the masters to the weights, on all ranks. Called by DeepSpeed and `partitions` too. Collective."""
        if self.bit16_groups_flat[0].is_cuda:
            super().update_lp_params()
        else:
            _copy_masters(
                self.single_partition_of_fp32_groups, self.parallel_partitioned_bit16_groups, self.shared_memory
            )


class Zero1Optimizer(_FlatOptimizer):
    """ZeRO 1. Gradients are summed over ranks, not averaged.

    One step is `reduce_gradients`, then `measure` and perhaps `update`, or `update_within`, then `clear_gradients`.
    """

    communication_dtype: torch.dtype  # in which gradients are sent and summed
    _sums: list[Tensor]  # fp32, over this rank's microbatches; one per parameter group, in the layout of the weights
    _partitions: list[Tensor]  # of the sums, the parts that this rank reduces: views
    _parts: list[list[Tensor]]  # of the sums, [group][parameter]
    _received: list[list[bool]]  # which parts hold a gradient of this step
    _waiting: list[tuple[Tensor, Tensor]]  # parts of the sums and gradients to be copied there, on a GPU

    def allocate_sums(self) -> None:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        self._sums = [torch.zeros_like(weights, dtype=torch.float32) for weights in self.bit16_groups_flat]
        self._partitions = [total.chunk(ranks)[rank] for total in self._sums]
        self._parts = [
            [total.narrow(0, offset, weight.numel()) for weight, offset in zip(group, offsets, strict=True)]
            for total, group, offsets in zip(self._sums, self.bit16_groups, self.round_robin_bit16_offsets, strict=True)
        ]
        self._waiting = []
        self.clear_gradients()

    # Called by DeepSpeed during a backward pass

    @torch.no_grad()
    def process_gradients(self, parameter: Tensor, group: int) -> None:
        """Add a gradient that is complete in this backward pass."""
        assert parameter.grad is not None
        number = parameter.param_idx_in_group  # type: ignore[attr-defined]
        total, gradient = self._parts[group][number], parameter.grad.view(-1)
        if self._received[group][number]:
            self._copy_waiting()
            # On a CPU, this is three times as fast as adding bf16 to fp32.
            total.add_(gradient if gradient.is_cuda else gradient.float())
        elif gradient.is_cuda and gradient.numel() <= _MOST_ELEMENTS:
            self._waiting.append((total, gradient))
            if len(self._waiting) == _COPIED_TOGETHER:
                self._copy_waiting()
        else:
            total.copy_(gradient)
        self._received[group][number] = True
        parameter.grad = None

    def _copy_waiting(self) -> None:
        """Copy gradients to their parts of the sums by one kernel: most take less time than a kernel needs to start."""
        if self._waiting:
            parts, gradients = zip(*self._waiting, strict=True)
            torch._foreach_copy_(parts, gradients)
            self._waiting.clear()

    # Called by the engine

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sum this rank's part of the gradient over all ranks. Collective."""
        self._copy_waiting()
        for parts, received in zip(self._parts, self._received, strict=True):
            for part, has_gradient in zip(parts, received, strict=True):
                if not has_gradient:  # the model did not use the parameter in this step
                    part.zero_()
        for whole, partition in zip(self._sums, self._partitions, strict=True):
            sum_over_ranks(whole, partition, self.communication_dtype, self.shared_memory)

    def measure(self) -> float:
        """Return the norm of the whole gradient, unscaled; NaN or infinite if it is not finite. Collective."""
        return _measure(self, self._partitions)

    def update(self, norm: float) -> None:
        """Clip the gradient, whose norm is given, and update weights and masters. Collective."""
        unscale_and_clip(self._partitions, norm, self.clip_grad, self.loss_scale)
        self._update_weights(self._partitions)

    @torch.no_grad()
    def update_within(self, norm_limit: float) -> Tensor:
        """Like `update`, without the host: if the norm of the whole gradient exceeds `norm_limit` or is not finite, the
        device changes nothing. Returns the norm, and 1.0 or 0.0: whether there was an update. Needs AdamW, and a loss
        that is not scaled. Collective."""
        norm = _sum_of_squares_over_ranks(self._partitions).sqrt()
        applied = norm <= min(norm_limit, sys.float_info.max)  # false for NaN
        self.optimizer.found_inf = (~applied).float()
        if self.clip_grad:
            self.optimizer.grad_scale = ((norm + _EPSILON) / self.clip_grad).clamp(min=1.0).float()
        self._update_weights(self._partitions)
        return torch.stack([norm, applied.double()])

    def clear_gradients(self) -> None:
        self._received = [[False] * len(parts) for parts in self._parts]
        self._waiting.clear()


class Zero2Optimizer(_FlatOptimizer):
    """ZeRO 2. DeepSpeed accumulates and averages gradients."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Called by DeepSpeed's engine after the last microbatch. Collective."""
        self.micro_step_id = INITIAL_MICRO_STEP_ID
        gradients = [self._take_gradient(group) for group in range(len(self.bit16_groups))]
        norm = _measure(self, gradients)
        if not self.overflow:
            unscale_and_clip(gradients, norm, self.clip_grad, self.loss_scale)
            self._update_weights(gradients)
        self.zero_grad()

    def _take_gradient(self, group: int) -> Tensor:
        """Take this rank's part of a group's averaged gradient, flat and in fp32. Frees its parts."""
        gradient = self._get_preflattened_grad_partition(group)
        if gradient is None:
            gradient = self.flatten_dense_tensors_aligned(self.averaged_gradients[group], self.partition_size[group])
        flat: Tensor = gradient.to(torch.float32, copy=True)
        self._release_preflattened_grad_buffers(group)
        self.averaged_gradients[group] = self.all_grad_tensors[group] = None
        self.free_grad_in_param_list(self.bit16_groups[group])
        return flat


class OffloadedOptimizer(DeepSpeedZeroOptimizer):  # type: ignore[misc]
    """ZeRO 1 and 2 with offload. DeepSpeed's step keeps a gradient that overflowed, to which it would add all later
    ones if it accumulates 16-bit gradients in fp32."""

    def step(self, closure: None = None) -> None:
        """Called by DeepSpeed's engine after the last microbatch. Collective."""
        super().step(closure)
        if self.overflow:
            self.averaged_gradients.clear()


class Zero3Optimizer(DeepSpeedZeroOptimizer_Stage3):  # type: ignore[misc]
    """ZeRO 3. DeepSpeed accumulates and averages gradients, and exchanges weights."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Called by DeepSpeed's engine after the last microbatch. Collective."""
        self._pre_step()
        self._partition_all_parameters()
        sub_groups = range(len(self.fp16_groups))
        norm = _measure(self, [part for sub_group in sub_groups for part in self.averaged_gradients[sub_group]])
        if self.overflow:
            self._overflow_clean_up(self.loss_scale)
            return
        self.zero_grad()
        timers: set[str] = set()
        for sub_group in sub_groups:
            self._prepare_sub_group(sub_group, timers)
            gradient = self.fp32_partitioned_groups_flat[sub_group].grad
            unscale_and_clip([gradient], norm, self.clip_grad, self.loss_scale)
            self._optimizer_step(sub_group)
            self._reassign_or_swap_out_partitioned_parameters(sub_group)
            self._release_sub_group(sub_group, timers)
        self.invalidate_secondary_tensor()  # a copy of the old weights, with `zero_hpz_partition_size`
        _gather(self.persistent_parameters)
        _let_gathers_wait(self)
        self._post_step(timers)


class _WholeWeights:
    """A handle for weights that are not partitioned, so that nothing is gathered. Replaces DeepSpeed's `NoGatherHandle`
    and `NoGatherCoalescedHandle`, which let the host wait for the current stream."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters: list[Any] = list(parameters)
        for parameter in self._parameters:
            assert parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE, parameter.ds_summary()
            whole = parameter.ds_tensor.data.to(get_accelerator().current_device_name(), non_blocking=True)
            parameter.data = whole.view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.INFLIGHT

    def wait(self, **_: Any) -> None:
        """Called for each of the parameters. At the second call, the first ones may have been released."""
        while self._parameters:
            self._parameters.pop().ds_status = ZeroParamStatus.AVAILABLE


def _gather(parameters: Sequence[Any]) -> None:
    """Gather the weights that are partitioned, with one collective: the current stream waits for it."""
    partitioned = [parameter for parameter in parameters if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    if partitioned:
        partitioned[0].all_gather_coalesced(partitioned).wait()


def _let_gathers_wait(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Let the stream that gathers weights for the next step wait until they are updated. DeepSpeed lets the host wait
    for the GPU, where it gathers the small weights at the end of its own step."""
    stream = optimizer.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
    if stream is not None:  # on CPUs there are no streams
        stream.wait_stream(get_accelerator().current_stream())


def _let_streams_wait(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Replace waits of the host by waits of streams. Call before training. `optimizer`: without offloaded states."""
    partition_parameters._no_gather_coalesced = _WholeWeights
    stream = optimizer.reduce_and_partition_stream
    if stream is not None:  # on CPUs there are no streams
        stream.synchronize = lambda: get_accelerator().current_stream().wait_stream(stream)


def install_zero_optimizer(engine: DeepSpeedEngine) -> Zero1Optimizer | None:
    """Replace DeepSpeed's optimizer at ZeRO 1 to 3, but not at ZeRO 3 with offload. Returns it at ZeRO 1 without
    offload, where the caller has to reduce gradients; elsewhere DeepSpeed does it. Collective."""
    optimizer = engine.optimizer
    if type(optimizer) is DeepSpeedZeroOptimizer_Stage3 and not optimizer.offload_optimizer:
        optimizer.__class__ = Zero3Optimizer
        _let_streams_wait(optimizer)
    if type(optimizer) is not DeepSpeedZeroOptimizer:
        return None
    if optimizer.cpu_offload:
        optimizer.__class__ = OffloadedOptimizer
        return None
    optimizer.__class__ = Zero2Optimizer if optimizer.partition_gradients else Zero1Optimizer
    optimizer.shared_memory = open_shared_memory() if torch.device(engine.device).type == "cpu" else None
    if not isinstance(optimizer, Zero1Optimizer):
        return None
    optimizer.communication_dtype = engine.communication_data_type
    optimizer.allocate_sums()
    return optimizer


def _measure(optimizer: Any, gradients: list[Tensor]) -> float:
    """Unscaled norm of a gradient of which each rank holds some tensors. Stores the norm and whether gradients
    overflowed in DeepSpeed's optimizer, and updates the loss scale. Collective."""
    squares = _sum_of_squares_over_ranks(gradients)
    norm = math.sqrt(read_numbers(squares)) / float(optimizer.loss_scale)  # the only read from the device in a step
    optimizer._global_grad_norm, optimizer.overflow = norm, not math.isfinite(norm)
    optimizer._update_scale(optimizer.overflow)
    return norm


def _sum_of_squares_over_ranks(gradients: Sequence[Tensor]) -> Tensor:
    squares = sum_of_squares(gradients)
    if dist.get_world_size() > 1:
        dist.all_reduce(squares)
    return squares


def sum_of_squares(gradients: Sequence[Tensor]) -> Tensor:
    """Sum the squares of tensors in fp32 or 16 bit, as a scalar in fp64.

    On a CPU, torch adds up the squares of a tensor in fp32, one after another: the norm of 10⁸ elements is 0.5 to 1 %
    too small, by another amount in each layout. In chunks the error is about 1e-8. On a GPU, a block of 512 threads
    sums 65,536 elements, and a second kernel sums the results, so each thread adds a few hundred numbers at most.
    """
    parts = list(gradients)
    if not parts[0].is_cuda:
        parts = [chunk for gradient in parts for chunk in torch.split(gradient.reshape(-1), _NORM_CHUNK)]
    return torch.stack(torch._foreach_norm(parts, dtype=torch.float32)).double().square().sum()


def unscale_and_clip(gradients: list[Tensor], norm: float, limit: float, scale: float) -> None:
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
    """Copy this rank's masters, [groups], to its partition of the weights, [groups][ranks], and other ranks' masters to
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
