"""Parameter groups and the optimizer: weight decay, layer-wise learning rates, freezing.

A parameter group has these keys besides those of torch's optimizers:

    decays          its parameters are weights, not biases or norms
    lr_scale        its learning rate is the schedule's times this
    frozen_until    the first step that updates it
    frozen          the next update skips it
"""

from typing import Any

from transformers import PreTrainedModel

from experiment.frozen_modules import is_in_module
from pretrain.config import ModelConfig, OptimizerConfig
from pretrain.engine.optimizers import AdamW, GatedOptimizer, Lamb, StableAdamW
from pretrain.modeling.layer_ids import layer_ids


def parameter_groups(model: PreTrainedModel, optimizer: OptimizerConfig, freeze: ModelConfig) -> list[dict[str, Any]]:
    """Weights decay; biases and norms do not. A layer's rate is `layer_decay` times that of the layer above it.

    With `layer_decay` 1 and nothing frozen there are two groups, with and without weight decay.
    """
    norms = {
        id(p) for module in model.modules() if "Norm" in type(module).__name__ for p in module.parameters(recurse=False)
    }
    depths = layer_ids(model)
    groups: dict[tuple[float, int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        decays = id(parameter) not in norms and not name.endswith("bias") and parameter.dim() >= 2
        lr_scale = optimizer.layer_decay ** (max(depths.values()) - depths[name])
        frozen_until = freeze.freeze_steps if any(is_in_module(name, module) for module in freeze.freeze) else 0
        group = groups.setdefault(
            (lr_scale, frozen_until, not decays),
            {
                "params": [],
                "weight_decay": optimizer.weight_decay if decays else 0.0,
                "decays": decays,
                "lr_scale": lr_scale,
                "frozen_until": frozen_until,
                "frozen": False,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> GatedOptimizer:
    rule = {"adamw": AdamW, "lamb": Lamb, "stableadamw": StableAdamW}[config.name]
    return rule(groups, lr=config.lr, betas=config.betas, eps=config.eps)
