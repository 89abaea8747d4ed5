"""AdamW, LAMB and StableAdamW under ZeRO, with updates that can be skipped; averaged weights.

ZeRO passes a torch optimizer flat tensors that hold slices of many parameters, sharded across ranks. AdamW treats every
element alike. LAMB and StableAdamW scale each parameter's update by a statistic of the whole parameter: `attach` tells
them which slices their tensors hold, and they sum squares per slice and then over ranks.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.engine.partitions import Fragment, Partitions

Group = dict[str, Any]


class GatedOptimizer(torch.optim.Optimizer):
    """Skips frozen groups, and the whole update if the engine does not allow it.

    Skipped groups keep their weights, moments and step counters, and do not decay. DeepSpeed calls `step` once per
    group or part of one, always after it knows the norm of the whole gradient, and clears the gradients afterwards.
    """

    allowed: Callable[[], bool] = staticmethod(lambda: True)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = self.param_groups  # at ZeRO 3 all but one are empty in each call
        live = [group for group in groups if group["params"] and not group["frozen"]]
        self.param_groups = live if self.allowed() else []
        try:
            if self.param_groups:
                self._update()
        finally:
            self.param_groups = groups

    def _update(self) -> None:
        raise NotImplementedError


class AdamW(GatedOptimizer, torch.optim.AdamW):
    """Loshchilov and Hutter 2019, arXiv 1711.05101, with torch's fused kernel on GPUs and CPUs."""

    # Read by torch's kernel, on the device: whether to skip the update, 1.0 or 0.0, and the divisor of gradients.
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(self, groups: list[Group], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        torch.optim.AdamW.__init__(self, groups, lr=lr, betas=betas, eps=eps, fused=True)

    def _update(self) -> None:
        torch.optim.AdamW.step(self)


class _Slices(NamedTuple):
    """The slices of parameters that one tensor of the optimizer holds."""

    spans: list[tuple[int, int]]  # offset in the flattened tensor, number of elements
    parameters: Tensor  # int64: which parameter each belongs to; numbers are the same on all ranks
    sizes: Tensor  # int64: elements in the whole parameter

    def views(self, tensor: Tensor) -> list[Tensor]:
        flat = tensor.view(-1)
        return [flat.narrow(0, offset, numel) for offset, numel in self.spans]


class PerParameterOptimizer(GatedOptimizer):
    """Base of LAMB and StableAdamW: norms over whole parameters, in float64, reduced over ranks once per call."""

    def __init__(self, groups: list[Group], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._slices: dict[Tensor, _Slices] = {}
        self._parameters = 0
        self._sum_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums

    def attach(
        self, fragments: Iterable[Fragment], names: Sequence[str], sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        """Register the parameters in this rank's tensors. `names`: of all parameters, in the same order on all
        ranks."""
        numbers = {name: number for number, name in enumerate(names)}
        held: dict[Tensor, list[Fragment]] = {}
        for fragment in fragments:
            held.setdefault(fragment.flat, []).append(fragment)
        self._slices = {
            flat: _Slices(
                spans=[(fragment.offset, fragment.numel) for fragment in slices],
                parameters=torch.tensor([numbers[fragment.name] for fragment in slices], device=flat.device),
                sizes=torch.tensor([torch.Size(fragment.shape).numel() for fragment in slices], device=flat.device),
            )
            for flat, slices in held.items()
        }
        self._parameters = len(names)
        self._sum_over_ranks = sum_over_ranks

    @torch.no_grad()
    def _update(self) -> None:
        # A rank whose share of a group is only padding has a tensor without slices: it updates nothing, but takes part
        # in the reduction.
        tensors = [(group, tensor) for group in self.param_groups for tensor in group["params"]]
        held = [(group, tensor, self._slices[tensor]) for group, tensor in tensors if tensor in self._slices]
        sums = torch.zeros(self._parameters, self.measures, dtype=torch.float64, device=tensors[0][1].device)
        for group, tensor, slices in held:
            if tensor.grad is not None:
                for column, measured in enumerate(self._advance(group, tensor, self._moments(tensor))):
                    norms = torch.stack(torch._foreach_norm(slices.views(measured), dtype=torch.float64))
                    sums[:, column].index_add_(0, slices.parameters, norms.square())
        sums = self._sum_over_ranks(sums)
        for group, tensor, slices in held:
            if tensor.grad is not None:
                self._apply(group, tensor, slices, sums[slices.parameters])

    def _moments(self, tensor: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), device=tensor.device)  # on the device, so that no update waits for it
            state["exp_avg"] = torch.zeros_like(tensor)
            state["exp_avg_sq"] = torch.zeros_like(tensor)
        state["step"] += 1
        return state

    measures: int  # squared norms needed per parameter

    def _advance(self, group: Group, tensor: Tensor, state: dict[str, Tensor]) -> Iterable[Tensor]:
        """Update the moments; yields the tensors whose norms over whole parameters `_apply` needs."""
        raise NotImplementedError

    def _apply(self, group: Group, tensor: Tensor, slices: _Slices, squared_norms: Tensor) -> None:
        """Update the slices, given [slices, measures] of their whole parameters. May overwrite the gradient."""
        raise NotImplementedError


class Lamb(PerParameterOptimizer):
    """LAMB: You et al. 2020, arXiv 1904.00962, algorithm 2.

    With bias correction; weight decay is part of the update that the trust ratio scales; phi is the identity. As in the
    authors' code, parameters without weight decay (biases and norms) are not scaled, nor are parameters with a norm of
    zero.
    """

    measures = 2

    def _advance(self, group: Group, tensor: Tensor, state: dict[str, Tensor]) -> Iterable[Tensor]:
        beta1, beta2 = group["betas"]
        step, update = state["step"].double(), tensor.grad
        assert update is not None
        state["exp_avg"].lerp_(update, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(update, update, value=1 - beta2)
        denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        torch.div(state["exp_avg"], denominator.mul_(1 - beta1**step), out=update)
        update.add_(tensor, alpha=group["weight_decay"])
        yield tensor
        yield update

    def _apply(self, group: Group, tensor: Tensor, slices: _Slices, squared_norms: Tensor) -> None:
        assert tensor.grad is not None
        weight, update = squared_norms.sqrt().unbind(1)
        trusted = group["decays"] & (weight > 0) & (update > 0)
        rates = -group["lr"] * torch.where(trusted, weight / update, 1.0)
        for part, direction, rate in zip(
            slices.views(tensor), slices.views(tensor.grad), rates.to(tensor.dtype), strict=True
        ):
            part.addcmul_(direction, rate)


class StableAdamW(PerParameterOptimizer):
    """StableAdamW: Wortsman et al. 2023, arXiv 2304.13013, algorithm 2.

    AdamW whose learning rate is divided, parameter by parameter, by the root mean square of g / sqrt(second moment)
    where that exceeds 1 (the update clipping of AdaFactor, Shazeer and Stern 2018). As in the paper the betas, not the
    moments, are debiased, and the clipped rate applies to weight decay too.
    """

    measures = 1

    def _advance(self, group: Group, tensor: Tensor, state: dict[str, Tensor]) -> Iterable[Tensor]:
        gradient, step = tensor.grad, state["step"].double()
        assert gradient is not None
        debiased = [beta * (1 - beta ** (step - 1)) / (1 - beta**step) for beta in group["betas"]]
        weight1, weight2 = ((1 - beta).to(tensor.dtype) for beta in debiased)
        state["exp_avg"].lerp_(gradient, weight1)
        state["exp_avg_sq"].lerp_(gradient.square(), weight2)
        yield gradient / state["exp_avg_sq"].sqrt().clamp_(min=group["eps"])

    def _apply(self, group: Group, tensor: Tensor, slices: _Slices, squared_norms: Tensor) -> None:
        state = self.state[tensor]
        mean_square = squared_norms[:, 0] / slices.sizes
        rates = (group["lr"] / mean_square.sqrt().clamp(min=1.0)).to(tensor.dtype)
        directions = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"])
        for part, direction, rate in zip(slices.views(tensor), slices.views(directions), rates, strict=True):
            part.mul_(1 - rate * group["weight_decay"]).addcmul_(direction, -rate)


class ExponentialMovingAverage:
    """Exponential moving average of the weights, kept on this rank's fp32 masters.

    After each applied update, average <- decay * average + (1 - decay) * master (Polyak and Juditsky 1992 averaged all
    steps equally; the exponential form is from Tarvainen and Valpola 2017). The average starts at the current weights.
    """

    def __init__(self, partitions: Partitions, decay: float) -> None:
        """`partitions`: with the weights that the average starts at."""
        self._partitions = partitions
        self._decay = decay
        self._averages = {fragment.name: fragment.master.clone() for fragment in partitions.fragments()}

    @torch.no_grad()
    def update(self) -> None:
        """Call after each applied update. Not collective: each rank averages its own part."""
        for resident in self._partitions.resident_fragments():
            averages, masters = [self.of(fragment) for fragment in resident], [fragment.master for fragment in resident]
            torch._foreach_lerp_(averages, masters, 1 - self._decay)

    def of(self, fragment: Fragment) -> Tensor:
        """Return the average of a fragment's master, [numel]."""
        return self._averages[fragment.name]
