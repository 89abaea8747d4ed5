"""DeepSpeed, as the training loop sees it: forward and backward of a microbatch, one update a step.

The objective is the mean over all predicted tokens of the global batch. Each microbatch contributes its summed loss
over the global count; DeepSpeed averages gradients over ranks, so that is multiplied by the world size first.
Accumulation is unmanaged: as many backward passes as there are microbatches, then one `step`.
"""

import contextlib
import datetime
import io
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.cpp_extension import is_ninja_available

from experiment.errors import UserError
from pretrain.batching.batch import Microbatch
from pretrain.batching.counter_rng import make_key
from pretrain.config import PretrainConfig
from pretrain.engine.ema import WeightAverage
from pretrain.engine.optimizers import PerParameterOptimizer
from pretrain.engine.parameter_groups import build_optimizer, parameter_groups
from pretrain.engine.partitions import fragments, global_norm
from pretrain.engine.settings import (
    Precision,
    offload_of,
    precision_of,
    ready_file,
    stage_of,
    stage_run,
    swap_folder,
)
from pretrain.modeling.masked_lm import MaskedLanguageModel, Predictions
from pretrain.world import World

log = logging.getLogger(__name__)


class StepResult(NamedTuple):
    applied: bool  # False: the norm is not finite, or above the limit
    grad_norm: float  # of the whole accumulated gradient, before clipping


class LossScaleError(Exception):
    """fp16 gradients overflow even at the smallest loss scale. Raised on all ranks in the same step."""


def connect(timeout: datetime.timedelta, rank: int | None = None, world_size: int | None = None) -> World:
    """Join the process group that the environment (MASTER_ADDR, RANK, WORLD_SIZE …) describes.

    `timeout`: how long a rank waits for the others before it takes them for dead.
    """
    # DeepSpeed compiles a shared-memory kernel for CPU inference at the first init, which training never uses and which
    # fails where there is no compiler. An empty table of available kernels keeps it from looking.
    deepspeed.ops.__compatible_ops__ = {}
    for name, alone in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
    ):
        os.environ.setdefault(name, alone)
    os.environ.setdefault("MASTER_PORT", "29500")
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(),
        auto_mpi_discovery=False,
        timeout=timeout,
        rank=-1 if rank is None else rank,
        world_size=-1 if world_size is None else world_size,
        verbose=False,
    )
    return World(dist.get_rank(), dist.get_world_size())


def disconnect() -> None:
    deepspeed.comm.destroy_process_group()


def check_precision(ds_config: dict[str, Any]) -> None:
    """Raises UserError where the device cannot compute in the configured precision, naming the file to use instead."""
    wanted, accelerator = precision_of(ds_config), get_accelerator()
    supported: dict[Precision, bool] = {
        "bf16": accelerator.is_bf16_supported(),
        "fp16": accelerator.is_fp16_supported(),
        "fp32": True,
    }
    if not supported[wanted]:
        instead = next(precision for precision, has in supported.items() if has)
        raise UserError(
            f"engine.ds_config: this device ({accelerator.device_name()}) cannot train in {wanted}; "
            f"use --engine.ds_config={ready_file(ds_config, instead, offload_of(ds_config))}"
        )


def check_offload(ds_config: dict[str, Any]) -> None:
    """Raises UserError where NVMe offload cannot work on this machine, naming the file to use instead."""
    if offload_of(ds_config) != "nvme":
        return
    disk = ds_config["zero_optimization"]["offload_optimizer"].get("nvme_path")
    if disk is not None and not (Path(disk).is_dir() and os.access(disk, os.W_OK)):
        raise UserError(f"engine.ds_config: 'nvme_path' is {disk}, which is no folder that can be written to here")
    if not (get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible() and is_ninja_available()):
        raise UserError(
            "engine.ds_config: for NVMe offload DeepSpeed builds its kernel 'async_io', which needs a C++ compiler, "
            "ninja and the headers of libaio (Debian: g++, ninja-build, libaio-dev) on every host; without them use "
            f"--engine.ds_config={ready_file(ds_config, precision_of(ds_config), 'cpu')}"
        )


def check_ds_config(ds_config: dict[str, Any], path: Path) -> None:
    """Raises UserError for values that DeepSpeed's own parser refuses."""
    try:
        DeepSpeedConfig(merged_ds_config(ds_config, grad_clip=0.0))
    except Exception as error:  # its parser raises many types
        problems = error.errors() if isinstance(error, ValidationError) else []
        what = "; ".join(f"'{'.'.join(map(str, p['loc']))}': {p['msg']}, found {p['input']!r}" for p in problems)
        raise UserError(f"{path}: DeepSpeed refuses it: {what or error}") from None


def merged_ds_config(ds_config: dict[str, Any], grad_clip: float, swap: Path | None = None) -> dict[str, Any]:
    """The JSON and what the run's own config decides. `swap`: this rank's folder for NVMe offload."""
    zero = ds_config.get("zero_optimization", {}) | {"stage": stage_run(ds_config)[0]}
    for key in ("offload_optimizer", "offload_param"):
        if swap is not None and (zero.get(key) or {}).get("device") == "nvme":
            zero[key] = zero[key] | {"nvme_path": str(swap)}
    if zero["stage"] == 3:
        zero.setdefault("memory_efficient_linear", False)  # else F.linear is replaced in the whole process
    merged = dict(ds_config)
    if precision_of(ds_config) != "fp32":  # where DeepSpeed would sum gradients of microbatches and ranks in 16 bit
        merged.setdefault("communication_data_type", "fp32")
        merged["data_types"] = {"grad_accum_dtype": "fp32"} | ds_config.get("data_types", {})
    return merged | {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Stage 0 neither reports the norm nor checks it: the engine below clips there.
        "gradient_clipping": grad_clip if zero["stage"] > 0 else 0.0,
        "zero_force_ds_cpu_optimizer": False,
    }


class Engine:
    """One model under DeepSpeed on this rank."""

    def __init__(
        self, model: MaskedLanguageModel, config: PretrainConfig, ds_config: dict[str, Any], world: World
    ) -> None:
        """`model`: the same fp32 weights on every rank."""
        self.world = world
        self.seed = config.run.seed
        swap = swap_folder(ds_config, Path(config.run.dir).absolute())
        self._swap = swap and swap / f"rank-{world.rank}"
        merged = merged_ds_config(ds_config, config.optimizer.grad_clip, self._swap)
        self.precision = precision_of(merged)
        stage, why = stage_run(ds_config)
        if why and world.rank == 0:
            log.warning("ZeRO %d in %s runs as ZeRO %d: %s", stage_of(ds_config), self.precision, stage, why)
        groups = parameter_groups(model.model, config.optimizer, config.model)
        frozen = [parameter for group in groups if group["frozen_until"] for parameter in group["params"]]
        optimizer = build_optimizer(config.optimizer, groups)
        if type(optimizer) not in ZERO_SUPPORTED_OPTIMIZERS:
            ZERO_SUPPORTED_OPTIMIZERS.append(type(optimizer))  # else it warns of an untested one: ours are tested here
        said = io.StringIO()
        with contextlib.redirect_stdout(said):  # one of its optimizers prints the machine's memory six times
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=merged, dist_init_required=False)
        logging.getLogger("deepspeed").info("%s", said.getvalue())
        logging.getLogger("DeepSpeed").addFilter(_is_news)
        self.deepspeed = engine
        self._loss_scaler = _defer_growth(engine.optimizer)
        self._grad_clip = config.optimizer.grad_clip
        self._freeze_steps = config.model.freeze_steps
        self._step = 0
        self._limit = math.inf
        self._within_limit: bool | None = None  # of the update that DeepSpeed is about to make, once it was asked
        optimizer.allowed = self._allowed
        if isinstance(optimizer, PerParameterOptimizer):
            optimizer.attach(fragments(engine), sorted(engine.param_names.values()), self._sum_over_parts)
        for parameter in frozen:
            parameter.register_hook(self._gradient_unless_frozen)
        decay = config.model.ema_decay
        self.average = None if decay is None else WeightAverage(engine, decay)

    @property
    def device(self) -> torch.device:
        return torch.device(self.deepspeed.device)

    def begin_step(self, step: int, learning_rate: float) -> None:
        """Before the first microbatch of `step`. `learning_rate`: of the layers that learn fastest."""
        self._step = step
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
            group["frozen"] = step < group["frozen_until"]

    def accumulate(self, microbatch: Microbatch, global_masked: int, step: int, number: int) -> Tensor:
        """Forward and backward of this rank's microbatch `number` of `step`; returns its summed loss, detached.

        Dropout is keyed by (seed, step, rank, microbatch), so a resumed run draws what the unbroken one would have.
        """
        self.deepspeed.train()
        torch.manual_seed(make_key(("dropout", self.seed, step, self.world.rank, number)) >> 1)
        predictions: Predictions = self.deepspeed(*self._on_device(microbatch))
        loss_sum = predictions.loss_sum.detach()
        # Times NaN where the loss is not finite, which not every such loss makes of its gradient by itself: the norm of
        # the gradient then tells all ranks.
        weight = self.world.size / global_masked + 0.0 * loss_sum
        self.deepspeed.backward(predictions.loss_sum * weight, scale_wrt_gas=False)
        return loss_sum

    def step(self, limit: float = math.inf) -> StepResult:
        """Reduce, clip, update. An update whose gradient's norm exceeds `limit` or is not finite is not applied: no
        weight, moment, step counter or decay changes. Frozen parameters are no part of the norm."""
        self._limit, self._within_limit = limit, None
        sharded = self.deepspeed.zero_optimization_stage() > 0
        result = self._step_when_sharded() if sharded else self._step_at_stage_0()
        if result.applied and self.average is not None:
            self.average.update()
        return result

    @torch.no_grad()
    def predict(self, microbatch: Microbatch) -> Predictions:
        """Forward only, dropout off."""
        self.deepspeed.eval()
        predictions: Predictions = self.deepspeed(*self._on_device(microbatch))
        return predictions

    @property
    def loss_scale(self) -> float | None:
        """The dynamic loss scale of fp16; None in other precisions."""
        return float(self.deepspeed.optimizer.loss_scale) if self.precision == "fp16" else None

    def check_loss_scale(self) -> None:
        """After a step that overflowed. Raises LossScaleError, on all ranks, where the loss scale cannot be lowered."""
        if self._loss_scaler is not None and self._loss_scaler.stuck:
            raise LossScaleError(
                f"fp16: gradients overflow even at the smallest loss scale, {self.loss_scale:g} (fp16.min_loss_scale "
                "in the DeepSpeed JSON). Either the loss has diverged or activations exceed fp16's range: go on from "
                "an earlier checkpoint with a lower optimizer.lr or a longer schedule.warmup_steps, use a bf16 file "
                "where the device has bf16, or lower min_loss_scale if it is above 1"
            )

    def overflowed(self, result: StepResult) -> bool:
        """Whether an update was skipped because a gradient overflowed fp16, as happens while the loss scale settles."""
        return self.precision == "fp16" and not math.isfinite(result.grad_norm)

    def close(self) -> None:
        self.deepspeed.destroy()
        if self._swap is not None:
            shutil.rmtree(self._swap, ignore_errors=True)
            with contextlib.suppress(OSError):  # not yet empty, or gone already
                self._swap.parent.rmdir()

    def _step_when_sharded(self) -> StepResult:
        self.deepspeed.step()
        if self._loss_scaler is not None:
            self._loss_scaler.settle()
        norm = float(self.deepspeed.get_global_grad_norm())
        return StepResult(bool(self.deepspeed.was_step_applied()) and self._is_within_limit(norm), norm)

    def _step_at_stage_0(self) -> StepResult:
        """DeepSpeed's stage 0 neither tells the gradient's norm nor stops at NaN: both are done here."""
        self.deepspeed.buffered_allreduce_fallback()
        parameters = [parameter for group in self.deepspeed.optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self._grad_clip or math.inf).item()
        applied = self._is_within_limit(norm)
        if applied:
            self._within_limit = True
            self.deepspeed.optimizer.step()
        self.deepspeed.optimizer.zero_grad(set_to_none=True)
        return StepResult(applied, norm)

    def _allowed(self) -> bool:
        """Asked by the optimizer for each of its groups; the norm is brought to the host once a step."""
        if self._within_limit is None:
            self._within_limit = self._is_within_limit(global_norm(self.deepspeed))
        return self._within_limit

    def _sum_over_parts(self, sums: Tensor) -> Tensor:
        """Of figures of whole parameters, from those of each rank's parts. The parts may lie on the CPU (offload)."""
        if self.deepspeed.zero_optimization_stage() == 0:
            return sums
        total = sums.to(self.device)
        dist.all_reduce(total)
        return total.to(sums.device)

    def _is_within_limit(self, norm: float) -> bool:
        return math.isfinite(norm) and norm <= self._limit

    def _gradient_unless_frozen(self, gradient: Tensor) -> Tensor:
        """Runs before DeepSpeed sees the gradient of a parameter that begins frozen. Zeros leave the norm to the
        others, and DeepSpeed, which counts gradients as they arrive, still gets one."""
        return torch.zeros_like(gradient) if self._step < self._freeze_steps else gradient

    def _on_device(self, microbatch: Microbatch) -> list[Tensor]:
        return [tensor.to(self.device, non_blocking=True) for tensor in microbatch]


class _LossScaler(DynamicLossScaler):  # type: ignore[misc]
    """DeepSpeed's dynamic loss scale (Micikevicius et al. 2018), put right in two places.

    DeepSpeed changes the scale before it divides the gradients by it, so that a step after which the scale doubles
    would be taken with half of its gradient: here a new scale holds from the next step on. And where DeepSpeed raises
    a bare Exception, at an overflow at the smallest scale, this one remembers it.
    """

    cur_scale: float
    stuck = False  # whether the last step overflowed at the smallest scale
    _next: float

    def update_scale(self, overflow: bool) -> None:
        scale, spent = self.cur_scale, 1 in (self.delayed_shift, self.cur_hysteresis)
        self.stuck = overflow and spent and scale <= self.min_scale
        super().update_scale(overflow)
        self.cur_scale, self._next = scale, self.cur_scale

    def settle(self) -> None:
        """After the step."""
        self.cur_scale = self._next


def _defer_growth(optimizer: Any) -> "_LossScaler | None":
    """The optimizer's loss scaler, made one of ours; None without dynamic loss scaling."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if not isinstance(scaler, DynamicLossScaler):
        return None
    scaler.__class__ = _LossScaler
    scaler.raise_error_at_min_scale = False
    assert isinstance(scaler, _LossScaler)
    return scaler


def _is_news(record: logging.LogRecord) -> bool:
    """Whether DeepSpeed says something that we do not: of a gradient that is not finite the loop says more, and with a
    fixed loss scale it is no overflow."""
    return "OVERFLOW! Skipping step" not in record.getMessage()
