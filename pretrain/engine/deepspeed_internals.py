"""Everything in DeepSpeed that this package uses and that is not part of its API, and the check that it is there.

DeepSpeed keeps the fp32 masters, moments and gradients of a sharded model in attributes of its optimizers and
parameters. This package reads these, and replaces methods that let the host wait for the device or reduce whole
gradients. A release of DeepSpeed may rename any of them: import them from here only, and list attributes in `_USED`.
`check_deepspeed` then names the missing parts before a device is used.
"""

import functools
import importlib
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

import deepspeed

from experiment.errors import UserError

TESTED = ">=0.19.7,<0.20"  # the releases that the tests pass with; as in pyproject.toml


def _lacks(names: str) -> UserError:
    return UserError(
        f"DeepSpeed {deepspeed.__version__} lacks what deepcloze uses of its internals: {names}; run "
        f"pip install 'deepspeed{TESTED}', the releases that deepcloze is tested with"
    )


try:
    from deepspeed.runtime import compiler
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    from deepspeed.utils.groups import _clone_world_group as clone_world_group
    from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment
    from deepspeed.utils.z3_leaf_module import set_z3_leaf_module

    _torch_backend = importlib.import_module("deepspeed.comm.torch")  # the name `deepspeed.comm.torch` is torch itself
except ImportError as error:
    raise _lacks(str(error)) from None

__all__ = [
    "INITIAL_MICRO_STEP_ID",
    "ZERO_SUPPORTED_OPTIMIZERS",
    "DeepSpeedEngine",
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "DynamicLossScaler",
    "ZeroParamStatus",
    "clone_world_group",
    "compiler",
    "partition_parameters",
    "set_z3_leaf_module",
]

_FLAT = (
    "_global_grad_norm _update_scale averaged_gradients clip_grad loss_scale loss_scaler optimizer overflow zero_grad"
)

_USED: dict[Any, str] = {
    _torch_backend: "__compatible_ops__",
    compiler: "compile",
    DeepSpeedEngine: "basic_optimizer buffered_allreduce_fallback communication_data_type optimizer param_names",
    DynamicLossScaler: "cur_hysteresis cur_iter cur_scale delayed_shift last_overflow_iter min_scale "
    "raise_error_at_min_scale update_scale",
    # ZeRO 1 and 2. `_hp_mapping` and `param_idx_in_group` are attributes of parameters.
    DeepSpeedZeroOptimizer: f"{_FLAT} _get_preflattened_grad_partition _hp_mapping _hp_optimizer_states_linked "
    "_release_preflattened_grad_buffers all_grad_tensors bit16_groups bit16_groups_flat cpu_offload "
    "flatten_dense_tensors_aligned free_grad_in_param_list micro_step_id parallel_partitioned_bit16_groups "
    "param_idx_in_group partition_gradients partition_size process_gradients round_robin_bit16_offsets "
    "single_partition_of_fp32_groups step update_lp_params",
    tensor_fragment: "hp_fragment_address lp_fragment_address optim_fragment",
    fragment_address: "numel start",
    # ZeRO 3. Names that begin with `ds_` or `all_gather` are attributes of parameters.
    DeepSpeedZeroOptimizer_Stage3: f"{_FLAT} _get_param_partition_rank _optimizer_states_and_gradient_swap_in "
    "_optimizer_states_and_gradient_swap_out _optimizer_step _overflow_clean_up _partition_all_parameters _post_step "
    "_pre_step _prepare_sub_group _reassign_or_swap_out_partitioned_parameters _release_sub_group "
    "_swappable_optimizer_subgroup fp16_groups fp32_partitioned_groups_flat get_param_id grad_position "
    "invalidate_secondary_tensor offload_optimizer optimizer_swapper parameter_offload persistent_parameters "
    "reduce_and_partition_stream step",
    DeepSpeedZeRoOffload: "_DeepSpeedZeRoOffload__allgather_stream",
    partition_parameters: "_no_gather_coalesced all_gather all_gather_coalesced ds_numel ds_persist ds_shape ds_status "
    "ds_summary ds_tensor",
    ZeroParamStatus: "AVAILABLE INFLIGHT NOT_AVAILABLE",
    OptimizerSwapper: "purge_state",
}


@functools.cache
def check_deepspeed() -> None:
    """Raise UserError if the installed DeepSpeed lacks something of `_USED`."""
    missing = [
        f"{owner.__name__}.{name}"
        for owner, names in _USED.items()
        for name in sorted(set(names.split()) - set(_names(owner)))
    ]
    if missing:
        raise _lacks(", ".join(missing))


def _names(owner: Any) -> Iterator[str]:
    """Yield names that a class or module of DeepSpeed defines, and names in its code, where instances get their
    attributes."""
    yield from vars(owner)
    for member in vars(owner).values():
        if inspect.isclass(member) and member.__module__ == owner.__name__:
            yield from _names(member)
        elif inspect.isroutine(member):
            code = getattr(inspect.unwrap(member), "__code__", None)
            yield from () if code is None else _names_in_code(code)
    for base in getattr(owner, "__bases__", ()):
        if base.__module__.startswith("deepspeed."):
            yield from _names(base)


def _names_in_code(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # of a function inside
            yield from _names_in_code(constant)
