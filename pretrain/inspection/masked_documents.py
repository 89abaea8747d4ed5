"""Documents as the model sees them: special tokens around the text, some tokens masked."""

import numpy as np
from transformers import PreTrainedTokenizerFast

from experiment.models.tokenizer import decode_token
from experiment.results.page import SeenText, SeenToken
from pretrain.batching.masking import Masker
from pretrain.batching.order import BatchSequences
from pretrain.batching.sequences import split_documents
from pretrain.batching.vocabulary import build_vocabulary
from pretrain.config import BatchConfig, MaskingConfig
from pretrain.corpus.reader import Corpus
from pretrain.corpus.shards import map_shard
from pretrain.inspection.sample import Sample, SampledDocument

MAX_SEQ_LENGTH = BatchConfig().max_seq_length
_DOCUMENTS = 8


def masked_documents(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> list[SeenText]:
    """Return the first sequences of some documents of the sample, with the default masking, but of whole words if the
    corpus was built with a segmenter."""
    vocabulary = build_vocabulary(tokenizer)
    masking = MaskingConfig(unit="word" if sample.corpus.manifest.recipe.segmenter else "token")
    masker = Masker(vocabulary, masking, sample.seed, sample.corpus.fingerprint)
    count = min(_DOCUMENTS, len(sample.documents))
    chosen = np.sort(np.random.default_rng(sample.seed).choice(len(sample.documents), count, replace=False))
    texts = []
    for document in (sample.documents[index] for index in chosen.tolist()):
        lengths = split_documents(np.array([len(document.ids)]), MAX_SEQ_LENGTH - vocabulary.num_special_tokens)[:1]
        tokens = document.ids[: lengths[0]].astype(np.int64)
        sequence = BatchSequences(np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([document.number]))
        word_starts = sample.corpus.read_word_starts(np.array([_start(document, sample.corpus)]), lengths)
        masked = masker.mask(tokens, lengths, sequence, word_starts)
        places = (masked.masked + len(vocabulary.prefix)).tolist()
        hidden = (token_text(tokenizer, token) for token in tokens[masked.masked].tolist())
        answers = dict(zip(places, hidden, strict=True))
        # The last one is the token after the text.
        apart = set() if word_starts is None else {*word_starts.nonzero()[0].tolist(), len(tokens)}
        seen = [
            SeenToken(token_text(tokenizer, token), answers.get(at), at - len(vocabulary.prefix) in apart)
            for at, token in enumerate([*vocabulary.prefix, *masked.inputs.tolist(), *vocabulary.suffix])
        ]
        title = f"document {document.number + 1:,} of {sample.corpus.documents:,}: {len(document.ids):,} tokens"
        texts.append(SeenText(title, seen))
    return texts


def _start(document: SampledDocument, corpus: Corpus) -> int:
    """Return the offset of a document in the token stream of the whole corpus."""
    *before, shard = corpus.manifest.shards[: document.shard + 1]
    return sum(earlier.tokens for earlier in before) + int(map_shard(corpus.path / shard.file).offsets[document.row])


def token_text(tokenizer: PreTrainedTokenizerFast, token: int) -> str:
    """Return a token for people. One that is a part of a character in UTF-8 as in the vocabulary."""
    text = decode_token(tokenizer, token)
    return text if text.strip() and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token))
