"""The memory of data workers, which are forked from their rank."""

from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

from pretrain.world import World
from rank_pool import RankPool
from runs import SHALLOW, Tree, pretrain_case, run_config, soak

PARAMETERS = 256 * 100_000  # about, in the embeddings


def memory_case(world: World, tree: Tree) -> int:
    """The most memory that data workers do not share with this rank after a step of a run, in bytes."""
    from pretrain.training.trainer import Trainer

    count, measured = Trainer._count, []

    def count_and_measure(trainer: Trainer, *arguments: Any) -> None:
        count(trainer, *arguments)
        measured.append(sum(own_memory(worker.pid) for worker in active_children()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_count", count_and_measure)
        assert pretrain_case(world, tree, data_worker=True) == "done"
    return max(measured)


def own_memory(pid: int | None) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:"))


@pytest.mark.parametrize("ds_config", ["fp32_zero1", *soak("bf16_zero1", "fp32_zero0", "bf16_zero2", "bf16_zero3")])
def test_data_workers_keep_no_copy_of_the_model(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str
) -> None:
    """Catches weights and optimizer states that a resumed run has twice, as they were when its data workers started."""
    (small,) = pools[1].run(memory_case, run_config(tmp_path / "small", wordpiece_corpus, ds_config))
    model = SHALLOW | {"hidden_size": 256, "vocab_size": 100_000}
    tree = run_config(tmp_path / "large", wordpiece_corpus, ds_config, model__config=model, schedule__steps=4)
    assert pools[1].run(pretrain_case, tree, 1) == ["stopped"]
    (large,) = pools[1].run(memory_case, tree)
    assert large - small < PARAMETERS * 2
