"""The parameter groups of an optimizer, and the optimizer itself, from the config.

A parameter group has these keys besides the keys of torch's optimizers:

    decays          its parameters are weights, not biases or norms
    matrices        its parameters are hidden matrices, which Muon orthogonalizes
    lr_scale        its learning rate is the schedule's times this
    frozen_until    the first step that updates it
    frozen          the next update skips it
"""

from collections.abc import Collection

from transformers import PreTrainedModel

from experiment.models.transformers_models import parameters_in
from pretrain.config import ModelConfig
from pretrain.engine.deepspeed_settings import Precision
from pretrain.engine.muon import Muon
from pretrain.engine.optimizers import AdamW, GatedOptimizer, Group, Lamb, StableAdamW
from pretrain.modeling.structure import hidden_matrices, layer_ids
from pretrain.optimizer_config import OptimizerConfig


def parameter_groups(
    model: PreTrainedModel, config: OptimizerConfig, freeze: ModelConfig, unused: Collection[str] = ()
) -> list[Group]:
    """Weights decay; biases, norms and parameters that the model does not use do not. A layer's rate is `layer_decay`
    times the rate of the layer above it.

    With `layer_decay` 1 and nothing frozen there are two groups, with and without weight decay; for Muon a third one
    holds the hidden matrices.
    """
    norms = {
        id(p) for module in model.modules() if "Norm" in type(module).__name__ for p in module.parameters(recurse=False)
    }
    matrices = set(hidden_matrices(model)) - set(unused) if config.name == "muon" else set()
    matrix_rate = (config.muon.lr or config.lr) / config.lr
    frozen, depths = parameters_in(freeze.freeze, model), layer_ids(model, unused)
    deepest = max(depths.values())
    groups: dict[tuple[float, int, bool, bool], Group] = {}
    for name, parameter in model.named_parameters():
        is_weight = id(parameter) not in norms and not name.endswith("bias") and parameter.dim() >= 2
        decays, is_matrix = is_weight and name not in unused, name in matrices
        lr_scale = config.layer_decay ** (deepest - depths[name]) * (matrix_rate if is_matrix else 1.0)
        frozen_until = freeze.freeze_steps if name in frozen else 0
        weight_decay = config.weight_decay if decays else 0.0
        options = {"decays": decays, "matrices": is_matrix, "lr_scale": lr_scale, "frozen_until": frozen_until}
        new: Group = {"params": [], "weight_decay": weight_decay, **options, "frozen": False}
        groups.setdefault((lr_scale, frozen_until, not decays, is_matrix), new)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(config: OptimizerConfig, groups: list[Group], precision: Precision) -> GatedOptimizer:
    if config.name == "muon":
        return Muon(groups, lr=config.lr, betas=config.betas, eps=config.eps, options=config.muon, precision=precision)
    rule = {"adamw": AdamW, "lamb": Lamb, "stableadamw": StableAdamW}[config.name]
    return rule(groups, lr=config.lr, betas=config.betas, eps=config.eps)
