"""The training data of a run: step -> this rank's share of the global batch, and the number of steps."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset

from experiment.errors import UserError
from pretrain.batching.batch import RankBatch
from pretrain.batching.batch_maker import BatchMaker, MaskedCorpus
from pretrain.batching.counter_rng import make_key
from pretrain.batching.loader import load_batches
from pretrain.batching.masking import Masker, MaskingSchedule, masking_policy
from pretrain.batching.order import BatchSizes, CorpusStream, ShuffledOrder
from pretrain.batching.packing import MicrobatchLayout
from pretrain.batching.sequences import SequenceIndex, open_index
from pretrain.config import MaskingConfig, ScheduleConfig
from pretrain.resolve import ResolvedRun, TrainingCorpus
from pretrain.world import World


@dataclass(frozen=True)
class TrainingStream(Dataset[RankBatch]):
    """One batch maker for each stage of the run; all of them take the step of the run."""

    makers: tuple[BatchMaker, ...]
    first_steps: tuple[int, ...]  # of each stage
    steps: int | None  # in the whole run; None: a time budget ends it
    corpora: tuple[str, ...]  # names, by corpus number

    def __getitem__(self, step: int) -> RankBatch:
        return self.makers[bisect_right(self.first_steps, step) - 1][step]

    def load(self, first_step: int, on_gpu: bool) -> Iterator[RankBatch]:
        """The batches from `first_step` on, prepared ahead in worker processes."""
        return load_batches(self, first_step, self.steps, workers=2 if on_gpu else 1, pin_memory=on_gpu)


def open_stream(run: ResolvedRun, world: World, *, packed: bool, first_position: int) -> TrainingStream:
    """`packed`, `first_position`: what the model needs, see MicrobatchLayout.

    Raises UserError where the length of the run does not fit its stages.
    """
    config = run.config
    stages = [_CutMixture(run, number) for number in range(len(run.stages))]
    orders = [stage.order(config.schedule, config.run.seed) for stage in stages]
    steps = _total_steps(config.schedule, orders, [stage.mean_length for stage in stages])
    makers = (
        BatchMaker(
            stage.masked_corpora(config.masking, config.run.seed),
            order,
            run.vocabulary,
            MicrobatchLayout(settings.max_seq_length, settings.microbatch_tokens, packed, first_position),
            world,
            _masking_rate(config.masking, steps),
        )
        for stage, order, settings in zip(stages, orders, run.stages, strict=True)
    )
    return TrainingStream(
        tuple(makers),
        tuple(stage.first_step for stage in run.stages),
        steps,
        tuple(given.name for given in run.corpora),
    )


class _CutMixture:
    """The training corpora, cut to the sequence length of one stage."""

    def __init__(self, run: ResolvedRun, number: int) -> None:
        self._number = number
        self._stage = run.stages[number]
        self._vocabulary = run.vocabulary
        self._corpora: Sequence[TrainingCorpus] = run.corpora
        capacity = self._stage.max_seq_length - run.vocabulary.num_special_tokens
        index_folder = run.folder.path / "index"
        self._indexes: list[SequenceIndex] = [open_index(given.corpus, capacity, index_folder) for given in run.corpora]

    @property
    def mean_length(self) -> float:
        """Mean tokens per sequence of the stream, special tokens included."""
        return sum(given.weight for given in self._corpora) / sum(self._shares)

    @property
    def _shares(self) -> tuple[float, ...]:
        """Shares of the sequences that make the weights shares of the tokens."""
        return tuple(
            given.weight / (given.corpus.tokens / len(index) + self._vocabulary.num_special_tokens)
            for given, index in zip(self._corpora, self._indexes, strict=True)
        )

    def masked_corpora(self, masking: MaskingConfig, seed: int) -> tuple[MaskedCorpus, ...]:
        """The cut corpora with masks that no other stage has."""
        policy = masking_policy(masking)
        return tuple(
            MaskedCorpus(
                given.corpus,
                index,
                Masker(self._vocabulary, policy, seed, given.corpus.fingerprint, stage=self._number),
            )
            for given, index in zip(self._corpora, self._indexes, strict=True)
        )

    def order(self, schedule: ScheduleConfig, seed: int) -> ShuffledOrder:
        """The order of the stage. Its sequences are not those of the previous stage, so it starts new epochs."""
        streams = tuple(
            CorpusStream(len(index), make_key(("order", seed, given.corpus.fingerprint, self._number)))
            for given, index in zip(self._corpora, self._indexes, strict=True)
        )
        epochs = schedule.epochs
        return ShuffledOrder(
            streams,
            BatchSizes(self._stage.sequences, schedule.batch_warmup_steps, self._stage.first_step),
            None if epochs is None else max(1, round(epochs * len(self._indexes[0]))),
            self._shares,
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
