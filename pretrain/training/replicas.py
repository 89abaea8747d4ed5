"""Whether all ranks still hold and do the same: a broken device or network shows in the weights long before the loss.

Compared are the weights that every rank holds whole, where the ranks are in the data, which sequences they take the
batch to be made of, and the learning rate. What ZeRO cuts (masters and optimizer state from stage 1, nearly all weights
at stage 3) exists once and cannot be compared.
"""

import struct
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import xxhash
from torch import Tensor

from pretrain.batching.batch import RankBatch
from pretrain.engine.engine import Engine
from pretrain.engine.partitions import replicas
from pretrain.training.health import UnhealthyError
from pretrain.training.host_group import HostGroup


def compare_replicas(engine: Engine, agreement: HostGroup, batch: RankBatch, learning_rate: float) -> None:
    """Collective, after the update of `batch`. Raises UnhealthyError on all ranks, naming the first difference."""
    mine = {
        "the position in the data": batch.step,
        "the sequences of the batch": batch.fingerprint,
        "the learning rate": _bits(learning_rate),
    } | {f"the weights of {name.removeprefix('model.')}": _hash(tensor) for name, tensor in replicas(engine.deepspeed)}
    difference = first_difference(mine, agreement.gathered(list(mine.values())))
    if difference is not None:
        raise UnhealthyError(
            f"step {batch.step + 1}: {difference}\n"
            "  to try: the same command goes on from the last checkpoint; should it happen again, suspect the device "
            "or the memory of that rank's host"
        )


def first_difference(names: Mapping[str, int], by_rank: Sequence[Sequence[int]]) -> str | None:
    """The first of the named values on which the ranks do not agree, and which of them stand alone."""
    for name, values in zip(names, zip(*by_rank, strict=True), strict=True):
        (value, ranks), *others = Counter(values).most_common()
        if others:
            lonely = [rank for rank, found in enumerate(values) if found != value]
            if 2 * ranks > len(values):
                who = f"rank {lonely[0]} differs" if len(lonely) == 1 else f"ranks {_listed(lonely)} differ"
                return f"{who} from the others in {name}"
            return f"ranks {_listed(range(len(values)))} differ from each other in {name}"
    return None


def _listed(ranks: Sequence[int]) -> str:
    return f"{', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _hash(tensor: Tensor) -> int:
    """Of the bits. On the host: a rank's weights are hashed at the speed at which they can be copied there."""
    octets = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    return xxhash.xxh3_64_intdigest(octets.numpy().data) >> 1


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
