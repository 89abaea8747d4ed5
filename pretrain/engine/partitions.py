"""Which slice of which parameter this rank owns, and where DeepSpeed keeps its fp32 master and optimizer state.

The one module that knows DeepSpeed's private attributes (0.19): checkpoints, and whatever else has to see parameters
whole or by name, stand on `fragments`. A DeepSpeed release that moves an attribute breaks this file and its test.

    stage 0 fp32         the parameters themselves, all on every rank
    stages 1, 2          one flat fp32 tensor per parameter group, cut across ranks; `param._hp_mapping` says where
    stage 1 bf16 + fp32 gradient accumulation (BF16_Optimizer)   the same under other names
    stage 3              flat tensors per sub-group; every parameter is cut across ranks, padded to equal parts
    offload to the CPU   the same, in the host's memory
    offload to NVMe      stage 3 only; the flat tensors are empty but while their sub-group is resident

"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """This rank's slice [start, start + numel) of one flattened parameter."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    master: Tensor  # fp32 [numel], a view
    flat: Tensor  # the tensor that holds the master, and the key of its optimizer state
    offset: int  # of the master in `flat`

    @property
    def numel(self) -> int:
        return self.master.numel()


def fragments(engine: Any) -> Iterator[Fragment]:
    """The fragments that this rank owns. Stage 0: every rank owns everything.

    Under NVMe offload a fragment's tensors can be read and written until the next one is asked for, not afterwards.
    """
    optimizer, names = engine.optimizer, engine.param_names
    stage = engine.zero_optimization_stage()
    if stage == 3:
        for sub_group, group in enumerate(optimizer.fp16_groups):
            with _resident(optimizer, sub_group):
                for parameter in group:
                    _, offset, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
                    start = part * optimizer._get_param_partition_rank(parameter)
                    numel = min(part, parameter.ds_numel - start)  # the last parts are padded
                    if numel > 0:
                        flat = optimizer.fp32_partitioned_groups_flat[sub_group]
                        master = flat.data.narrow(0, offset, numel)
                        yield Fragment(names[parameter], tuple(parameter.ds_shape), start, master, flat, offset)
    elif stage in (1, 2):
        bf16_optimizer = hasattr(optimizer, "fp32_groups_flat_partition")
        flats = optimizer.fp32_groups_flat_partition if bf16_optimizer else optimizer.single_partition_of_fp32_groups
        groups = optimizer.bf16_groups if bf16_optimizer else optimizer.bit16_groups
        for flat, group in zip(flats, groups, strict=True):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                    master = flat.data.narrow(0, high.start, high.numel)
                    yield Fragment(names[parameter], tuple(parameter.shape), low.start, master, flat, high.start)
    else:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield Fragment(names[parameter], tuple(parameter.shape), 0, parameter.data.view(-1), parameter, 0)


def state_of(engine: Any, fragment: Fragment) -> dict[str, Tensor]:
    """The optimizer state of a fragment: views [numel] of what is kept per element, scalars as they are.

    Empty before the first update.
    """
    state = {}
    for key, value in base_optimizer(engine).state.get(fragment.flat, {}).items():
        per_element = value.dim() > 0 and value.numel() == fragment.flat.numel()
        state[key] = value.reshape(-1).narrow(0, fragment.offset, fragment.numel) if per_element else value
    return state


@torch.no_grad()
def restore_fragment(engine: Any, fragment: Fragment, master: Tensor, state: dict[str, Tensor]) -> None:
    """Overwrite a fragment's master [numel] and optimizer state ([numel] per element, scalars 0-dimensional)."""
    fragment.master.copy_(master)
    kept = base_optimizer(engine).state[fragment.flat]
    for key, value in state.items():
        if value.dim() == 0:
            kept[key] = value.to(fragment.flat.device, copy=True)
        else:
            if key not in kept:
                kept[key] = torch.zeros_like(fragment.flat)
            kept[key].view(-1).narrow(0, fragment.offset, fragment.numel).copy_(value)


@torch.no_grad()
def refresh_model(engine: Any) -> None:
    """After masters were restored: make the weights that the model computes with from them. Collective."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        optimizer._partition_all_parameters()
        for sub_group in range(len(optimizer.fp16_groups)):
            with _resident(optimizer, sub_group):
                optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


@contextmanager
def _resident(optimizer: Any, sub_group: int) -> Iterator[None]:
    """Masters and states of a sub-group of stage 3 in memory, then back on the disk if that is their place."""
    swapped = optimizer._swappable_optimizer_subgroup(sub_group)
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_in(sub_group)
    yield
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_out(sub_group)


def forget_state(engine: Any) -> None:
    """Before a restoring: what the engine has learned since a checkpoint that knows less must not stay."""
    base_optimizer(engine).state.clear()
    swapper = getattr(engine.optimizer, "optimizer_swapper", None)
    if swapper is not None:  # NVMe offload
        swapper.purge_state()
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):  # stages 1 and 2 have views, which would keep it alive
        for parameter in engine.param_names:
            if parameter._hp_mapping is not None:
                parameter._hp_mapping.optim_fragment = {}
        engine.optimizer._hp_optimizer_states_linked = False


def replicas(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights that every rank holds whole, by name, as the model computes with them.

    At stage 3 those are the small ones that DeepSpeed keeps gathered; the others exist once, cut across ranks.
    """
    for name, parameter in engine.module.named_parameters():
        if not hasattr(parameter, "ds_persist") or (parameter.ds_persist and parameter.numel() == parameter.ds_numel):
            yield name, parameter.data


def all_finite(engine: Any) -> bool:
    """Whether all fp32 masters that this rank owns are numbers."""
    return all(bool(fragment.master.isfinite().all()) for fragment in fragments(engine))


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's wrapper; its state is keyed by `Fragment.flat`."""
    base: torch.optim.Optimizer = engine.basic_optimizer
    return base


def global_norm(engine: Any) -> float:
    """Of the whole gradient before clipping, at stages 1 to 3; known by the time the torch optimizer is called."""
    return float(engine.optimizer._global_grad_norm)


def loss_scaler_state(engine: Any) -> dict[str, float]:
    """The dynamic loss scaler's numbers; empty where there is none."""
    scaler = _dynamic_scaler(engine)
    return {} if scaler is None else {key: getattr(scaler, key) for key in _SCALER}


def restore_loss_scaler(engine: Any, state: dict[str, float]) -> None:
    """Left as new where the state is empty, that of another precision; passed over where the scale is constant."""
    scaler = _dynamic_scaler(engine)
    if scaler is not None:
        for key, value in state.items():
            setattr(scaler, key, value)


def _dynamic_scaler(engine: Any) -> Any:
    """None in bf16 and fp32, where DeepSpeed has a constant scale of 1 at some stages."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
