"""Map parameters to this rank's ZeRO partitions: the fp32 masters and optimizer states of its slices.

Checkpoints, LAMB, StableAdamW, Muon and averaged weights are built on `Partitions.fragments`.

    ZeRO 0, fp32         the parameters themselves, all on every rank
    ZeRO 1, 2            one flat fp32 tensor per parameter group, sharded across ranks; `param._hp_mapping` says where
    ZeRO 3               flat tensors per sub-group; every parameter is sharded across ranks, padded to equal parts
    CPU offload          the same, in host memory
    NVMe offload         ZeRO 3 only; the flat tensors are empty except while their sub-group is resident
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
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


class Partitions:
    """The fragments that this rank owns, and the optimizer states of them. At ZeRO 0 every rank owns everything."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._stage = engine.zero_optimization_stage()

    def fragments(self) -> Iterator[Fragment]:
        """Yield the fragments. Under NVMe offload, tensors are valid only until the next fragment is requested."""
        match self._stage:
            case 3:
                return self._fragments_zero3()
            case 1 | 2:
                return self._fragments_zero12()
            case _:
                return self._fragments_zero0()

    def flat_tensors(self) -> list[Tensor]:
        """Return the tensors that hold the fragments. Tensor n holds slices of the same parameters on every rank."""
        match self._stage:
            case 3:
                return list(self._engine.optimizer.fp32_partitioned_groups_flat)
            case 1 | 2:
                return list(self._engine.optimizer.single_partition_of_fp32_groups)
            case _:
                # As at the other stages, without parameters that are never trained, such as sinusoidal positions.
                groups = self._engine.optimizer.param_groups
                return [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]

    def resident_fragments(self) -> Iterator[list[Fragment]]:
        """Yield the fragments, in lists whose tensors are valid together: one list, except under NVMe offload."""
        if getattr(self._engine.optimizer, "optimizer_swapper", None) is None:
            yield list(self.fragments())
        else:
            yield from ([fragment] for fragment in self.fragments())

    def optimizer_state(self, fragment: Fragment) -> dict[str, Tensor]:
        """Return the optimizer state of a fragment: a view [numel] of each per-element state, scalars unchanged.

        Empty before the first update.
        """
        state = {}
        for key, value in self._engine.basic_optimizer.state.get(fragment.flat, {}).items():
            state[key] = value.view(-1).narrow(0, fragment.offset, fragment.numel) if value.dim() else value
        return state

    @torch.no_grad()
    def restore(self, fragment: Fragment, master: Tensor, state: dict[str, Tensor]) -> None:
        """Overwrite a fragment's master [numel] and optimizer state ([numel] per element, scalars 0-dimensional);
        `copy_masters_to_model` must follow."""
        fragment.master.copy_(master)
        kept = self._engine.basic_optimizer.state[fragment.flat]
        for key, value in state.items():
            if value.dim() == 0:
                kept[key] = value.to(fragment.flat.device, copy=True)
            else:
                if key not in kept:
                    kept[key] = torch.zeros_like(fragment.flat)
                kept[key].view(-1).narrow(0, fragment.offset, fragment.numel).copy_(value)

    @torch.no_grad()
    def unround_masters(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Give masters the fp32 weights of the model, by parameter: DeepSpeed made them of rank 0's weights in `dtype`.
        Where those of this rank do not round to them, as those of another file, they stay."""
        for fragment in self.fragments():
            master, own = fragment.master, weights[fragment.name].view(-1).narrow(0, fragment.start, fragment.numel)
            own = own.to(master.device)
            master.copy_(torch.where(own.to(dtype) == master, own, master))

    @torch.no_grad()
    def copy_masters_to_model(self) -> None:
        """Update the weights that the model computes with, after masters were restored. Collective."""
        optimizer = self._engine.optimizer
        if self._stage == 3:
            optimizer._partition_all_parameters()
            optimizer.invalidate_secondary_tensor()  # of the weights before, with `zero_hpz_partition_size`
            for sub_group in range(len(optimizer.fp16_groups)):
                with _resident(optimizer, sub_group):
                    optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
            get_accelerator().synchronize()  # the stream that gathers weights does not wait for the current one
        elif hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()

    def clear_optimizer_state(self) -> None:
        """Drop all optimizer state, so that nothing is left of it that a checkpoint does not overwrite."""
        optimizer = self._engine.optimizer
        self._engine.basic_optimizer.state.clear()
        swapper = getattr(optimizer, "optimizer_swapper", None)
        if swapper is not None:  # NVMe offload
            swapper.purge_state()
        if hasattr(optimizer, "_hp_optimizer_states_linked"):  # ZeRO 1 and 2 keep views of it
            for parameter in chain.from_iterable(optimizer.bit16_groups):
                if parameter._hp_mapping is not None:
                    parameter._hp_mapping.optim_fragment = {}
            optimizer._hp_optimizer_states_linked = False

    def replicated_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of the model that every rank holds in full, by name.

        At ZeRO 3 these are the small ones that DeepSpeed keeps gathered; the others exist once, sharded across ranks.
        """
        for name, weight in self._engine.module.named_parameters():
            if not hasattr(weight, "ds_persist") or (weight.ds_persist and weight.numel() == weight.ds_numel):
                yield name, weight.data

    def masters_are_finite(self) -> bool:
        """Return whether all fp32 masters that this rank owns are finite."""
        return all(bool(fragment.master.isfinite().all()) for fragment in self.fragments())

    def _fragments_zero3(self) -> Iterator[Fragment]:
        optimizer, names = self._engine.optimizer, self._engine.param_names
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

    def _fragments_zero12(self) -> Iterator[Fragment]:
        optimizer, names = self._engine.optimizer, self._engine.param_names
        for flat, group in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                    master = flat.data.narrow(0, high.start, high.numel)
                    yield Fragment(names[parameter], tuple(parameter.shape), low.start, master, flat, high.start)

    def _fragments_zero0(self) -> Iterator[Fragment]:
        for parameter in self.flat_tensors():
            name = self._engine.param_names[parameter]
            yield Fragment(name, tuple(parameter.shape), 0, parameter.data.view(-1), parameter, 0)


@contextmanager
def _resident(optimizer: Any, sub_group: int) -> Iterator[None]:
    """Swap masters and states of a ZeRO 3 sub-group in, and out again if they are offloaded to disk."""
    swapped = optimizer._swappable_optimizer_subgroup(sub_group)
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_in(sub_group)
    yield
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_out(sub_group)
