"""A run has the same losses and evaluations at every world size, microbatch size and ZeRO stage."""

import itertools
from collections.abc import Set as AbstractSet
from datetime import timedelta
from pathlib import Path

import pytest

from experiment.config import build_config
from experiment.run_files.checkpoints import checkpoint_path
from pretrain.batching.packing import RowKind
from pretrain.config import PretrainConfig
from pretrain.world import World
from rank_pool import RankPool
from runs import (
    NO_DROPOUT,
    TINY,
    Tree,
    assert_same_tensors,
    evaluation_events,
    logged,
    pretrain_case,
    run_config,
    sampled,
    saved_tensors,
)

LAYOUTS = list(itertools.product((1, 2, 3), (0, 1, 2, 3), (130, 700)))
SAMPLE = [(2, 3, 130), (3, 1, 130)]  # ZeRO 0: `test_gradient_parity.py`; ZeRO 2: also `test_stages_and_mixtures.py`


@pytest.fixture(scope="session")
def reference(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run of one rank, ZeRO 0, one microbatch per step."""
    folder = tmp_path_factory.mktemp("reference")
    tree = run_config(
        folder,
        wordpiece_corpus,
        "fp32_zero0",
        model__config=TINY | NO_DROPOUT,
        batch__microbatch_tokens=8192,
        corpus__eval={"held": str(heldout_corpus)},
        schedule__steps=4,
    )
    assert pools[1].run(pretrain_case, tree) == ["done"]
    return folder


@pytest.mark.parametrize(("world_size", "stage", "microbatch_tokens"), sampled(LAYOUTS, SAMPLE))
def test_losses_and_evaluations_do_not_depend_on_the_layout(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    reference: Path,
    tmp_path: Path,
    world_size: int,
    stage: int,
    microbatch_tokens: int,
) -> None:
    """Catches losses averaged per rank or microbatch, gradients lost in accumulation, and ranks that see other data."""
    tree = run_config(
        tmp_path,
        wordpiece_corpus,
        f"fp32_zero{stage}",
        model__config=TINY | NO_DROPOUT,
        batch__microbatch_tokens=microbatch_tokens,
        corpus__eval={"held": str(heldout_corpus)},
        schedule__steps=4,
    )
    assert set(pools[world_size].run(pretrain_case, tree)) == {"done"}
    assert logged(tmp_path, "step") == [1, 2, 3, 4]
    assert logged(tmp_path) == pytest.approx(logged(reference), rel=1e-4)
    assert logged(tmp_path, "grad_norm") == pytest.approx(logged(reference, "grad_norm"), rel=1e-3)
    assert logged(tmp_path, "tokens") == logged(reference, "tokens")
    assert logged(tmp_path, "lr") == logged(reference, "lr")

    first, last = evaluation_events(tmp_path)
    expected_first, expected_last = evaluation_events(reference)
    assert (first["step"], last["step"]) == (0, 4)
    assert first == pytest.approx(expected_first, rel=1e-5)
    assert last == pytest.approx(expected_last, rel=1e-4)
    assert last["eval/held/loss"] < first["eval/held/loss"]


@pytest.mark.soak
def test_clipping_of_a_large_model_does_not_depend_on_the_layout(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a norm that sums too many squares in fp32: its error grows with the tensors that a layout makes, and
    clipping carries it into the losses. The model has 43 million parameters."""
    large = {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 3072}
    found: dict[tuple[int, int], list[list[float]]] = {}
    for world_size, stage in itertools.product((1, 2), (0, 1, 2, 3)):
        folder = tmp_path / f"{world_size}-{stage}"
        tree = run_config(
            folder,
            wordpiece_corpus,
            f"fp32_zero{stage}",
            model__config=TINY | NO_DROPOUT | large,
            schedule__steps=3,
            checkpoint__every_steps=1000,
            optimizer__grad_clip=0.1,
        )
        assert set(pools[world_size].run(pretrain_case, tree)) == {"done"}
        found[world_size, stage] = [logged(folder), logged(folder, "grad_norm")]
    losses, norms = found[1, 0]
    assert min(norms) > 0.1, "each step is clipped"
    for layout, (layout_losses, layout_norms) in found.items():
        assert layout_norms == pytest.approx(norms, rel=1e-5), layout
        assert layout_losses == pytest.approx(losses, rel=1e-6), layout


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (2, 1), (2, 3)])
def test_batches_without_masked_tokens_update_nothing(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, world_size: int, stage: int
) -> None:
    """Catches NaN weights from a loss of 0/0, and weight decay in a step without gradients."""
    tree = run_config(tmp_path, wordpiece_corpus, f"fp32_zero{stage}", masking__rate=1e-9, schedule__steps=2)
    tree["checkpoint"]["every_steps"] = 1
    pools[world_size].run(pretrain_case, tree)
    assert logged(tmp_path) == [None, None]
    first, second = (saved_tensors(checkpoint_path(tmp_path / "checkpoints", step)) for step in (1, 2))
    assert all(key.endswith("/fp32") for key in first), "optimizer state without an update"
    assert_same_tensors(first, second)


def taken_case(world: World, tree: Tree, flat: AbstractSet[int]) -> tuple[RowKind, list[int]]:
    """The rows of a run on devices of which only those of the ranks `flat` compute flat rows, and the sequences of the
    first batch that this rank takes."""
    from pretrain import preparation
    from pretrain.training.cpu_group import CpuGroup

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "choose_row_kind", lambda *_: "flat" if world.rank in flat else "packed")
        group = CpuGroup(world, timedelta(seconds=60))
        *_, stream = preparation.prepare(build_config(PretrainConfig, tree), group)
    return stream.layout.kind, stream[0].origins.ids.tolist()


@pytest.mark.parametrize(("flat", "rows"), [({0, 1}, "flat"), ({0}, "packed"), ({1}, "packed")])
def test_ranks_on_different_devices_use_the_same_rows(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, flat: set[int], rows: RowKind
) -> None:
    """Catches sequences that two ranks train on, and others that none does, where GPUs are of different types."""
    tree = run_config(tmp_path, wordpiece_corpus)
    (first, of_first), (second, of_second) = pools[2].run(taken_case, tree, flat)
    assert (first, second) == (rows, rows)
    assert len({*of_first, *of_second}) == len(of_first) + len(of_second) == tree["batch"]["sequences"]
