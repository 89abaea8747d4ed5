"""The memory of data workers, which are forked from their rank."""

import gc
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

from pretrain.world import World
from rank_pool import RankPool
from runs import SHALLOW, Tree, pretrain_case, run_config, soak

VOCABULARY = 60_000


def memory_case(world: World, tree: Tree) -> int:
    """The most memory that data workers do not share with this rank after one of the next steps of a run, in bytes."""
    from pretrain.training.trainer import Trainer

    gc.collect()  # engines of earlier runs: if they are freed after the fork, this rank overwrites them
    count, measured = Trainer._count, []

    def count_and_measure(trainer: Trainer, *arguments: Any) -> None:
        count(trainer, *arguments)
        measured.append(sum(own_memory(worker.pid) for worker in active_children()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_count", count_and_measure)
        assert pretrain_case(world, tree, 2, data_worker=True) == "stopped"
    assert all(measured), "a worker has made all batches"
    return max(measured)


def own_memory(pid: int | None) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:"))


@pytest.mark.parametrize(
    ("ds_config", "resumes"),
    [
        ("fp32_zero1", False),
        *soak(*((name, True) for name in ("fp32_zero0", "fp32_zero1", "bf16_zero2", "bf16_zero3"))),
    ],
)
def test_data_workers_keep_no_copy_of_the_model(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str, resumes: bool
) -> None:
    """Catches weights, and optimizer states of a resumed run, that it has twice: as they were when its data workers
    started."""
    trees = [
        run_config(
            tmp_path / f"{len(size)}", wordpiece_corpus, ds_config, model__config=SHALLOW | size, schedule__steps=60
        )
        for size in ({}, {"hidden_size": 128, "vocab_size": VOCABULARY})
    ]
    if resumes:
        assert pools[1].run(pretrain_case, trees[1], 1) == ["stopped"]
    small, large = [pools[1].run(memory_case, tree)[0] for tree in trees]
    assert large - small < 4 * 128 * VOCABULARY, "less than the embeddings"
