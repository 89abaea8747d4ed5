"""Verify a checkpoint on all ranks together, which reads each byte once."""

from pathlib import Path

from experiment.checkpoints import verify
from pretrain.training.cpu_group import CpuGroup
from pretrain.world import World


def verify_together(group: CpuGroup, world: World, checkpoint: Path) -> str | None:
    """As `experiment.checkpoints.verify`, but each rank reads its share of the files. Collective.

    All ranks pass the same checkpoint, and get the same result. A rank's share contains the tensors that it saved, and
    will load if the layout is the same. They are then loaded from memory, where the operating system keeps them.
    """

    def share(names: list[str]) -> list[str]:
        first = (world.rank + 1) % world.size  # before the tensors of rank 0 comes engine/index.json
        return names[first :: world.size]

    problems = group.from_all_ranks(lambda: verify(checkpoint, share))
    return next((problem for problem in problems if problem is not None), None)
