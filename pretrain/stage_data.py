"""The training data of one stage of a run: sequences, shares of the mixture, order and masks.

The weights of a mixture are shares of tokens. `batching/order.py` deals positions to corpora, one per sequence, so the
weights are converted here.
"""

from dataclasses import dataclass

from pretrain.batching.batch_maker import MaskedCorpus
from pretrain.batching.batch_sizes import BatchSizes
from pretrain.batching.counter_rng import make_key
from pretrain.batching.masking import Masker, masking_policy
from pretrain.batching.order import CorpusStream, ShuffledOrder
from pretrain.batching.sequences import SequenceIndex, open_index
from pretrain.batching.vocabulary import Vocabulary
from pretrain.config import MaskingConfig, ScheduleConfig, Stage
from pretrain.resolve import ResolvedRun, TrainingCorpus


@dataclass(frozen=True)
class StageData:
    """The training corpora, split to the sequence length of one stage."""

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
        """The order of the stage. Its sequences are not those of the previous stage, so it starts new epochs."""
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
    """Open the sequence indexes of stage `number`; those that do not exist are built."""
    stage = run.stages[number]
    capacity = stage.max_seq_length - run.vocabulary.num_special_tokens
    indexes = tuple(open_index(given.corpus, capacity, run.folder.path / "index") for given in run.corpora)
    return StageData(number, stage, run.corpora, indexes, run.vocabulary)
