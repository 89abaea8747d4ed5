"""The DeepSpeed JSON: precision, ZeRO, offload, communication.

`load_settings` reads it once; everything after that takes `DeepSpeedSettings`. Keys that the run's own config decides
are rejected.
"""

import json
import logging
import os
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError
from torch.utils.cpp_extension import is_ninja_available
from xxhash import xxh64_hexdigest

from experiment.config import did_you_mean, flatten
from experiment.errors import UserError, reason
from experiment.files import read_json
from experiment.process.hardware import check_gpu, has_native_bf16
from pretrain.ds_configs import find_ds_config
from pretrain.engine.deepspeed_version import check_version

log = logging.getLogger(__name__)

Precision = Literal["fp16", "bf16", "fp32"]
OffloadDevice = Literal["none", "cpu", "nvme"]

_SET_BY_RUN_CONFIG = {
    "train_batch_size": "batch.sequences",
    "train_micro_batch_size_per_gpu": "batch.microbatch_tokens",
    "gradient_accumulation_steps": "batch.sequences and batch.microbatch_tokens",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "the section 'optimizer'",
    "scheduler": "the section 'schedule'",
    "managed_gradient_accumulation": "deepcloze itself",
    "activation_checkpointing": "deepcloze itself",
    "prescale_gradients": "deepcloze itself",
    "gradient_predivide_factor": "deepcloze itself",
    "wandb": "the section 'tracking'",
}
_DEFAULTS = {"prescale_gradients": False, "gradient_predivide_factor": 1.0}  # of keys in many published files

_KNOWN_KEYS = (
    *_DEFAULTS,
    *("fp16", "bf16", "torch_autocast", "data_types", "zero_optimization", "communication_data_type"),
    *("aio", "comms_logger", "memory_breakdown", "steps_per_print", "dump_state"),
    *("wall_clock_breakdown", "flops_profiler"),
)

_LEAVES = "loses gradients at ZeRO 3 of modules whose inputs have none, such as embeddings; remove it"
_UNSUPPORTED = {  # unless false or 0
    # These report from DeepSpeed's step, which is not always called.
    "wall_clock_breakdown": "is not supported; remove it and use deepcloze pretrain --profile",
    "flops_profiler": "is not supported; remove it and use deepcloze pretrain --profile",
    "torch_autocast": "scales gradients after their norm is taken and clipped; remove it and enable 'fp16' or 'bf16'",
    "fp16.loss_scale": "sets a constant scale, at which gradients that overflow would skip every update; remove it",
    "fp16.fp16_master_weights_and_grads": "keeps master weights in 16 bits; remove it",
    "bf16.bf16_master_weights_and_grads": "keeps master weights in 16 bits; remove it",
    "bf16.bf16_optimizer_states": "keeps master weights in 16 bits; remove it",
    "zero_optimization.legacy_stage1": "was removed from DeepSpeed; remove it",
    "zero_optimization.round_robin_gradients": "breaks DeepSpeed's parameter mapping; remove it",
    "zero_optimization.zenflow": "replaces the optimizer and leaves out updates; remove it",
    "zero_optimization.zero_quantized_weights": "would train with weights of 8 bits; remove it",
    "zero_optimization.zero_quantized_nontrainable_weights": "would compute with weights of 8 bits; remove it",
    "zero_optimization.zero_quantized_gradients": "would sum gradients of 4 bits; remove it",
    "zero_optimization.stage3_module_granularity_threshold": _LEAVES,
    "zero_optimization.module_granularity_threshold": _LEAVES,
    "zero_optimization.leaf_module": _LEAVES,
    "zero_optimization.cpu_offload": 'is an old name; use \'offload_optimizer\': {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'is an old name; use \'offload_param\': {"device": "cpu"}',
    "zero_optimization.offload_optimizer.super_offload": "splits the optimizer in two; remove it",
}


@dataclass(frozen=True)
class DeepSpeedSettings:
    path: Path
    precision: Precision  # of weights and activations
    requested_zero_stage: int  # in the JSON
    zero_stage: int  # that the run uses
    stage_change: str  # why the two differ; empty where they don't
    offload: OffloadDevice  # where master weights and optimizer states are kept; none: on the device
    nvme_path: Path | None  # where NVMe offload swaps to, if the JSON says so
    raw: Mapping[str, Any]  # without keys that are null

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[self.precision]

    def preset(self, precision: Precision, offload: OffloadDevice) -> str:
        """Return the file in ds_configs/ with the same ZeRO stage and another precision or offload device."""
        suffix = "" if offload == "none" else f"_{offload}_offload"
        stage = max(self.requested_zero_stage, 2) if suffix else self.requested_zero_stage
        return f"ds_configs/{precision}_zero{stage}{suffix}.json"

    def swap_folder(self, run: Path) -> Path | None:
        """Return the swap folder of a run under NVMe offload; None for other runs.

        It is a folder of the run's own, because DeepSpeed's file names are the same in all runs: below the JSON's
        `nvme_path`, or in the run folder where there is none.
        """
        if self.offload != "nvme":
            return None
        if self.nvme_path is None:
            return run / "swap"
        return self.nvme_path / f"deepcloze-{xxh64_hexdigest(str(run).encode())}"

    def engine_config(self, grad_clip: float, swap_folder: Path | None = None) -> dict[str, Any]:
        """Return the config for `deepspeed.initialize`: the JSON and the settings of deepcloze.

        `swap_folder`: this rank's folder for NVMe offload.
        """
        zero = self.raw.get("zero_optimization", {}) | {"stage": self.zero_stage}
        for key in ("offload_optimizer", "offload_param"):
            if swap_folder is not None and _offload_device(zero, key) == "nvme":
                zero[key] = zero[key] | {"nvme_path": str(swap_folder)}
        if self.zero_stage < 2:
            zero["overlap_comm"] = False  # nothing is reduced during a backward pass, and DeepSpeed refuses it
        if self.zero_stage == 3:
            zero.setdefault("memory_efficient_linear", False)  # it would replace F.linear in the whole process
        merged = dict(self.raw)
        if self.precision != "fp32":  # DeepSpeed would accumulate and reduce gradients in 16 bit
            merged.setdefault("communication_data_type", "fp32")
            merged["data_types"] = {"grad_accum_dtype": "fp32"} | self.raw.get("data_types", {})
        if uses_zero1_optimizer(self.zero_stage, self.offload):
            # With these DeepSpeed builds the optimizer that `Zero1Optimizer` replaces.
            merged["data_types"] = {"grad_accum_dtype": self.precision}
            zero["contiguous_gradients"] = True
        return merged | {
            "zero_optimization": zero,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": grad_clip,
            "zero_force_ds_cpu_optimizer": False,
            "timers": {"throughput": {"enabled": False}},  # it waits for the GPU at each microbatch
        }


def uses_zero1_optimizer(zero_stage: int, offload: OffloadDevice) -> bool:
    """Return whether `Zero1Optimizer` accumulates and reduces the gradients, and not DeepSpeed."""
    return zero_stage == 1 and offload == "none"


def load_settings(name: str) -> DeepSpeedSettings:
    """Find, read and check a DeepSpeed JSON.

    Raises UserError that names the file and the key, also for values that DeepSpeed's own parser rejects, and if the
    installed DeepSpeed is not one of the tested releases.
    """
    check_version()
    try:
        path = find_ds_config(name)
    except ValueError as error:
        raise UserError(f"engine.ds_config: {error}") from None
    settings = parse_settings(_read_json(path), path)
    _check_with_deepspeed(settings)
    return settings


def parse_settings(raw: object, path: Path) -> DeepSpeedSettings:
    """Check the content of a DeepSpeed JSON. `path` is named in messages. Raises UserError."""
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    raw = _without_nulls(raw)
    _check_keys(raw, path)
    zero = _check_zero(raw, path)
    precision = _check_precision_keys(raw, path)
    requested: int = zero.get("stage", 0)
    offload = _offload_device(zero, "offload_optimizer")
    nvme_paths = _nvme_paths(zero)
    stage, change = _usable_stage(requested, precision, offload)
    return DeepSpeedSettings(
        path=path,
        precision=precision,
        requested_zero_stage=requested,
        zero_stage=stage,
        stage_change=change,
        offload=offload,
        nvme_path=Path(nvme_paths[0]) if nvme_paths else None,
        raw=raw,
    )


def _without_nulls(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Remove keys that are null, and sections without others: DeepSpeed takes some for not set, and rejects others."""
    found = {key: _without_nulls(value) if isinstance(value, dict) else value for key, value in raw.items()}
    return {key: value for key, value in found.items() if value is not None and value != {}}


def check_device_support(settings: DeepSpeedSettings) -> None:
    """Raise UserError where this machine lacks the precision, or a requirement of NVMe offload, naming the file to
    use, and where torch cannot use its GPU."""
    accelerator = get_accelerator()
    on_gpu = accelerator.device_name() == "cuda"
    if on_gpu:
        check_gpu()
    supported: dict[Precision, bool] = {
        "bf16": has_native_bf16("cuda") if on_gpu else accelerator.is_bf16_supported(),  # DeepSpeed counts emulation
        "fp16": accelerator.is_fp16_supported(),
        "fp32": True,
    }
    if not supported[settings.precision]:
        instead = next(precision for precision, has in supported.items() if has)
        raise unsupported_precision(settings, f"this device ({accelerator.device_name()})", instead)
    if settings.offload == "nvme":
        check_nvme(settings)


def unsupported_precision(settings: DeepSpeedSettings, device: str, instead: Precision) -> UserError:
    """Return the error about a device that lacks the precision; `instead` is one that it has."""
    return UserError(
        f"engine.ds_config: {device} cannot train in {settings.precision}; "
        f"use --engine.ds_config={settings.preset(instead, settings.offload)}"
    )


def warn_of_emulation(settings: DeepSpeedSettings) -> None:
    """Log a warning if this device computes bf16 several times slower than fp32."""
    for warning in emulation_warnings(settings, get_accelerator().device_name()):
        log.warning(warning)


def emulation_warnings(settings: DeepSpeedSettings, device_type: str) -> Iterator[str]:
    """Yield a warning if devices of this type, cpu or cuda, compute bf16 several times slower than fp32 here."""
    if settings.precision == "bf16" and not has_native_bf16(device_type):
        preset = settings.preset("fp32", settings.offload)
        yield f"this device only emulates bf16, several times slower than fp32: use --engine.ds_config={preset}"


def check_nvme(settings: DeepSpeedSettings) -> None:
    """Raise UserError where NVMe offload cannot work on this machine."""
    disk = settings.nvme_path
    if disk is not None and not (disk.is_dir() and os.access(disk, os.W_OK)):
        raise UserError(f"engine.ds_config: 'nvme_path' is {disk}, which is not a writable folder on this machine")
    # torch looks for ninja on PATH, where the scripts of an environment are only if it is activated.
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:{sysconfig.get_path('scripts')}"
    if not (get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible() and is_ninja_available()):
        raise UserError(
            "engine.ds_config: for NVMe offload DeepSpeed builds its kernel 'async_io', which needs a C++ compiler, "
            "ninja and the headers of libaio (Debian: g++, ninja-build, libaio-dev) on every host; without them use "
            f"--engine.ds_config={settings.preset(settings.precision, 'cpu')}"
        )


def _usable_stage(requested: int, precision: Precision, offload: OffloadDevice) -> tuple[int, str]:
    """Return the ZeRO stage that a run uses, and why it is not the requested one."""
    if requested == 0 and precision != "fp32":
        return 1, "DeepSpeed's stage 0 changes 16-bit weights at start-up and cannot accumulate gradients in fp32"
    if requested < 3 and offload == "nvme":
        return 3, "DeepSpeed offloads to NVMe at stage 3 only; at lower stages it would use host memory instead"
    return requested, ""


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None


def _check_keys(raw: Mapping[str, Any], path: Path) -> None:
    for key, owner in _SET_BY_RUN_CONFIG.items():
        if key in raw and (key, raw[key]) not in _DEFAULTS.items():
            raise UserError(f"{path}: '{key}' is set by {owner} in the run's config; remove it from this file")
    for key in raw:  # DeepSpeed ignores unknown keys
        if key not in _KNOWN_KEYS:
            raise UserError(f"{path}: unknown key '{key}'{did_you_mean(key, _KNOWN_KEYS)}")
    for key, value in flatten(raw).items():
        if value == "auto":
            raise UserError(f"{path}: '{key}' is \"auto\", which deepcloze does not support; set a value or remove it")
        for name, why in _UNSUPPORTED.items():
            if (key == name and value) or key.startswith(f"{name}."):
                raise UserError(f"{path}: '{name}' {why}")
    for section in ("zero_optimization", "fp16", "bf16", "data_types"):
        if not isinstance(raw.get(section, {}), dict):
            raise UserError(f"{path}: '{section}' is {json.dumps(raw[section])}, expected a JSON object")
    for section in ("fp16", "bf16"):
        enabled = raw.get(section, {}).get("enabled", False)
        if not isinstance(enabled, bool):  # DeepSpeed takes "off" and the like as false
            raise UserError(f"{path}: '{section}.enabled' is {json.dumps(enabled)}, expected true or false")


def _check_zero(raw: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return the section zero_optimization."""
    zero: dict[str, Any] = raw.get("zero_optimization", {})
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"{path}: 'zero_optimization.stage' is {zero.get('stage')}, expected 0, 1, 2 or 3")
    if (norm := zero.get("compute_grad_norm", True)) is not True:
        raise UserError(
            f"{path}: 'compute_grad_norm' is {json.dumps(norm)}, but every update needs the norm; remove it"
        )
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        _check_offload(zero, key, lowest, path)
    if _offload_device(zero, "offload_param") == "nvme" and _offload_device(zero, "offload_optimizer") != "nvme":
        raise UserError(f"{path}: 'offload_param' is on NVMe, which needs 'offload_optimizer' there, too")
    if len(set(_nvme_paths(zero))) > 1:
        raise UserError(f"{path}: 'nvme_path' of 'offload_optimizer' and 'offload_param' differ; expected one folder")
    return zero


def _offload_device(zero: Mapping[str, Any], key: str) -> OffloadDevice:
    device: OffloadDevice = zero.get(key, {}).get("device", "none")
    return device


def _nvme_paths(zero: Mapping[str, Any]) -> list[str]:
    """Return the values of `nvme_path` of the parts that are offloaded to NVMe."""
    sections = [zero[key] for key in ("offload_optimizer", "offload_param") if _offload_device(zero, key) == "nvme"]
    return [section["nvme_path"] for section in sections if "nvme_path" in section]


def _check_offload(zero: Mapping[str, Any], key: str, lowest_stage: int, path: Path) -> None:
    offload, stage = zero.get(key, {}), zero.get("stage", 0)
    if not isinstance(offload, dict):
        raise UserError(f"{path}: 'zero_optimization.{key}' is {json.dumps(offload)}, expected a JSON object")
    if offload.get("device", "none") != "none" and stage < lowest_stage:
        raise UserError(f"{path}: '{key}' needs at least ZeRO stage {lowest_stage}, found stage {stage}")
    if not isinstance(offload.get("nvme_path", ""), str):
        raise UserError(
            f"{path}: 'zero_optimization.{key}.nvme_path' is {json.dumps(offload['nvme_path'])}, expected a folder"
        )
    if offload.get("ratio", 1) != 1:
        raise UserError(f"{path}: '{key}.ratio' splits the optimizer in two; remove it")


def _check_precision_keys(raw: Mapping[str, Any], path: Path) -> Precision:
    fp16, bf16 = (raw.get(key, {}) for key in ("fp16", "bf16"))
    if fp16.get("enabled") and bf16.get("enabled"):
        raise UserError(f"{path}: both 'fp16' and 'bf16' are enabled; choose one")
    precision: Precision = "fp16" if fp16.get("enabled") else "bf16" if bf16.get("enabled") else "fp32"
    types = raw.get("data_types", {})
    for key in types:
        if key != "grad_accum_dtype":
            raise UserError(f"{path}: 'data_types.{key}' is not supported, only 'grad_accum_dtype'; remove it")
    sums = types.get("grad_accum_dtype", "fp32")
    if sums not in ("fp32", precision):  # DeepSpeed reads it when it builds its optimizer
        known = '"fp32"' if precision == "fp32" else f'"fp32" or "{precision}"'
        raise UserError(f"{path}: 'data_types.grad_accum_dtype' is {json.dumps(sums)}, expected {known}")
    return precision


def _check_with_deepspeed(settings: DeepSpeedSettings) -> None:
    try:
        parsed = DeepSpeedConfig(settings.engine_config(grad_clip=0.0))
    except Exception as error:  # its parser raises many types
        problems = error.errors() if isinstance(error, ValidationError) else []
        what = "; ".join(f"'{'.'.join(map(str, p['loc']))}': {p['msg']}, found {p['input']!r}" for p in problems)
        raise UserError(f"{settings.path}: DeepSpeed rejects it: {what or error}") from None
    fp16, steps, size = parsed.float16_config, parsed.steps_per_print, parsed.zero_config.allgather_bucket_size
    stage, hysteresis = settings.zero_stage, fp16.hysteresis if fp16.enabled else 1
    power = fp16.initial_scale_power if fp16.enabled else 0
    is_read = stage > 1 or settings.offload != "none"  # by DeepSpeed's `step`
    counts = not is_read or steps is None or (isinstance(steps, int | float) and steps > 0)
    for key, value, valid, expected in (  # DeepSpeed's parser accepts any value
        ("fp16.hysteresis", hysteresis, hysteresis > 0, "at least 1: with less the loss scale never falls"),
        ("fp16.initial_scale_power", power, abs(power) < 64, "from -63 to 63"),
        ("steps_per_print", steps, counts, "a number above 0"),
        ("zero_optimization.allgather_bucket_size", size, size % 2 == 0 or stage not in (1, 2), "an even number"),
    ):
        if not valid:
            raise UserError(f"{settings.path}: '{key}' is {json.dumps(value)}, expected {expected}")
