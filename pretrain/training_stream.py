"""The training data of a run: step -> this rank's share of the global batch, and the number of steps."""

import math
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from experiment.errors import UserError
from pretrain.batching.batch import RankBatch
from pretrain.batching.batch_maker import BatchMaker
from pretrain.batching.loader import load_batches
from pretrain.batching.masking import MaskingSchedule
from pretrain.batching.order import ShuffledOrder
from pretrain.batching.packing import MicrobatchLayout, Rows
from pretrain.batching.row_width import with_best_row_width
from pretrain.config import MaskingConfig, ScheduleConfig
from pretrain.resolve import ResolvedRun
from pretrain.resume import check_fork_length
from pretrain.stage_data import open_stage
from pretrain.world import World


@dataclass(frozen=True)
class TrainingStream:
    """One batch maker for each stage of the run; all of them take the step of the run."""

    makers: tuple[BatchMaker, ...]
    first_steps: tuple[int, ...]  # of each stage
    steps: int | None  # in the whole run; None: a time budget ends it
    corpora: tuple[str, ...]  # names, by corpus number
    rows: Rows  # of all microbatches

    def __getitem__(self, step: int) -> RankBatch:
        return self.makers[bisect_right(self.first_steps, step) - 1][step]

    @property
    def ends(self) -> tuple[int | None, ...]:
        """The step after the last of each stage."""
        return (*self.first_steps[1:], self.steps)

    @property
    def epochs(self) -> float | None:
        """How often the whole run reads its corpus; None for a mixture, and under a time budget."""
        if self.steps is None or len(self.corpora) > 1:
            return None
        epochs = 0.0
        for maker, end in zip(self.makers, self.ends, strict=True):
            order = maker.order
            assert isinstance(order, ShuffledOrder)
            assert end is not None
            epochs += order.start(end) / order.corpora[0].sequences
        return epochs

    def load(self, first_step: int, on_gpu: bool, timeout: float) -> Iterator[RankBatch]:
        """The batches from `first_step` on, prepared ahead in worker processes. `timeout`: see `load_batches`."""
        workers = 2 if on_gpu else 1
        return load_batches(self, first_step, self.steps, workers, timeout=timeout, pin_memory=on_gpu)


def open_stream(
    run: ResolvedRun, world: World, *, rows: Rows, first_position: int, attention_ratio: float | None = None
) -> TrainingStream:
    """The stream of a run.

    Args:
        rows, first_position: what the model needs, see MicrobatchLayout.
        attention_ratio: from which windows get their width, see `with_best_row_width`; None: the longest sequence's.

    Raises UserError where the length of the run does not fit its stages, or ends before the checkpoint that it forks.
    """
    config = run.config
    stages = [open_stage(run, number) for number in range(len(run.stages))]
    orders = [stage.order(config.schedule, config.run.seed) for stage in stages]
    steps = _total_steps(config.schedule, orders, [stage.mean_length for stage in stages])
    check_fork_length(run.resume_plan, steps)
    makers = [
        BatchMaker(
            stage.masked_corpora(config.masking, config.run.seed),
            order,
            run.vocabulary,
            MicrobatchLayout(settings.max_seq_length, settings.microbatch_tokens, rows, first_position),
            world,
            _masking_rate(config.masking, steps),
        )
        for stage, order, settings in zip(stages, orders, run.stages, strict=True)
    ]
    first_steps = tuple(stage.first_step for stage in run.stages)
    if rows == "windows" and attention_ratio is not None:
        ends = (*first_steps[1:], sys.maxsize if steps is None else steps)
        makers = [
            with_best_row_width(maker, range(first, end), order.sizes.warmup_steps, attention_ratio)
            for maker, order, first, end in zip(makers, orders, first_steps, ends, strict=True)
        ]
    return TrainingStream(
        tuple(makers),
        first_steps,
        steps,
        tuple(given.name for given in run.corpora),
        rows,
    )


def _masking_rate(masking: MaskingConfig, steps: int | None) -> MaskingSchedule | None:
    """None for a constant rate."""
    if masking.schedule == "constant":
        return None
    assert steps is not None, "the config rejects a time budget with a masking schedule"
    return MaskingSchedule(masking.rates, masking.schedule, steps)


def _total_steps(
    schedule: ScheduleConfig, orders: Sequence[ShuffledOrder], mean_lengths: Sequence[float]
) -> int | None:
    """Steps in the run; None under a time budget. `orders`, `mean_lengths`: by stage."""
    last = orders[-1]
    if schedule.tokens is None:
        return schedule.known_steps or last.end
    before_last = sum(
        order.sizes.start(after.sizes.first_step) * mean
        for order, after, mean in zip(orders, orders[1:], mean_lengths, strict=False)
    )
    if before_last >= schedule.tokens:
        raise UserError(
            f"schedule.tokens: the first {len(orders) - 1} of schedule.stages take about {before_last:.4g} tokens, "
            f"which leaves none of {schedule.tokens:.4g} for the last one"
        )
    return last.sizes.end(math.ceil((schedule.tokens - before_last) / mean_lengths[-1]))
