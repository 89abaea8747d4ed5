"""The stream of batches of a run: step -> this rank's share of the global batch, and where the stream ends."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
from pretrain.config import PretrainConfig
from pretrain.resolve import Inputs
from pretrain.world import World


@dataclass(frozen=True)
class Stream(Dataset[RankBatch]):
    """One maker of batches for each stage of the run; all count steps from the beginning of the run."""

    makers: tuple[BatchMaker, ...]
    first_steps: tuple[int, ...]  # of each stage
    steps: int | None  # in the whole run; None: a time budget ends it

    def __getitem__(self, step: int) -> RankBatch:
        return self.makers[bisect_right(self.first_steps, step) - 1][step]

    def load(self, first: int, on_gpu: bool) -> Iterator[RankBatch]:
        """The batches from step `first` on, made ahead in worker processes."""
        return load_batches(self, first, self.steps, workers=2 if on_gpu else 1, pin_memory=on_gpu)


def open_stream(
    config: PretrainConfig, inputs: Inputs, packed: bool, first_position: int, world: World, index_folder: Path
) -> Stream:
    """`packed`, `first_position`: see MicrobatchLayout. `index_folder`: where sequence indexes go if a corpus folder
    cannot be written to. Raises UserError where the length of the run does not fit its stages."""
    stages = config.stages
    cuts = [
        [
            open_index(given.corpus, stage.max_seq_length - inputs.vocabulary.num_special_tokens, index_folder)
            for given in inputs.train
        ]
        for stage in stages
    ]
    orders = [_order(config, inputs, number, cut) for number, cut in enumerate(cuts)]
    steps = _steps(config, orders, [_mean_length(inputs, cut) for cut in cuts])
    rate = None
    if config.masking.schedule != "constant":
        assert steps is not None, "a budget with a masking schedule is refused when the config is built"
        rate = MaskingSchedule(config.masking.rates, config.masking.schedule, steps)
    makers = (
        BatchMaker(
            _sources(config, inputs, number, cuts[number]),
            orders[number],
            inputs.vocabulary,
            MicrobatchLayout(stage.max_seq_length, stage.microbatch_tokens, packed, first_position),
            world,
            rate,
        )
        for number, stage in enumerate(stages)
    )
    return Stream(tuple(makers), tuple(stage.first_step for stage in stages), steps)


def _sources(config: PretrainConfig, inputs: Inputs, number: int, cut: list[SequenceIndex]) -> tuple[MaskedCorpus, ...]:
    """The corpora of stage `number`, with masks of its own."""
    policy, seed = masking_policy(config.masking), config.run.seed
    return tuple(
        MaskedCorpus(
            given.corpus, index, Masker(inputs.vocabulary, policy, seed, given.corpus.fingerprint, stage=number)
        )
        for given, index in zip(inputs.train, cut, strict=True)
    )


def _order(config: PretrainConfig, inputs: Inputs, number: int, cut: list[SequenceIndex]) -> ShuffledOrder:
    """The order of stage `number`: its sequences are others than those of the one before, so its epochs begin anew."""
    stage, epochs = config.stages[number], config.schedule.epochs
    streams = tuple(
        CorpusStream(len(index), make_key(("order", config.run.seed, given.corpus.fingerprint, number)))
        for given, index in zip(inputs.train, cut, strict=True)
    )
    return ShuffledOrder(
        streams,
        BatchSizes(stage.sequences, config.schedule.batch_warmup_steps, stage.first_step),
        None if epochs is None else max(1, round(epochs * len(cut[0]))),
        _shares(inputs, cut),
    )


def _shares(inputs: Inputs, cut: list[SequenceIndex]) -> tuple[float, ...]:
    """Of the sequences, so that the weights are shares of the tokens."""
    return tuple(
        given.weight / (given.corpus.tokens / len(index) + inputs.vocabulary.num_special_tokens)
        for given, index in zip(inputs.train, cut, strict=True)
    )


def _mean_length(inputs: Inputs, cut: list[SequenceIndex]) -> float:
    """Tokens in a sequence of the stream, special ones included."""
    return sum(given.weight for given in inputs.train) / sum(_shares(inputs, cut))


def _steps(config: PretrainConfig, orders: list[ShuffledOrder], mean_lengths: list[float]) -> int | None:
    schedule, last = config.schedule, orders[-1]
    if schedule.tokens is None:
        return schedule.known_steps or last.end
    seen = sum(
        order.sizes.start(after.sizes.first_step) * mean
        for order, after, mean in zip(orders, orders[1:], mean_lengths, strict=False)
    )
    if seen >= schedule.tokens:
        raise UserError(
            f"schedule.tokens: the first {len(orders) - 1} of schedule.stages take about {seen:.4g} tokens, "
            f"which leaves none of {schedule.tokens:.4g} for the last one"
        )
    return last.sizes.end(math.ceil((schedule.tokens - seen) / mean_lengths[-1]))
