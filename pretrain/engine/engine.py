"""Train a model with DeepSpeed: forward and backward of a microbatch, one update per step.

The objective is the mean over all masked tokens of the global batch. Each microbatch contributes its summed loss
divided by the global count. DeepSpeed averages gradients over ranks, so the loss is multiplied by the world size where
it reduces them. Gradient accumulation is unmanaged: one backward pass per microbatch, then one `step`.
"""

import contextlib
import logging
import math
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module, set_z3_leaf_modules
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from experiment.errors import AgreedFailureError
from pretrain.batching.batch import Microbatch
from pretrain.batching.counter_rng import make_key
from pretrain.config import ModelConfig
from pretrain.engine.deepspeed_settings import DeepSpeedSettings
from pretrain.engine.host_copy import HostCopy, read_numbers
from pretrain.engine.initialization import initialize, install_loss_scaler
from pretrain.engine.muon import Muon
from pretrain.engine.optimizers import AdamW, ExponentialMovingAverage, PerParameterOptimizer
from pretrain.engine.parameter_groups import build_optimizer, parameter_groups
from pretrain.engine.partitions import Partitions
from pretrain.engine.phases import ForwardTimer, phase
from pretrain.engine.zero_step import Zero1Optimizer, install_zero_optimizer, sum_of_squares, unscale_and_clip
from pretrain.modeling.masked_lm import MaskedLanguageModel, Predictions
from pretrain.optimizer_config import OptimizerConfig
from pretrain.world import World

log = logging.getLogger(__name__)


class StepResult(NamedTuple):
    applied: bool  # False: the gradient norm is not finite, or above the limit
    grad_norm: float  # of the whole accumulated gradient, before clipping


class PendingStep:
    """A step that the device may still be computing."""

    def __init__(self, result: StepResult | HostCopy) -> None:
        """`result`: the result, or a pending copy of [grad_norm, applied]."""
        self._result = result

    def wait(self) -> StepResult:
        if isinstance(self._result, HostCopy):
            with phase("wait for norm"):
                norm, applied = self._result.wait()
            self._result = StepResult(bool(applied), norm)
        return self._result


class Engine:
    """One model under DeepSpeed on this rank."""

    def __init__(
        self,
        model: MaskedLanguageModel,
        settings: DeepSpeedSettings,
        optimizer: OptimizerConfig,
        options: ModelConfig,
        *,
        seed: int,
        world: World,
        swap_folder: Path | None = None,
        unused: Collection[str] = (),
        compiled: Collection[type[nn.Module]],
    ) -> None:
        """Args:
        model: the same fp32 weights on every rank.
        options: which parameters are frozen and for how long, and the decay of averaged weights.
        seed: of dropout.
        swap_folder: of the run, for NVMe offload.
        unused: names of parameters that the transformers model does not use.
        compiled: types of modules whose forward is compiled.
        """
        self.world = world
        self.precision = settings.precision
        self.zero_stage = settings.zero_stage
        self._seed = seed
        self._swap_folder = swap_folder and swap_folder / f"rank-{world.rank}"
        if world.rank == 0 and settings.stage_change:
            stages = settings.requested_zero_stage, settings.precision, settings.zero_stage
            log.warning("ZeRO %d in %s runs as ZeRO %d: %s", *stages, settings.stage_change)
        groups = parameter_groups(model.model, optimizer, options, unused)
        frozen = [parameter for group in groups if group["frozen_until"] for parameter in group["params"]]
        torch_optimizer = build_optimizer(optimizer, groups, self.precision)
        _set_zero3_leaves(model, compiled)
        ds_config = settings.engine_config(optimizer.grad_clip, self._swap_folder)
        is_16_bit = self.precision != "fp32"
        weights = {name: parameter.data for name, parameter in model.named_parameters() if is_16_bit}
        self._deepspeed = initialize(model, torch_optimizer, ds_config)
        self.forward_timer = ForwardTimer(self.device.type == "cuda", world.size)
        self._loss_scaler = install_loss_scaler(self._deepspeed.optimizer)
        self._zero1_optimizer = install_zero_optimizer(self._deepspeed)
        self._averaged_over = 1 if self._zero1_optimizer is not None else world.size
        self.partitions = Partitions(self._deepspeed)
        if is_16_bit:
            self.partitions.unround_masters(weights, settings.dtype)
            weights.clear()
        self._grad_clip = optimizer.grad_clip
        self._freeze_steps = options.freeze_steps
        self._step = 0
        self._norm_limit = math.inf
        self._update_allowed: bool | None = None  # None until the optimizer asks in this step
        torch_optimizer.allowed = self._is_update_allowed
        if isinstance(torch_optimizer, PerParameterOptimizer):
            names = sorted(self._deepspeed.param_names.values())
            torch_optimizer.attach(self.partitions.fragments(), names, self._sum_over_shards)
        elif isinstance(torch_optimizer, Muon):
            torch_optimizer.attach(self.partitions.flat_tensors(), self.partitions.fragments(), self.device)
        for parameter in frozen:
            if parameter.requires_grad:
                parameter.register_hook(self._zero_while_frozen)
        decay = options.ema_decay
        # Whether the device applies or skips an update itself, so that the host can queue work before reading the norm.
        self.runs_ahead = (
            self.device.type == "cuda"
            and self._zero1_optimizer is not None
            and type(torch_optimizer) is AdamW  # Muon, which is one too, updates matrices itself
            and self._loss_scaler is None
            and decay is None
        )
        self.ema = None if decay is None else ExponentialMovingAverage(self.partitions, decay)

    @property
    def device(self) -> torch.device:
        return torch.device(self._deepspeed.device)

    def begin_step(self, step: int, learning_rate: float, max_length: int | None = None) -> None:
        """Call before the first microbatch of `step`. `learning_rate`: `optimizer.lr` after the schedule. `max_length`:
        of the step's sequences, which attention need not look beyond; None: as given to the model."""
        self._step = step
        self._deepspeed.module.trained_length = max_length
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
            group["frozen"] = step < group["frozen_until"]

    def accumulate(self, microbatch: Microbatch, global_masked: int, step: int, number: int) -> Tensor:
        """Forward and backward of this rank's microbatch `number` of `step`. Returns its summed loss, detached.

        Dropout is keyed by (seed, step, rank, microbatch), so a resumed run draws the same masks.
        """
        if not self._deepspeed.module.training:  # setting it visits every module
            self._deepspeed.train()
        self._seed_dropout(make_key(("dropout", self._seed, step, self.world.rank, number)) >> 1)
        with phase("forward"), self.forward_timer.measuring():
            predictions: Predictions = self._deepspeed(*self._on_device(microbatch))
        loss_sum = predictions.loss_sum.detach()
        # NaN if the loss is not finite, which does not make every gradient NaN on its own: the gradient norm then shows
        # it to all ranks.
        weight = self._averaged_over / global_masked + 0.0 * loss_sum
        with phase("backward"):
            self._deepspeed.backward(predictions.loss_sum * weight, scale_wrt_gas=False)
        return loss_sum

    def _seed_dropout(self, seed: int) -> None:
        """Like `torch.manual_seed`, which also looks for other kinds of devices and formats stacks for them: 0.3 ms."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def step(self, norm_limit: float = math.inf) -> PendingStep:
        """Reduce, clip, update. An update whose gradient norm exceeds `norm_limit` or is not finite is not applied:
        no weight, moment, step counter or decay changes. Frozen parameters do not count in the norm."""
        self._norm_limit, self._update_allowed = norm_limit, None
        if self._zero1_optimizer is not None and self.runs_ahead:
            return PendingStep(self._step_on_device(self._zero1_optimizer))
        if self._zero1_optimizer is not None:
            result = self._step_zero1(self._zero1_optimizer)
        elif self._deepspeed.zero_optimization_stage() > 0:
            result = self._step_sharded()
        else:
            result = self._step_zero0()
        if self._loss_scaler is not None:
            self._loss_scaler.finish_step()
        if result.applied and self.ema is not None:
            self.ema.update()
        return PendingStep(result)

    def discard_gradients(self) -> None:
        """Discard the gradients of microbatches since the last step. Only if `runs_ahead`."""
        assert self._zero1_optimizer is not None
        self._zero1_optimizer.clear_gradients()

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the weights, masters, optimizer states, gradients and averages, and views of them."""
        states = list(self._deepspeed.basic_optimizer.state.values())
        held = [vars(self._deepspeed.optimizer), states, {} if self.ema is None else vars(self.ema)]
        gradients = [flat.grad for flat in self.partitions.flat_tensors()]
        leaves = [*self._deepspeed.module.parameters(), *tree_leaves(held), *gradients]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    @torch.no_grad()
    def predict(self, microbatch: Microbatch) -> Predictions:
        """Forward only, dropout off."""
        self._deepspeed.eval()
        predictions: Predictions = self._deepspeed(*self._on_device(microbatch))
        return predictions

    def close(self) -> None:
        self._deepspeed.destroy()
        if self._swap_folder is not None:
            shutil.rmtree(self._swap_folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # other ranks still have files there
                self._swap_folder.parent.rmdir()

    # Loss scale (fp16)

    @property
    def loss_scale(self) -> float | None:
        """The dynamic loss scale of fp16; None in other precisions."""
        return float(self._deepspeed.optimizer.loss_scale) if self.precision == "fp16" else None

    def check_loss_scale(self) -> None:
        """Call after a step that overflowed. Raises AgreedFailureError, on all ranks, if the scale cannot go lower."""
        if self._loss_scaler is not None and self._loss_scaler.stuck:
            raise AgreedFailureError(
                f"fp16: gradients overflow even at the smallest loss scale, {self.loss_scale:g} (fp16.min_loss_scale "
                "in the DeepSpeed JSON). Either the loss has diverged or activations exceed fp16's range: restart from "
                "an earlier checkpoint with a lower optimizer.lr or a longer schedule.warmup_steps, use a bf16 file "
                "where the device supports bf16, or lower min_loss_scale if it is above 1"
            )

    def loss_scaler_state(self) -> dict[str, float]:
        """Return the state of the loss scaler; empty in bf16 and fp32."""
        return {} if self._loss_scaler is None else self._loss_scaler.state()

    def load_loss_scaler_state(self, state: dict[str, float]) -> None:
        if self._loss_scaler is not None:
            self._loss_scaler.load_state(state)

    def _step_sharded(self) -> StepResult:
        with phase("update weights"):  # DeepSpeed reduces the gradients there, at ZeRO 2 and 3 during the backward pass
            self._deepspeed.step()
        norm = float(self._deepspeed.get_global_grad_norm())
        return StepResult(bool(self._deepspeed.was_step_applied()) and self._is_within_limit(norm), norm)

    def _step_zero1(self, optimizer: Zero1Optimizer) -> StepResult:
        with phase("reduce gradients"):
            optimizer.reduce_gradients()
            norm = optimizer.measure()
        self._update_allowed = self._is_within_limit(norm)
        if self._update_allowed:
            with phase("update weights"):
                optimizer.update(norm)
        optimizer.clear_gradients()
        return StepResult(self._update_allowed, norm)

    def _step_on_device(self, optimizer: Zero1Optimizer) -> HostCopy:
        with phase("reduce gradients"):
            optimizer.reduce_gradients()
        self._update_allowed = True  # the device may still leave the update out
        with phase("update weights"):
            result = HostCopy(optimizer.update_within(self._norm_limit))
        optimizer.clear_gradients()
        return result

    def _step_zero0(self) -> StepResult:
        """DeepSpeed's stage 0 neither reports the gradient norm nor checks for NaN: both are done here."""
        if self.world.size > 1:
            with phase("reduce gradients"):
                self._deepspeed.buffered_allreduce_fallback()
        groups = self._deepspeed.optimizer.param_groups
        gradients = [weight.grad for group in groups for weight in group["params"] if weight.grad is not None]
        norm = math.sqrt(read_numbers(sum_of_squares(gradients)))
        applied = self._is_within_limit(norm)
        if applied:
            self._update_allowed = True
            unscale_and_clip(gradients, norm, self._grad_clip, scale=1.0)
            with phase("update weights"):
                self._deepspeed.optimizer.step()
        self._deepspeed.optimizer.zero_grad(set_to_none=True)
        return StepResult(applied, norm)

    def _is_update_allowed(self) -> bool:
        """Return whether the optimizer may update. It asks for each of its groups, when DeepSpeed knows the norm before
        clipping (ZeRO 1 to 3); the norm is copied to the host once per step."""
        if self._update_allowed is None:
            self._update_allowed = self._is_within_limit(float(self._deepspeed.optimizer._global_grad_norm))
        return self._update_allowed

    def _is_within_limit(self, norm: float) -> bool:
        return math.isfinite(norm) and norm <= self._norm_limit

    def _sum_over_shards(self, sums: Tensor) -> Tensor:
        """Per-parameter sums from the sums of each rank's shards, which are on the CPU under offload."""
        if self._deepspeed.zero_optimization_stage() == 0:
            return sums
        total = sums.to(self.device)
        dist.all_reduce(total)
        return total.to(sums.device)

    def _zero_while_frozen(self, gradient: Tensor) -> Tensor:
        """Gradient hook of parameters that start frozen. Zeros do not count in the norm, and ZeRO, which counts
        gradients as they arrive, still gets one for each parameter."""
        return torch.zeros_like(gradient) if self._step < self._freeze_steps else gradient

    def _on_device(self, microbatch: Microbatch) -> list[Tensor]:
        return [tensor.to(self.device, non_blocking=True) for tensor in microbatch]


def _set_zero3_leaves(model: MaskedLanguageModel, compiled: Collection[type[nn.Module]]) -> None:
    """Let ZeRO 3 gather all weights of a module before its forward, and none inside: not in compiled code, nor in the
    short layer, whose first run ends with an exception, which leaves out DeepSpeed's hooks after it."""
    if compiled:
        set_z3_leaf_modules(model, list(compiled))
    if model.short_layer is not None:
        set_z3_leaf_module(model.short_layer, True)
