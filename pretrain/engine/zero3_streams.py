"""ZeRO 3 on a GPU: streams wait for each other where DeepSpeed lets the host wait for the GPU.

In DeepSpeed the host waits after each backward pass until gradients are reduced, at the end of a step until the small
weights that stay whole are gathered, and on a single GPU before each layer, although its weights are not partitioned.
The GPU is idle until the host has queued more work.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn


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
        for parameter in self._parameters:
            parameter.ds_status = ZeroParamStatus.AVAILABLE


def gather(parameters: Sequence[Any]) -> None:
    """Gather the weights that are partitioned, with one collective: the current stream waits for it."""
    partitioned = [parameter for parameter in parameters if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    if partitioned:
        partitioned[0].all_gather_coalesced(partitioned).wait()


def let_streams_wait(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Replace waits of the host by waits of streams. Call before training. `optimizer`: without offloaded states."""
    partition_parameters._no_gather_coalesced = _WholeWeights
    stream = optimizer.reduce_and_partition_stream
    if stream is not None:  # on CPUs there are no streams
        stream.synchronize = lambda: get_accelerator().current_stream().wait_stream(stream)
