"""What torch raises on a rank that loses another one in a collective."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from experiment.run_files.outcome_file import Cause
from pretrain.rank_process import cause_of
from pretrain.world import World
from rank_pool import RankPool


def lost_rank_case(world: World, how: str) -> list[tuple[str, Cause]]:
    """The messages on rank 0 of two collectives without rank 1, and their causes."""
    group = dist.new_group(backend="gloo")
    dist.barrier()  # both are connected
    errors = []
    if world.rank == 1 and how == "closed":
        dist.destroy_process_group(group)
        del group
    elif world.rank == 0:
        options = dist.AllreduceOptions()
        if how == "timeout":
            options.timeout = timedelta(seconds=0.5)
        for _ in range(2):
            with pytest.raises(RuntimeError) as raised:
                group.allreduce([torch.ones(2)], options).wait()
            errors.append((str(raised.value), cause_of(raised.value)))
    dist.barrier()
    return errors


@pytest.mark.parametrize("how", ["closed", "timeout"])
def test_an_error_of_gloo_means_a_lost_rank(pools: dict[int, RankPool], how: str) -> None:
    """Catches a release of torch with other error messages of gloo: a launch that loses the same rank twice would
    take it for a bug and not restart. A collective after a timeout has another message than the first."""
    errors, _ = pools[2].run(lost_rank_case, how)
    assert [cause for _, cause in errors] == [Cause.LOST_RANK] * 2, errors
