"""The DeepSpeed JSON: precision, ZeRO, offload, communication. What the run's own config decides is refused in it."""

import json
from pathlib import Path
from typing import Any, Literal

from xxhash import xxh64_hexdigest

from experiment.config import nearest
from experiment.errors import UserError

Precision = Literal["fp16", "bf16", "fp32"]
Device = Literal["none", "cpu", "nvme"]

REPOSITORY = Path(__file__).resolve().parents[2]

_OURS = {
    "train_batch_size": "batch.sequences",
    "train_micro_batch_size_per_gpu": "batch.microbatch_tokens",
    "gradient_accumulation_steps": "batch.sequences and batch.microbatch_tokens",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "the section 'optimizer'",
    "scheduler": "the section 'schedule'",
    "managed_gradient_accumulation": "deepcloze itself",
    "activation_checkpointing": "deepcloze itself",
    "wandb": "the section 'tracking'",
}

_KNOWN = (
    *("fp16", "bf16", "torch_autocast", "data_types", "zero_optimization", "communication_data_type"),
    *("prescale_gradients", "gradient_predivide_factor", "sparse_gradients", "aio", "comms_logger"),
    *("memory_breakdown", "wall_clock_breakdown", "steps_per_print", "dump_state", "flops_profiler"),
)


def find_ds_config(name: str) -> Path:
    """`name` as a path from the working directory, else from the repository. Raises UserError."""
    for path in (Path(name).absolute(), REPOSITORY / name):
        if path.is_file():
            return path
    ready = sorted(path.name for path in (REPOSITORY / "ds_configs").glob("*.json"))
    raise UserError(
        f"engine.ds_config: no file '{name}', neither here nor in the repository; ready ones: {', '.join(ready)}"
    )


def read_ds_config(path: Path) -> dict[str, Any]:
    """The JSON at `path`, checked. Raises UserError, naming the key."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(config).__name__}")
    for key, owner in _OURS.items():
        if key in config:
            raise UserError(f"{path}: '{key}' is set by {owner} in the run's config; take it out of this file")
    for key in config:  # DeepSpeed itself passes over what it does not know
        if key not in _KNOWN:
            raise UserError(f"{path}: unknown key '{key}'{nearest(key, _KNOWN)}")
    for key, value in _leaves(config):
        if value == "auto":
            raise UserError(
                f"{path}: '{key}' is \"auto\", which only other frameworks fill in; write the value or leave it out"
            )
    for section in ("zero_optimization", "fp16", "bf16"):
        if not isinstance(config.get(section, {}), dict):
            raise UserError(f"{path}: '{section}' is {json.dumps(config[section])}, expected a JSON object")
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"{path}: 'zero_optimization.stage' is {zero.get('stage')}, expected 0, 1, 2 or 3")
    if zero.get("round_robin_gradients"):
        raise UserError(f"{path}: 'round_robin_gradients' breaks DeepSpeed's own parameter mapping; leave it out")
    if zero.get("compute_grad_norm") is False:
        raise UserError(f"{path}: 'compute_grad_norm' is false, but every update waits for the norm; leave it out")
    if config.get("fp16", {}).get("loss_scale"):
        raise UserError(
            f"{path}: 'fp16.loss_scale' is {config['fp16']['loss_scale']}: a constant scale at which gradients "
            "overflow would skip every update; write 0, which lets it find its place"
        )
    if config.get("torch_autocast"):
        raise UserError(
            f"{path}: 'torch_autocast' scales gradients after their norm is taken and clipped; leave it out and enable "
            "'fp16' or 'bf16'"
        )
    _check_offload(zero, path)
    if config.get("fp16", {}).get("enabled") and config.get("bf16", {}).get("enabled"):
        raise UserError(f"{path}: both 'fp16' and 'bf16' are enabled; choose one")
    return config


def precision_of(config: dict[str, Any]) -> Precision:
    """What the model computes in."""
    if config.get("fp16", {}).get("enabled"):
        return "fp16"
    return "bf16" if config.get("bf16", {}).get("enabled") else "fp32"


def stage_of(config: dict[str, Any]) -> int:
    """The ZeRO stage that the JSON asks for; see `stage_run`."""
    stage: int = config.get("zero_optimization", {}).get("stage", 0)
    return stage


def offload_of(config: dict[str, Any]) -> Device:
    """Where masters and optimizer states are kept: on the computing device, in the host's memory or on its disk."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    device: Device = offload.get("device", "none")
    return device


def swap_folder(config: dict[str, Any], run: Path) -> Path | None:
    """Where a run with NVMe offload swaps to; None for other runs.

    It is below the `nvme_path` of the JSON, in a folder of this run's own, since DeepSpeed's file names are the same
    in all runs; without that, in the run folder.
    """
    if offload_of(config) != "nvme":
        return None
    disk = config["zero_optimization"]["offload_optimizer"].get("nvme_path")
    return run / "swap" if disk is None else Path(disk) / f"deepcloze-{xxh64_hexdigest(str(run).encode())}"


def stage_run(config: dict[str, Any]) -> tuple[int, str]:
    """The ZeRO stage that a run takes, and why it is not the one in the JSON where it is not."""
    stage = stage_of(config)
    if stage == 0 and precision_of(config) != "fp32":
        return 1, "DeepSpeed's own stage 0 alters 16-bit weights at start, and cannot accumulate gradients in fp32"
    if stage < 3 and offload_of(config) == "nvme":
        return 3, "DeepSpeed offloads to NVMe at stage 3 only; below, it would fill the host's memory instead"
    return stage, ""


def ready_file(config: dict[str, Any], precision: Precision, device: Device) -> str:
    """The name of the ready file with the same stage, of another precision or offload device."""
    offload = "" if device == "none" else f"_{device}_offload"
    stage = max(stage_of(config), 2) if offload else stage_of(config)
    return f"ds_configs/{precision}_zero{stage}{offload}.json"


def _check_offload(zero: dict[str, Any], path: Path) -> None:
    stage = zero.get("stage", 0)
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        offload = zero.get(key) or {}
        if not isinstance(offload, dict):
            raise UserError(f"{path}: 'zero_optimization.{key}' is {json.dumps(offload)}, expected a JSON object")
        if offload.get("device", "none") not in ("none", "cpu", "nvme"):
            raise UserError(
                f"{path}: 'zero_optimization.{key}.device' is {json.dumps(offload['device'])}, "
                'expected "cpu", "nvme" or "none"'
            )
        if offload.get("device", "none") != "none" and stage < lowest:
            raise UserError(f"{path}: '{key}' needs at least ZeRO stage {lowest}, found stage {stage}")
        for option, only in (("ratio", 1), ("super_offload", False)):
            if offload.get(option, only) != only:
                raise UserError(f"{path}: '{key}.{option}' splits the optimizer in two; leave it out")


def _leaves(tree: dict[str, Any], above: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        leaves += _leaves(value, f"{above}{key}.") if isinstance(value, dict) else [(f"{above}{key}", value)]
    return leaves
