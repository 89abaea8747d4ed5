"""What is known of memory on the simulated GPU, and of pinned memory of the host, by storage."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Place = Literal["gpu", "pinned"]


@dataclass(frozen=True, slots=True)
class Access:
    """A use of memory."""

    worker: str  # a stream or the host
    time: int  # by the worker's own clock
    what: str  # operator and line


@dataclass(slots=True)
class Block:
    """The memory of a storage."""

    place: Place
    reference: StorageWeakRef  # while it is held, no other storage gets the same number
    written: Access | None = None  # last
    read: dict[str, Access] = field(default_factory=dict)  # since then, the last by each worker


class Memory:
    """Pageable memory of the host has no blocks."""

    def __init__(self) -> None:
        self._blocks: dict[int, Block] = {}

    def block(self, tensor: Tensor) -> Block | None:
        return self._blocks.get(tensor.untyped_storage()._cdata)

    def is_on_gpu(self, tensor: Tensor) -> bool:
        block = self.block(tensor)
        return block is not None and block.place == "gpu"

    def is_pinned(self, tensor: Tensor) -> bool:
        block = self.block(tensor)
        return block is not None and block.place == "pinned"

    def put(self, tensor: Tensor, place: Place) -> Block:
        storage = tensor.untyped_storage()
        return self._blocks.setdefault(storage._cdata, Block(place, StorageWeakRef(storage)))
