"""Which tokens are predicted, and what the model is shown in their place.

Every text token draws its own random words from a counter-based generator keyed by (seed, corpus, epoch, sequence), so
the masks of a sequence are the same on whichever rank, in whichever microbatch and after however many restarts, and
fresh in each epoch. The policy is BERT's (Devlin et al. 2019, section 3.1), with a Bernoulli draw per token.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.batching.counter_rng import U64, below, draws, fold, key_of, uniform
from pretrain.batching.order import BatchSequences
from pretrain.batching.vocabulary import Vocabulary


@dataclass(frozen=True)
class MaskingPolicy:
    rate: float  # share of the text tokens that are predicted
    mask_share: float  # of those, shown as the mask token
    random_share: float  # of those, shown as a random token; the rest is shown as it is


class MaskedTokens(NamedTuple):
    shown: NDArray[np.int64]  # [T] what the model sees
    chosen: NDArray[np.int64]  # [M] indices of the predicted tokens, ascending


@dataclass(frozen=True)
class Masker:
    """Masks the sequences of one corpus under one seed."""

    vocabulary: Vocabulary
    policy: MaskingPolicy
    seed: int
    corpus: str  # fingerprint
    stage: int = 0

    def keys(self, sequences: BatchSequences) -> U64:
        """The key of each sequence's random stream [S]."""
        return fold(fold(key_of(("masks", self.seed, self.corpus, self.stage)), sequences.epochs), sequences.ids)

    def mask(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64], keys: U64) -> MaskedTokens:
        """Mask the text tokens [T] of sequences with these lengths [S] (sum: T) and keys [S]."""
        first = np.cumsum(lengths) - lengths
        token_keys = np.repeat(keys, lengths)
        within = np.arange(len(tokens)) - np.repeat(first, lengths)
        picked = uniform(draws(token_keys, 2 * within)) < self.policy.rate
        chosen = np.flatnonzero(picked & ~self.vocabulary.unmaskable[tokens])
        # One more word decides the rest: its high bits what happens to the token, a hash of it which id replaces it.
        words = draws(token_keys[chosen], 2 * within[chosen] + 1)
        action = uniform(words)
        shown = tokens.copy()
        shown[chosen[action < self.policy.mask_share]] = self.vocabulary.mask_id
        random = (action >= self.policy.mask_share) & (action < self.policy.mask_share + self.policy.random_share)
        drawn = below(fold(0, words[random]), len(self.vocabulary.replacements))
        shown[chosen[random]] = self.vocabulary.replacements[drawn]
        return MaskedTokens(shown, chosen)
