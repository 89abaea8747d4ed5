"""The training data of a run: step -> this rank's share of the global batch, and the number of steps.

A stage whose length differs from that of the stage before it has sequences, shares of the mixture, an order and masks
of its own.
"""

import math
import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from experiment.errors import UserError
from pretrain.batching.batch import RankBatch
from pretrain.batching.batch_maker import BatchMaker, MaskedCorpus
from pretrain.batching.counter_rng import make_key
from pretrain.batching.masking import Masker, MaskingSchedule
from pretrain.batching.order import BatchSizes, CorpusStream, ShuffledOrder, stage_sizes
from pretrain.batching.packing import MicrobatchLayout, RowKind
from pretrain.batching.row_width import with_best_row_width
from pretrain.batching.sequences import open_index
from pretrain.config import MaskingConfig
from pretrain.modeling.packability import least_row_width
from pretrain.resolve import ResolvedRun
from pretrain.resume import ResumePlan, check_fork_length
from pretrain.schedule_config import ScheduleConfig, Stage
from pretrain.world import World

_SMALL_REST = 0.1  # of a whole batch


@dataclass(frozen=True)
class TrainingStream:
    """One batch maker for each stage of the run; all of them take the step of the run."""

    makers: tuple[BatchMaker, ...]
    orders: tuple[ShuffledOrder, ...]  # of the makers
    first_steps: tuple[int, ...]  # of each stage
    steps: int | None  # in the whole run; None: a time budget ends it
    corpora: tuple[str, ...]  # names, by corpus number
    layout: MicrobatchLayout  # of evaluations, and of stages except for lengths and widths
    begin: int  # the step that the run began with: of its parent if it is a fork, else 0

    def __getitem__(self, step: int) -> RankBatch:
        return self._maker(step)[step]

    def max_seq_length(self, step: int) -> int:
        """Return the tokens of the longest sequence of the step's stage, special tokens included."""
        return self._maker(step).layout.max_seq_length

    def _maker(self, step: int) -> BatchMaker:
        return self.makers[bisect_right(self.first_steps, step) - 1]

    @property
    def ends(self) -> tuple[int | None, ...]:
        """The step after the last of each stage."""
        return (*self.first_steps[1:], self.steps)

    @property
    def epochs(self) -> float | None:
        """Number of times the run reads its corpus, from `begin` on; None for a mixture, and under a time budget."""
        if self.steps is None or len(self.corpora) > 1:
            return None
        epochs = 0.0
        for order, first, end in zip(self.orders, self.first_steps, self.ends, strict=True):
            assert end is not None
            begin = min(max(self.begin, first), end)
            epochs += (order.start(end) - order.start(begin)) / order.corpora[0].sequences
        return epochs

    def is_small_rest(self, step: int) -> bool:
        """Return whether the batch of a step is the rest of the last epoch, with few of the sequences of a whole
        batch."""
        if step + 1 != self.steps:
            return False
        order = self.orders[-1]
        start, end = order.sizes.start(step), order.sizes.start(step + 1)
        return order.start(step + 1) - start < _SMALL_REST * (end - start)

    def tokens_per_epoch(self, step: int) -> dict[str, float]:
        """Return the tokens in an epoch of each corpus, special tokens included: a mean over the epochs before `step`,
        since stages with longer sequences add fewer special tokens."""
        positions, epochs = np.zeros((2, len(self.corpora)))
        for order, first, end in zip(self.orders, self.first_steps, self.ends, strict=True):
            if first <= step:
                read = order.positions_by_corpus(order.start(step if end is None else min(step, end)))
                read = read - order.positions_by_corpus(order.start(first))
                read = np.maximum(read, 1)  # a ratio even before the first step
                positions += read
                epochs += read / [corpus.sequences for corpus in order.corpora]
        text = np.array([corpus.corpus.tokens for corpus in self.makers[0].corpora])
        tokens = text + self.makers[0].vocabulary.num_special_tokens * positions / epochs
        return dict(zip(self.corpora, tokens.tolist(), strict=True))


def run_layout(run: ResolvedRun, kind: RowKind, first_position: int = 0) -> MicrobatchLayout:
    """Return the layout with the lengths of the section `batch`. `kind`, `first_position`: see MicrobatchLayout."""
    batch, least_width = run.config.batch, least_row_width(run.model_config)
    return MicrobatchLayout(batch.max_seq_length, batch.microbatch_tokens, kind, first_position, least_width)


def open_stream(
    run: ResolvedRun, world: World, layout: MicrobatchLayout, attention_ratio: float | None = None
) -> TrainingStream:
    """Return the stream of a run.

    Args:
        layout: see `run_layout`.
        attention_ratio: for the width of packed rows, see `with_best_row_width`; None: that of the longest sequence.

    Raises UserError where the length of the run does not fit its stages, or ends before the checkpoint that it forks.
    """
    config = run.config
    sizes = stage_sizes(config.stages, config.schedule.batch_warmup_steps)
    opened = [
        _open_stage(run, stage, begun, of_stage) for stage, (begun, of_stage) in zip(config.stages, sizes, strict=True)
    ]
    corpora, orders = zip(*opened, strict=True)
    total_weight = sum(given.weight for given in run.corpora)
    mean_lengths = [total_weight / sum(order.shares) for order in orders]
    first_steps = tuple(stage.first_step for stage in config.stages)
    steps = _total_steps(config.schedule, orders, first_steps, mean_lengths, run.resume_plan)
    check_fork_length(run.resume_plan, steps)
    makers = [
        BatchMaker(
            of_stage,
            order,
            run.vocabulary,
            replace(layout, max_seq_length=stage.max_seq_length, microbatch_tokens=stage.microbatch_tokens),
            world,
            _masking_rate(config.masking, steps),
        )
        for stage, of_stage, order in zip(config.stages, corpora, orders, strict=True)
    ]
    if layout.kind == "packed" and attention_ratio is not None:
        ends = (*first_steps[1:], sys.maxsize if steps is None else steps)
        makers = [
            with_best_row_width(maker, range(first, end), order.sizes.warmup_steps, attention_ratio)
            for maker, order, first, end in zip(makers, orders, first_steps, ends, strict=True)
        ]
    names = tuple(given.name for given in run.corpora)
    begin = run.resume_plan.forked_at if steps is None else min(run.resume_plan.forked_at, steps - 1)
    return TrainingStream(tuple(makers), orders, first_steps, steps, names, layout, begin)


def _open_stage(
    run: ResolvedRun, stage: Stage, begun: int, sizes: BatchSizes
) -> tuple[tuple[MaskedCorpus, ...], ShuffledOrder]:
    """Return the corpora of a stage, split into its sequences, with the masks of the epochs that stage number `begun`
    started; and their order.

    The weights of a mixture are shares of tokens; an order deals positions to corpora, one per sequence, so its shares
    are the weights divided by the mean tokens per sequence. Missing sequence indexes are built.
    """
    config, vocabulary = run.config, run.vocabulary
    seed, schedule = config.run.seed, config.schedule
    capacity = stage.max_seq_length - vocabulary.num_special_tokens
    corpora, streams, shares = [], [], []
    for given in run.corpora:
        corpus, fingerprint = given.corpus, given.corpus.fingerprint
        index = open_index(corpus, capacity, run.folder.path / "index")
        masker = Masker(vocabulary, config.masking, seed, fingerprint, stage=begun)
        corpora.append(MaskedCorpus(corpus, index, masker))
        streams.append(CorpusStream(len(index), make_key(("order", seed, fingerprint, begun))))
        shares.append(given.weight / (corpus.tokens / len(index) + vocabulary.num_special_tokens))
    order = ShuffledOrder(
        tuple(streams),
        sizes,
        None if schedule.epochs is None else max(1, round(schedule.epochs * streams[0].sequences)),
        tuple(shares),
    )
    return tuple(corpora), order


def _masking_rate(masking: MaskingConfig, steps: int | None) -> MaskingSchedule | None:
    """Return the schedule of the masking rate; None for a constant rate."""
    if masking.schedule == "constant":
        return None
    assert steps is not None, "the config rejects a time budget with a masking schedule"
    return MaskingSchedule(masking.rates, masking.schedule, steps)


def _total_steps(
    schedule: ScheduleConfig,
    orders: Sequence[ShuffledOrder],
    first_steps: Sequence[int],
    mean_lengths: Sequence[float],
    plan: ResumePlan,
) -> int | None:
    """Return the steps in the run; None under a time budget. A fork has the tokens of its parent, whose batches may
    have been others.

    Args:
        orders, first_steps: by stage.
        mean_lengths: by stage; tokens per sequence, special tokens included.
    """
    *others, last = (order.sizes for order in orders)
    if schedule.tokens is None:
        return schedule.known_steps or orders[-1].end
    start, done = (0, 0) if plan.forked_tokens is None else (plan.forked_at, plan.forked_tokens)
    if plan.fork and done >= schedule.tokens:
        raise UserError(
            f"schedule.tokens is {schedule.tokens:.4g}, but a fork continues its parent's count of tokens, and "
            f"{plan.checkpoint} has {done:.4g} already"
        )
    before_last: float = done
    for sizes, (first, end), mean in zip(others, pairwise(first_steps), mean_lengths, strict=False):
        before_last += (sizes.start(end) - sizes.start(min(max(start, first), end))) * mean
    if others and before_last >= schedule.tokens:
        raise UserError(
            f"schedule.tokens: the first {len(others)} of schedule.stages take about {before_last:.4g} tokens, "
            f"which leaves none of {schedule.tokens:.4g} for the last one"
        )
    left = math.ceil((schedule.tokens - before_last) / mean_lengths[-1])
    return last.end(last.start(max(start, first_steps[-1])) + left)
