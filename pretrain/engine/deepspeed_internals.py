"""Everything in DeepSpeed that this package uses and that is not part of its API.

DeepSpeed keeps the fp32 masters, moments and gradients of a sharded model in attributes of its optimizers and
parameters. This package reads these, and replaces methods that let the host wait for the device or reduce whole
gradients. A release of DeepSpeed may rename any of them, so `deepspeed_settings.load_settings` rejects those that the
tests have not been run with. Import these names from here only.
"""

from deepspeed.runtime import compiler
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils.groups import _clone_world_group as clone_world_group
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module

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
