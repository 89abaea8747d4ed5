from pathlib import Path

import numpy as np
import pytest
import torch
from model_examples import TINY
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from experiment.errors import UserError
from pretrain.config import ModelConfig
from pretrain.corpus.reader import open_corpus
from pretrain.modeling.build import build_model
from pretrain.modeling.model_config import resolve_model_config
from pretrain.modeling.output_bias import set_output_bias, token_frequencies


def build(tokenizer: PreTrainedTokenizerFast, **fields: object) -> PreTrainedModel:
    settings = ModelConfig(config={"model_type": "bert", **TINY, **fields})
    model = build_model(settings, resolve_model_config(settings, tokenizer), seed=1).model
    model.set_attn_implementation("eager")  # not that of packed rows
    return model


def test_frequencies_of_a_mixture(wordpiece_corpus: Path, heldout_corpus: Path) -> None:
    """Catches tokens that are counted wrongly, ignored weights, and a frequency of 0, whose logarithm is infinite."""
    train, held_out = open_corpus(wordpiece_corpus), open_corpus(heldout_corpus)
    shares = []
    for corpus in (train, held_out):
        lengths = np.concatenate(list(corpus.document_lengths())).astype(np.int64)
        ids = corpus.read(np.cumsum(lengths) - lengths, lengths)
        counts = np.bincount(ids, minlength=corpus.manifest.vocabulary_size) + 1
        shares.append(counts / counts.sum())
    found = token_frequencies([train, held_out], [3.0, 1.0])
    assert np.allclose(found, 0.75 * shares[0] + 0.25 * shares[1])


def test_a_new_model_predicts_the_frequencies(tokenizer: PreTrainedTokenizerFast, wordpiece_corpus: Path) -> None:
    """Catches a bias that is set in a copy or scaled, and padding of the vocabulary that is likely."""
    frequencies = token_frequencies([open_corpus(wordpiece_corpus)], [1.0])
    model = build(tokenizer, vocab_size=len(tokenizer) + 6, initializer_range=1e-6)
    set_output_bias(model, frequencies)
    with torch.no_grad():
        predicted = model(torch.tensor([[5, 6, 7]])).logits[0].double().softmax(-1).numpy()
    padded = np.pad(frequencies, (0, 6), constant_values=frequencies.min())
    assert np.allclose(predicted, padded / padded.sum(), rtol=1e-4)


def test_a_decoder_without_bias_is_rejected(tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches a key that is ignored."""
    model = build(tokenizer)
    model.get_output_embeddings().bias = None
    with pytest.raises(UserError, match=r"model\.output_bias: the decoder of 'bert' has no bias"):
        set_output_bias(model, np.full(len(tokenizer), 1 / len(tokenizer)))


def test_a_head_that_multiplies_by_the_embeddings_is_rejected(tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches frequencies of tokens in the bias of a hidden layer, or a ValueError because it has another size."""
    model = build(tokenizer, model_type="deberta-v2", legacy=False)
    with pytest.raises(UserError, match=r"model\.output_bias: the decoder of 'deberta-v2' has no bias"):
        set_output_bias(model, np.full(len(tokenizer), 1 / len(tokenizer)))


@pytest.mark.parametrize("has_head", [True, False])
def test_a_pretrained_model_keeps_its_bias(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, has_head: bool) -> None:
    """Catches a trained bias that is overwritten, and an encoder whose new head is refused the frequencies."""
    model = build(tokenizer)
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    (model if has_head else model.base_model).save_pretrained(tmp_path)
    settings = ModelConfig(init_from=str(tmp_path), output_bias="log_frequency")
    built = build_model(settings, resolve_model_config(settings, tokenizer), seed=1).model
    frequencies = np.full(len(tokenizer), 1 / len(tokenizer))
    if has_head:
        with pytest.raises(UserError, match=r"^model\.output_bias: the model in model\.init_from has a trained bias"):
            set_output_bias(built, frequencies, pretrained=True)
    else:
        set_output_bias(built, frequencies, pretrained=True)
        assert torch.allclose(built.get_output_embeddings().bias, -torch.log(torch.tensor(float(len(tokenizer)))))
