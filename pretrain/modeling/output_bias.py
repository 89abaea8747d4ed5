"""The initial bias of the decoder: the logarithm of the frequency of each token.

A new model predicts all tokens alike, and learns their frequencies first. With this bias it begins with them, as
Karpathy 2019, "A Recipe for Training Neural Networks" (section 2, "init well"), recommends for final layers.

Shapes: V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from experiment.errors import UserError
from pretrain.corpus.reader import Corpus
from pretrain.modeling.structure import decoder_of

_SHARDS = 4  # of at most 32 Mi tokens: 128 Mi tokens are enough for the frequencies


def token_frequencies(corpora: Sequence[Corpus], weights: Sequence[float]) -> NDArray[np.float64]:
    """Return the share of each token in a mixture of corpora: [V]. Every token counts once more than it occurs, so that
    no share is 0. Reads up to four shards of each corpus.

    weights: share of the tokens of each corpus in the mixture, relative to each other.
    """
    shares = np.stack([_frequencies(corpus) for corpus in corpora])
    return np.average(shares, axis=0, weights=weights)


def _frequencies(corpus: Corpus) -> NDArray[np.float64]:
    shards = np.unique(np.linspace(0, len(corpus.manifest.shards) - 1, _SHARDS).astype(int)).tolist()
    counts = corpus.count_tokens(shards) + 1
    return counts / float(counts.sum())


def set_output_bias(model: PreTrainedModel, frequencies: NDArray[np.float64], pretrained: bool = False) -> None:
    """Set the bias of the decoder to the logarithm of `frequencies`, [V].

    Rows of the decoder that no token has, of a padded vocabulary, get the bias of the rarest one. Raises UserError if
    the bias of a model that is `pretrained` is a trained one: new ones are zeros.
    """
    bias = output_bias_of(model)
    if pretrained and bias.any():
        raise UserError("model.output_bias: the model in model.init_from has a trained bias; leave output_bias out")
    logarithms = np.log(frequencies)
    padding = (0, bias.numel() - len(logarithms))
    with torch.no_grad():
        bias.copy_(torch.from_numpy(np.pad(logarithms, padding, constant_values=logarithms.min())))


def output_bias_of(model: PreTrainedModel) -> Tensor:
    """Return the bias of the decoder. Raises UserError if it has none, as that of ESM, whose head adds one itself."""
    decoder = decoder_of(model)
    if decoder is None or decoder.bias is None:
        raise UserError(f"model.output_bias: the decoder of '{model.config.model_type}' has no bias that can be set")
    return decoder.bias
