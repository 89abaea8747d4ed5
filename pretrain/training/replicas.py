"""Check that all ranks still hold and do the same: a broken device or network shows in the weights before the loss.

Compared are the weights that every rank holds in full, the position in the data, the sequences of the batch and the
learning rate. What ZeRO shards (masters and optimizer state from stage 1, nearly all weights at stage 3) exists once
and cannot be compared.
"""

import struct
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import xxhash
from torch import Tensor

from pretrain.batching.batch import RankBatch
from pretrain.engine.engine import Engine
from pretrain.training.health import UnhealthyError
from pretrain.training.host_group import HostGroup


def compare_replicas(engine: Engine, hosts: HostGroup, batch: RankBatch, learning_rate: float) -> None:
    """Call after the update of `batch`. Collective. Raises UnhealthyError on all ranks, naming the first difference."""
    own = {
        "the position in the data": batch.step,
        "the sequences of the batch": batch.fingerprint,
        "the learning rate": _bits(learning_rate),
    } | {f"the weights of {name.removeprefix('model.')}": _hash(tensor) for name, tensor in engine.replicated_weights()}
    difference = first_difference(own, hosts.all_gather(list(own.values())))
    if difference is not None:
        raise UnhealthyError(
            f"step {batch.step + 1}: {difference}\n"
            "  to try: the same command resumes from the last checkpoint; if it happens again, suspect the device or "
            "the memory of that rank's host"
        )


def first_difference(names: Mapping[str, int], by_rank: Sequence[Sequence[int]]) -> str | None:
    """The first of the named values that differs between ranks, and which ranks are in the minority; None if all
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


def _hash(tensor: Tensor) -> int:
    """Of the bits, on the host: about as fast as the copy."""
    data = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    return xxhash.xxh3_64_intdigest(data.numpy().data) >> 1


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
