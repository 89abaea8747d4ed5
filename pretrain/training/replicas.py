"""Check that all ranks still hold and do the same: a broken device or network shows in the weights before the loss.

Compared are the weights that every rank holds in full, the position in the data, the sequences of the batch and the
learning rate. Data that ZeRO shards (masters and optimizer state from stage 1, nearly all weights at stage 3) exists
once and cannot be compared.
"""

import struct
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import xxhash
from torch import Tensor

from experiment.errors import AgreedFailureError
from pretrain.batching.batch import RankBatch
from pretrain.engine.engine import Engine
from pretrain.engine.host_copy import read_numbers
from pretrain.training.cpu_group import CpuGroup


def _signed(word: int) -> int:
    """Return a 64-bit word as the number that torch's int64 makes of it."""
    return word - (1 << 64) if word >> 63 else word


_HASHED_AT_ONCE = 1 << 22  # elements; bounds the memory for their hashes
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
# The constants of SplitMix64: its increment, then shift and factor of each round.
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1))


def compare_replicas(engine: Engine, group: CpuGroup, batch: RankBatch, learning_rate: float) -> None:
    """Call after the update of `batch`. Collective. Raises AgreedFailureError, naming the first difference."""
    own = {
        "the position in the data": batch.step,
        "the sequences of the batch": batch.fingerprint,
        "the learning rate": int(struct.unpack("<q", struct.pack("<d", learning_rate))[0]),  # its bits
    } | _hash_weights(engine)
    difference = first_difference(own, group.all_gather_objects(list(own.values())))
    if difference is not None:
        raise AgreedFailureError(
            f"step {batch.step + 1}: {difference}\n"
            "  to try: the same command resumes from the last checkpoint; if it happens again, suspect the device or "
            "the memory of that rank's host"
        )


def first_difference(names: Mapping[str, int], by_rank: Sequence[Sequence[int]]) -> str | None:
    """Return the first of the named values that differs between ranks, and which ranks are in the minority; None if all
    agree."""
    for name, values in zip(names, zip(*by_rank, strict=True), strict=True):
        (value, ranks), *others = Counter(values).most_common()
        if others:
            minority = [rank for rank, found in enumerate(values) if found != value]
            if 2 * ranks > len(values):
                who = f"rank {minority[0]} differs" if len(minority) == 1 else f"ranks {_join(minority)} differ"
                return f"{who} from the others in {name}"
            return f"ranks {_join(range(len(values)))} differ from each other in {name}"
    return None


def _join(ranks: Sequence[int]) -> str:
    return f"{', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _hash_weights(engine: Engine) -> dict[str, int]:
    """Return hashes of the bits, by their name in messages. One wait for the device."""
    weights = dict(engine.partitions.replicated_weights())
    hashes = [hash_bits(tensor).to(engine.device) for tensor in weights.values()]
    values = read_numbers(torch.stack(hashes)) if hashes else []
    return {f"the weights of {name.removeprefix('model.')}": value for name, value in zip(weights, values, strict=True)}


def hash_bits(tensor: Tensor) -> Tensor:
    """Return a 64-bit hash of a tensor's bits and their places, a scalar on its device."""
    if tensor.is_cuda:
        return _hash_on_device(tensor)
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return torch.tensor(xxhash.xxh3_64_intdigest(data.numpy().data) >> 1)


def _hash_on_device(tensor: Tensor) -> Tensor:
    """Return the sum modulo 2^64 of a hash of each element and its position: SplitMix64 (see `batching.counter_rng`),
    whose counter is the position, with the element's bits added to its state."""
    bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _HASHED_AT_ONCE):
        block = bits[start : start + _HASHED_AT_ONCE].long()
        positions = torch.arange(start + 1, start + 1 + block.numel(), device=tensor.device)
        mixed = block + positions.mul_(_GOLDEN)
        for shift, factor in _ROUNDS:
            mixed = (mixed ^ (mixed >> shift & ((1 << (64 - shift)) - 1))) * factor
        total += mixed.sum()
    return total
