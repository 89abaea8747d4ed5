"""The accumulated gradient equals that of a single PyTorch process, at every layout.

The reference uses only transformers and torch: all sequences of the global batch padded into one tensor, the full head,
one mean over all masked tokens, fp32. The accumulated gradient of a run is read from Adam's first moment after one step
without clipping, which is the gradient times 1 - beta.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiment.config import build_config
from experiment.run_files.checkpoints import checkpoint_path
from plain_torch import all_labels, plain_loss, plain_model
from pretrain.batching.batch import IGNORED, RankBatch
from pretrain.batching.packing import RowKind
from pretrain.config import PretrainConfig
from pretrain.resolve import resolve
from pretrain.training_stream import open_stream, run_layout
from pretrain.world import World
from rank_pool import RankPool
from runs import NO_DROPOUT, SHALLOW, TINY, Tree, pretrain_case, run_config, sampled, saved_tensors

SEED, SEQUENCES = 7, 33  # no layout divides the masked tokens of this batch evenly
TOLERANCE = {"fp32": 1e-5, "bf16": 0.02}  # relative to the gradient norm
ONE_MICROBATCH = 1200  # slots: enough for the whole batch on one rank
MANY_SEQUENCES, MANY_SLOTS = 332, 10_000  # one microbatch with as many tokens as the default one
THREE_MICROBATCHES = {1: 360, 2: 200, 3: 120}  # slots, by world size

LAYOUTS = list(itertools.product(("fp32", "bf16"), (1, 2, 3), (1, 3), (0, 1, 2, 3)))
SAMPLE = [
    *(("fp32", 1, 3, 3), ("fp32", 2, 3, 0), ("fp32", 2, 1, 1), ("fp32", 3, 3, 2)),
    *(("bf16", 2, 3, 1), ("bf16", 2, 3, 3)),
]


def global_batch(
    corpus: Path, width: int, microbatch_tokens: int, world: World, kind: RowKind, sequences: int = SEQUENCES
) -> RankBatch:
    """A rank's share of the first global batch of a run with these settings."""
    batch = {"sequences": sequences, "max_seq_length": width, "microbatch_tokens": microbatch_tokens}
    config = build_config(PretrainConfig, run_config(Path("unused"), corpus, run__seed=SEED) | {"batch": batch})
    run = resolve(config, world.size)
    return open_stream(run, world, run_layout(run, kind))[0]


def plain_gradients(corpus: Path, sequences: int, model_config: Tree) -> dict[str, Tensor]:
    """The reference gradients: parameter name -> flattened gradient."""
    tree = run_config(Path("unused"), corpus, run__seed=SEED, model__config=model_config, batch__sequences=sequences)
    config = build_config(PretrainConfig, tree)
    run = resolve(config, 1)
    model = plain_model(run)

    width = config.batch.max_seq_length
    batch = global_batch(corpus, width, width * sequences, World(), kind="padded", sequences=sequences)
    (padded,) = batch.microbatches
    labels = all_labels(padded)

    rows = padded.segments.any(dim=1)
    lengths = (padded.segments > 0).sum(dim=1)[rows]
    masked = (labels.view_as(padded.input_ids) != IGNORED).sum(dim=1)[rows]
    assert len(lengths) == sequences
    assert lengths.max() > 8 * lengths.min(), "the sequences should differ much in length"
    assert masked.min() == 0, "one sequence should have no masked token"
    assert masked.max() > 4

    plain_loss(model, padded).backward()
    return {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="session")
def reference_gradients(wordpiece_corpus: Path) -> dict[str, Tensor]:
    return plain_gradients(wordpiece_corpus, SEQUENCES, TINY | NO_DROPOUT)


def accumulated_gradients(
    pool: RankPool, folder: Path, corpus: Path, ds_config: str, model_config: Tree, **batch: int
) -> dict[str, Tensor]:
    """The gradients of the first step of a run, as `plain_gradients`. batch: keys of the section."""
    tree = run_config(
        folder,
        corpus,
        ds_config,
        run__seed=SEED,
        model__config=model_config,
        optimizer__grad_clip=0.0,
        schedule__steps=1,
        **{f"batch__{key}": value for key, value in batch.items()},
    )
    pool.run(pretrain_case, tree)
    kept = saved_tensors(checkpoint_path(folder / "checkpoints", 1))
    return {
        name.removeprefix("model.").removesuffix("/exp_avg"): moment / (1 - 0.9)
        for name, moment in kept.items()
        if name.endswith("/exp_avg")
    }


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_layouts_have_the_expected_microbatches(wordpiece_corpus: Path, world_size: int) -> None:
    """Catches test cases that do not differ: equal microbatches and equal ranks would hide a wrong average."""
    for expected, microbatch_tokens in ((1, ONE_MICROBATCH), (3, THREE_MICROBATCHES[world_size])):
        shares = [
            global_batch(wordpiece_corpus, 40, microbatch_tokens, World(rank, world_size), "packed")
            for rank in range(world_size)
        ]
        assert [len(share.microbatches) for share in shares] == [expected] * world_size
        masked = {int((micro.labels != IGNORED).sum()) for share in shares for micro in share.microbatches}
        assert len(masked) > 1 or expected * world_size == 1


@pytest.mark.parametrize(
    ("precision", "world_size", "microbatches", "stage"),
    sampled(LAYOUTS, SAMPLE),
)
def test_the_accumulated_gradient_equals_that_of_plain_torch(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    reference_gradients: dict[str, Tensor],
    tmp_path: Path,
    record_property: Any,
    precision: str,
    world_size: int,
    microbatches: int,
    stage: int,
) -> None:
    """Catches means per rank, microbatch or sequence instead of one over all masked tokens of the global batch, and a
    microbatch, filler or rank that is dropped or counted twice."""
    found = accumulated_gradients(
        pools[world_size],
        tmp_path,
        wordpiece_corpus,
        f"{precision}_zero{stage}",
        TINY | NO_DROPOUT,
        sequences=SEQUENCES,
        microbatch_tokens=ONE_MICROBATCH if microbatches == 1 else THREE_MICROBATCHES[world_size],
    )
    difference = torch.cat([found[name] - reference_gradients[name] for name in reference_gradients])
    error = float(difference.norm() / torch.cat(list(reference_gradients.values())).norm())
    record_property("error", error)
    assert error < TOLERANCE[precision]


def test_each_gradient_of_a_full_microbatch_in_bf16(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, record_property: Any
) -> None:
    """Catches sums over tokens that are rounded to bf16 after each addition, as torch's for norms and embeddings on a
    CPU: the gradients of weights hide their error in that of the whole gradient."""
    model = SHALLOW | NO_DROPOUT
    batch = global_batch(wordpiece_corpus, 40, MANY_SLOTS, World(), "packed", MANY_SEQUENCES)
    (microbatch,) = batch.microbatches
    assert 8000 < (microbatch.segments > 0).sum() < 8400
    expected = plain_gradients(wordpiece_corpus, MANY_SEQUENCES, model)
    options = {"sequences": MANY_SEQUENCES, "microbatch_tokens": MANY_SLOTS}
    found = accumulated_gradients(pools[1], tmp_path, wordpiece_corpus, "bf16_zero1", model, **options)
    # Softmax does not depend on the bias of keys: its gradient is zero.
    errors = {
        name: float((found[name] - gradient).norm() / gradient.norm())
        for name, gradient in expected.items()
        if not name.endswith("key.bias")
    }
    record_property("errors", errors)
    assert max(errors.values()) < TOLERANCE["bf16"], errors
