"""Muon under ZeRO: momentum, orthogonalized, for the hidden matrices, and AdamW for all other parameters.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), with decoupled weight decay and the scale of Liu et al.
2025 (Moonlight, arXiv 2502.16982), which lets AdamW's learning rate and weight decay carry over:

    B <- momentum B + (1 - momentum) G          G: the whole gradient of the global batch, clipped
    U <- (1 - momentum) G + momentum B          Nesterov; else B
    W <- (1 - lr decay) W - lr scale NewtonSchulz(U)

The scale is Moonlight's, 0.2 sqrt(max(rows, columns)), or Jordan's, sqrt(max(1, rows / columns)).

NewtonSchulz(U) approximates the nearest matrix with orthonormal rows or columns. It needs the whole matrix, which ZeRO
shards across ranks, so each matrix is orthogonalized by one rank: the others send it their slices, and get back those
of the result. The matrices of an update are exchanged by two collectives, and spread over ranks by their cost.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.engine.deepspeed_settings import Precision
from pretrain.engine.optimizers import AdamW, Group
from pretrain.engine.partitions import Fragment
from pretrain.optimizer_config import MuonConfig

# Of the quintic in the source above: chosen for the steepest slope at zero, so that small singular values grow fastest.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPSILON = 1e-7
_MATCHED_RMS = 0.2  # of the elements of an update, about as for AdamW


@torch.no_grad()
def orthogonalize(matrix: Tensor) -> Tensor:
    """Newton–Schulz iterations, in the dtype of `matrix`. Returns a new tensor [rows, columns] whose singular values
    are between about 0.7 and 1.2, except values that were close to zero."""
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=_EPSILON)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def orthogonalization_flops(rows: int, columns: int) -> float:
    """Floating-point operations of `orthogonalize`."""
    short, long = min(rows, columns), max(rows, columns)
    return _ITERATIONS * (4.0 * short**2 * long + 2.0 * short**3)


def orthogonalization_dtype(options: MuonConfig, precision: Precision) -> torch.dtype:
    """Return the dtype of Newton–Schulz. `precision`: of the run."""
    return torch.bfloat16 if (options.precision or precision) == "bf16" else torch.float32


def assign(costs: Mapping[str, float], held: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the rank that orthogonalizes each matrix. The most expensive first, each on the rank that has the least to
    do; if there are several, on the one that holds most of it.

    held: elements of each matrix on each rank, [ranks].
    """
    load = [0.0] * len(next(iter(held.values())))
    owners = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owner = min(range(len(load)), key=lambda rank: (load[rank], -held[name][rank], rank))
        load[owner] += costs[name]
        owners[name] = owner
    return owners


class _Slice(NamedTuple):
    """The elements [start, start + numel) of a flattened matrix, which a rank holds in one of its tensors."""

    flat: int  # number of the tensor
    offset: int  # in that tensor
    start: int
    numel: int


class _Transfer(NamedTuple):
    name: str
    source: int  # rank
    target: int
    part: _Slice  # as the rank that is not the owner holds it


class _Exchange(NamedTuple):
    own: list[_Transfer]  # of this rank; both ranks of a transfer have them in the same order
    leaves_ranks: bool  # whether any rank sends something to another one


class _Plan(NamedTuple):
    """The assignment of matrices to ranks that orthogonalize them."""

    owned: list[str]  # by this rank
    updates: _Exchange  # to the owners; at ZeRO 0 they have them
    results: _Exchange  # from the owners


class Muon(AdamW):
    """Updates groups with the key `matrices` as described above, the others as AdamW."""

    def __init__(
        self,
        groups: list[Group],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        options: MuonConfig,
        precision: Precision,
    ) -> None:
        """`precision`: of the run."""
        super().__init__(groups, lr=lr, betas=betas, eps=eps)
        self._options = options
        self._dtype = orthogonalization_dtype(options, precision)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._plans: dict[tuple[int, ...], _Plan] = {}

    def attach(self, flats: Sequence[Tensor], fragments: Iterable[Fragment], device: torch.device) -> None:
        """Register the parameters in the optimizer's tensors. Collective.

        flats: this rank's tensors. Tensor n holds slices of the same parameters on every rank.
        device: that orthogonalizes.
        """
        self._rank, self._ranks, self._device = dist.get_rank(), dist.get_world_size(), device
        self._numbers = {flat: number for number, flat in enumerate(flats)}
        held = {}
        for each in fragments:
            held[each.name] = each.shape, _Slice(self._numbers[each.flat], each.offset, each.start, each.numel)
        everywhere: list[Any] = [None] * self._ranks
        dist.all_gather_object(everywhere, held)
        self._holders: dict[str, dict[int, _Slice]] = {}
        for rank, held_there in enumerate(everywhere):
            for name, (shape, part) in held_there.items():
                self._shapes[name] = shape
                self._holders.setdefault(name, {})[rank] = part

    def _update(self) -> None:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["matrices"]]
        if self.param_groups:
            super()._update()
        tensors = {
            self._numbers[tensor]: (group, tensor)
            for group in groups
            if group["matrices"]
            for tensor in group["params"]
            if tensor.grad is not None
        }
        if tensors:
            self._update_matrices(tensors)

    @torch.no_grad()
    def _update_matrices(self, tensors: dict[int, tuple[Group, Tensor]]) -> None:
        """Update matrices. `tensors`: by number."""
        plan = self._plan(tuple(tensors))
        updates = {number: self._advance(tensor) for number, (_, tensor) in tensors.items()}
        whole = {name: torch.empty(self._shapes[name], dtype=self._dtype, device=self._device) for name in plan.owned}

        def read_update(_: str, part: _Slice) -> Tensor:
            return updates[part.flat].narrow(0, part.offset, part.numel).to(self._device, self._dtype)

        def write_update(name: str, part: _Slice, values: Tensor) -> None:
            whole[name].view(-1).narrow(0, part.start, part.numel).copy_(values)

        def read_result(name: str, part: _Slice) -> Tensor:
            return whole[name].view(-1).narrow(0, part.start, part.numel)

        def apply_result(name: str, part: _Slice, values: Tensor) -> None:
            group, tensor = tensors[part.flat]
            weights = tensor.view(-1).narrow(0, part.offset, part.numel)
            weights.add_(values.to(weights.device), alpha=-group["lr"] * self.scale(*self._shapes[name]))

        self._transfer(plan.updates, read_update, write_update)
        for matrix in whole.values():
            matrix.copy_(orthogonalize(matrix))
        for group, tensor in tensors.values():
            tensor.mul_(1 - group["lr"] * group["weight_decay"])
        self._transfer(plan.results, read_result, apply_result)

    def _advance(self, tensor: Tensor) -> Tensor:
        """Update the momentum. Returns the matrices to orthogonalize, flat; overwrites the gradient."""
        assert tensor.grad is not None
        state: dict[str, Tensor] = self.state[tensor]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(tensor)
        buffer, weight = state["momentum_buffer"], self._options.momentum
        buffer.lerp_(tensor.grad, 1 - weight)
        return (tensor.grad.lerp_(buffer, weight) if self._options.nesterov else buffer).view(-1)

    def scale(self, rows: int, columns: int) -> float:
        """Return the scale of an update, relative to the learning rate."""
        if self._options.adjust_lr == "original":
            return math.sqrt(max(1.0, rows / columns))
        return _MATCHED_RMS * math.sqrt(max(rows, columns))

    def _plan(self, numbers: tuple[int, ...]) -> _Plan:
        """Plan an update. `numbers`: of the tensors to update."""
        if numbers not in self._plans:
            holders = {
                name: parts for name, parts in self._holders.items() if next(iter(parts.values())).flat in numbers
            }
            assert holders, "tensors that `attach` does not know"
            costs = {name: orthogonalization_flops(*self._shapes[name]) for name in holders}
            held = {
                name: [parts[rank].numel if rank in parts else 0 for rank in range(self._ranks)]
                for name, parts in holders.items()
            }
            owners = assign(costs, held)
            updates, results = [], []
            for name, owner in owners.items():
                parts = holders[name]
                is_whole = owner in parts and parts[owner].numel == math.prod(self._shapes[name])
                sources = {owner: parts[owner]} if is_whole else parts
                updates += [_Transfer(name, rank, owner, part) for rank, part in sources.items()]
                results += [_Transfer(name, owner, rank, part) for rank, part in parts.items()]
            owned = [name for name, owner in owners.items() if owner == self._rank]
            self._plans[numbers] = _Plan(owned, self._exchange(updates), self._exchange(results))
        return self._plans[numbers]

    def _exchange(self, transfers: Sequence[_Transfer]) -> _Exchange:
        """Select this rank's part of an exchange. `transfers`: of all ranks."""
        own = [transfer for transfer in transfers if self._rank in (transfer.source, transfer.target)]
        return _Exchange(own, any(transfer.source != transfer.target for transfer in transfers))

    def _transfer(
        self, exchange: _Exchange, read: Callable[[str, _Slice], Tensor], write: Callable[[str, _Slice, Tensor], None]
    ) -> None:
        """Transfer parts: `read` gives flat values at the source, `write` takes them at the target. Collective."""
        sent: list[list[Tensor]] = [[] for _ in range(self._ranks)]
        received: list[list[_Transfer]] = [[] for _ in range(self._ranks)]
        for transfer in exchange.own:
            if transfer.source == transfer.target:
                write(transfer.name, transfer.part, read(transfer.name, transfer.part))
            elif transfer.source == self._rank:
                sent[transfer.target].append(read(transfer.name, transfer.part))
            else:
                received[transfer.source].append(transfer)
        if not exchange.leaves_ranks:
            return
        arriving = [transfer for transfers in received for transfer in transfers]
        nothing = torch.empty(0, dtype=self._dtype, device=self._device)
        values = nothing.new_empty(sum(transfer.part.numel for transfer in arriving))
        leaving = torch.cat([nothing, *(part for parts in sent for part in parts)])
        received_sizes = [sum(transfer.part.numel for transfer in transfers) for transfers in received]
        sent_sizes = [sum(part.numel() for part in parts) for parts in sent]
        dist.all_to_all_single(values, leaving, received_sizes, sent_sizes)
        parts = torch.split(values, [transfer.part.numel for transfer in arriving])
        for transfer, part in zip(arriving, parts, strict=True):
            write(transfer.name, transfer.part, part)
