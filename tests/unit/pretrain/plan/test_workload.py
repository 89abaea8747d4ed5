"""Steps and tokens of a plan, compared with the batches of the run's own stream."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest

from experiment.config import build_config
from pretrain.batching.packing import RowKind
from pretrain.config import MaskingConfig, PretrainConfig
from pretrain.plan.text import _batches_warnings
from pretrain.plan.workload import StageWork, stage_work
from pretrain.resolve import resolve
from pretrain.training_stream import TrainingStream, open_stream, run_layout
from pretrain.world import World

Work = tuple[TrainingStream, tuple[StageWork, ...]]
OpenWork = Callable[..., Work]


@pytest.fixture
def open_work(wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path) -> OpenWork:
    def open_with(
        mixed: bool = False, ranks: int = 2, kind: RowKind = "packed", ratio: float | None = None, **sections: Any
    ) -> Work:
        mixture = [{"path": str(wordpiece_corpus), "weight": 3.0}, {"path": str(heldout_corpus), "weight": 1.0}]
        tree = {
            "run": {"dir": str(tmp_path), "seed": 4},
            "model": {"config": {"model_type": "bert", "hidden_size": 24, "num_attention_heads": 2}},
            "corpus": {"train": mixture if mixed else str(wordpiece_corpus)},
            "batch": {"sequences": 29, "max_seq_length": 32, "microbatch_tokens": 128},
            "schedule": {"steps": 16},
            "engine": {"ds_config": "ds_configs/fp32_zero1.json"},
        }
        config = build_config(PretrainConfig, tree | sections)
        run, world = resolve(config, ranks), World(0, ranks)
        stream = open_stream(run, world, run_layout(run, kind), ratio)
        return stream, stage_work(stream, config.masking)

    return open_with


STAGES = [{"steps": 7, "max_seq_length": 16, "sequences": 50, "microbatch_tokens": 64}, {"sequences": 9}]


@pytest.mark.parametrize(
    "sections",
    [
        {"schedule": {"epochs": 0.3}},
        {"schedule": {"epochs": 0.8}},
        {"schedule": {"epochs": 2.7}},
        {"schedule": {"tokens": 30_000, "batch_warmup_steps": 5}},
        {"schedule": {"steps": 12, "stages": STAGES, "batch_warmup_steps": 9}},
        {"schedule": {"steps": 90}, "mixed": True},
        {"schedule": {"steps": 12, "stages": STAGES}, "mixed": True},
    ],
    ids=str,
)
def test_tokens_are_those_of_the_batches(open_work: OpenWork, sections: dict[str, Any]) -> None:
    """Catches a count that is off in the last epoch, a short last batch, a mixture, a stage or a warmup of batches."""
    stream, stages = open_work(**sections)
    ends = [*stream.first_steps[1:], stream.steps]
    for stage, maker, end in zip(stages, stream.makers, ends, strict=True):
        assert (stage.first_step, stage.steps) == (maker.order.sizes.first_step, end - stage.first_step)  # type: ignore[attr-defined]
        special = maker.vocabulary.num_special_tokens
        lengths = [maker.assign(step)[1] + special for step in range(stage.first_step, end)]
        assert stage.tokens == sum(int(each.sum()) for each in lengths)


@pytest.mark.parametrize(("begin", "steps"), [(3, [4, 5]), (7, [5]), (9, [3])])
def test_a_fork_leaves_out_the_steps_of_its_parent(open_work: OpenWork, begin: int, steps: list[int]) -> None:
    """Catches tokens and stages that only the parent of a fork has computed, or that its own sizes make up."""
    stream, _ = open_work(ranks=1, schedule={"steps": 12, "stages": STAGES, "batch_warmup_steps": 9})
    stages = stage_work(replace(stream, begin=begin), MaskingConfig())
    assert [stage.steps for stage in stages] == steps
    assert stages[0].first_step == begin
    assert sum(stage.tokens or 0 for stage in stages) == sum(stream[step].tokens for step in range(begin, 12))


def test_warnings_name_the_stages_of_the_config() -> None:
    """Catches a fork's plan that warns of the stage before the one that has the problem."""
    batch = SimpleNamespace(largest=SimpleNamespace(rows=1, width=8), microbatches=1)
    stage = SimpleNamespace(batch=batch, sequences=8, mean=SimpleNamespace(filled=1.0))
    run = SimpleNamespace(config=SimpleNamespace(stages=(None, None, None)))
    plan: Any = SimpleNamespace(run=run, stages=[stage, stage], device=SimpleNamespace(is_gpu=True), ranks=1)
    found = [warning.partition(" are ")[0] for warning in _batches_warnings(plan)]
    assert found == ["microbatches of 8 tokens in stage 2", "microbatches of 8 tokens in stage 3"]


@pytest.mark.parametrize(("kind", "ratio"), [("packed", None), ("packed", 0.0), ("flat", None)])
def test_the_largest_batch_is_one_of_the_run(open_work: OpenWork, kind: RowKind, ratio: float | None) -> None:
    """Catches microbatches of another shape than those that a rank computes, whose rows may be wider than a sequence
    (0.0: attention takes no time)."""
    stream, (stage,) = open_work(ranks=1, kind=kind, ratio=ratio)
    assert (stream.makers[0].layout.row_width > 32) == (ratio is not None)
    batches = [stream[step] for step in range(15)]  # the sample has all of so few
    shape = max(batch.microbatches[0].input_ids.shape for batch in batches)
    assert (stage.batch.largest.rows, stage.batch.largest.width) == shape
    assert (stage.batch.tokens, stage.batch.squared_lengths, stage.batch.microbatches) in [
        (batch.tokens, batch.squared_lengths, len(batch.microbatches)) for batch in batches
    ]
    predicted = max(len(microbatch.masked_positions) for batch in batches for microbatch in batch.microbatches)
    assert predicted <= stage.batch.largest.predicted <= predicted + 64


def test_padded_microbatches_are_as_wide_as_their_longest_sequence(open_work: OpenWork) -> None:
    """Catches a plan in which all microbatches are as wide as the longest sequence of the batch: twice the padding."""
    sizes = {"sequences": 29, "max_seq_length": 64, "microbatch_tokens": 256}
    stream, (stage,) = open_work(ranks=1, kind="padded", batch=sizes)
    (batch,) = [batch for batch in map(stream.__getitem__, range(15)) if batch.tokens == stage.batch.tokens]
    shapes = [microbatch.input_ids.shape for microbatch in batch.microbatches]
    assert len({width for _, width in shapes}) > 1
    assert (stage.batch.largest.rows, stage.batch.largest.width) == max(shapes, key=math.prod)
    assert stage.batch.filled == batch.tokens / sum(rows * width for rows, width in shapes)


def test_a_time_budget_leaves_the_last_stage_open(open_work: OpenWork) -> None:
    """Catches steps that are made up where the time decides."""
    stream, stages = open_work(schedule={"budget": "30m", "stages": STAGES})
    assert stream.steps is None
    assert [(stage.steps, stage.tokens is None) for stage in stages] == [(7, False), (None, True)]


def test_a_time_budget_is_planned_from_the_mean_of_many_batches(open_work: OpenWork) -> None:
    """Catches a last stage that is planned from its first batch, or from the one with the most slots, which has more
    tokens than most."""
    stages = [{"steps": 40}, {"sequences": 3}]
    stream, (_, last) = open_work(schedule={"budget": "30m", "stages": stages})
    special = stream.makers[1].vocabulary.num_special_tokens
    lengths = [stream.makers[1].assign(step)[1] + special for step in range(40, 57)]
    tokens = [int(each.sum()) for each in lengths]
    assert last.tokens_per_step() == last.mean.tokens == pytest.approx(fmean(tokens), rel=0.05)
    assert last.mean.squared_lengths == pytest.approx(fmean(int((each**2).sum()) for each in lengths), rel=0.1)
    assert last.batch.tokens > 1.1 * last.mean.tokens
    assert last.mean.filled != last.batch.filled
