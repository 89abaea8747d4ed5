"""The training data of a run: step -> this rank's share of the global batch, and the number of steps.

Each stage has sequences, shares of the mixture, an order and masks of its own.
"""

import math
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from experiment.errors import UserError
from pretrain.batching.batch import RankBatch
from pretrain.batching.batch_maker import BatchMaker, MaskedCorpus
from pretrain.batching.batch_sizes import BatchSizes
from pretrain.batching.counter_rng import make_key
from pretrain.batching.loader import load_batches
from pretrain.batching.masking import Masker, MaskingSchedule, masking_policy
from pretrain.batching.order import CorpusStream, ShuffledOrder
from pretrain.batching.packing import MicrobatchLayout, Rows
from pretrain.batching.row_width import with_best_row_width
from pretrain.batching.sequences import SequenceIndex, open_index
from pretrain.batching.vocabulary import Vocabulary
from pretrain.config import MaskingConfig, Stage
from pretrain.resolve import ResolvedRun, TrainingCorpus
from pretrain.resume import check_fork_length
from pretrain.schedule_config import ScheduleConfig
from pretrain.world import World


@dataclass(frozen=True)
class StageData:
    """The training corpora, split to the sequence length of one stage.

    The weights of a mixture are shares of tokens. `batching/order.py` deals positions to corpora, one per sequence, so
    the weights are converted here.
    """

    number: int  # of the stage
    stage: Stage
    corpora: tuple[TrainingCorpus, ...]
    indexes: tuple[SequenceIndex, ...]  # by corpus
    vocabulary: Vocabulary

    @property
    def position_shares(self) -> tuple[float, ...]:
        """Shares of the positions, by corpus, under which the weights are shares of the tokens."""
        return tuple(
            given.weight / (given.corpus.tokens / len(index) + self.vocabulary.num_special_tokens)
            for given, index in zip(self.corpora, self.indexes, strict=True)
        )

    @property
    def mean_length(self) -> float:
        """Mean tokens per sequence of the mixture, special tokens included."""
        return sum(given.weight for given in self.corpora) / sum(self.position_shares)

    def masked_corpora(self, masking: MaskingConfig, seed: int) -> tuple[MaskedCorpus, ...]:
        """The split corpora, with masks that no other stage has."""
        policy = masking_policy(masking)
        return tuple(
            MaskedCorpus(
                given.corpus,
                index,
                Masker(self.vocabulary, policy, seed, given.corpus.fingerprint, stage=self.number),
            )
            for given, index in zip(self.corpora, self.indexes, strict=True)
        )

    def order(self, schedule: ScheduleConfig, seed: int) -> ShuffledOrder:
        """The order of the stage. It has other sequences than the previous stage, so it starts new epochs."""
        streams = tuple(
            CorpusStream(len(index), make_key(("order", seed, given.corpus.fingerprint, self.number)))
            for given, index in zip(self.corpora, self.indexes, strict=True)
        )
        epochs = schedule.epochs
        return ShuffledOrder(
            streams,
            BatchSizes(self.stage.sequences, schedule.batch_warmup_steps, self.stage.first_step),
            None if epochs is None else max(1, round(epochs * len(self.indexes[0]))),
            self.position_shares,
        )


def open_stage(run: ResolvedRun, number: int) -> StageData:
    """Open the sequence indexes of stage `number`; missing ones are built."""
    stage = run.stages[number]
    capacity = stage.max_seq_length - run.vocabulary.num_special_tokens
    indexes = tuple(open_index(given.corpus, capacity, run.folder.path / "index") for given in run.corpora)
    return StageData(number, stage, run.corpora, indexes, run.vocabulary)


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
        rows, first_position: of the model, see MicrobatchLayout.
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
    return TrainingStream(tuple(makers), first_steps, steps, tuple(given.name for given in run.corpora), rows)


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
