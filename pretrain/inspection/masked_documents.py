"""Documents as the model sees them: special tokens around the text, some tokens masked."""

import numpy as np
from transformers import PreTrainedTokenizerFast

from experiment.results.page import SeenText, SeenToken
from pretrain.batching.masking import Masker
from pretrain.batching.order import BatchSequences
from pretrain.batching.sequences import split_documents
from pretrain.batching.vocabulary import build_vocabulary
from pretrain.config import BatchConfig, MaskingConfig
from pretrain.inspection.sample import Sample

MAX_SEQ_LENGTH = BatchConfig().max_seq_length
_DOCUMENTS = 8


def masked_documents(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> list[SeenText]:
    """Return the first sequences of some documents of the sample, with the default masking."""
    vocabulary = build_vocabulary(tokenizer)
    masker = Masker(vocabulary, MaskingConfig(), sample.seed, sample.corpus.fingerprint)
    count = min(_DOCUMENTS, len(sample.documents))
    chosen = np.sort(np.random.default_rng(sample.seed).choice(len(sample.documents), count, replace=False))
    texts = []
    for document in (sample.documents[index] for index in chosen.tolist()):
        lengths = split_documents(np.array([len(document.ids)]), MAX_SEQ_LENGTH - vocabulary.num_special_tokens)[:1]
        tokens = document.ids[: lengths[0]].astype(np.int64)
        sequence = BatchSequences(np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([document.number]))
        masked = masker.mask(tokens, lengths, masker.keys(sequence))
        places = (masked.indices + len(vocabulary.prefix)).tolist()
        answers = dict(zip(places, tokens[masked.indices].tolist(), strict=True))
        seen = [
            SeenToken(token_text(tokenizer, token), token_text(tokenizer, answers[at]) if at in answers else None)
            for at, token in enumerate([*vocabulary.prefix, *masked.inputs.tolist(), *vocabulary.suffix])
        ]
        title = f"document {document.number + 1:,} of {sample.corpus.documents:,}: {len(document.ids):,} tokens"
        texts.append(SeenText(title, seen))
    return texts


def token_text(tokenizer: PreTrainedTokenizerFast, token: int) -> str:
    """Return a token for people. One that is a part of a character in UTF-8 as in the vocabulary."""
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    return text if text.strip() and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token))
