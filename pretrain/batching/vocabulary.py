"""Facts about a tokenizer for batching: special ids around a sequence, ids never masked, ids for random replacement."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from experiment.errors import UserError
from experiment.models.tokenizer import special_token_ids
from pretrain.corpus.reader import Corpus
from pretrain.corpus.word_boundaries import WordBoundaries, word_boundaries

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vocabulary:
    """The special tokens and the maskable and replaceable ids of a tokenizer."""

    prefix: tuple[int, ...]  # special ids before the text of each sequence, such as [CLS]
    suffix: tuple[int, ...]  # special ids after it, such as [SEP]
    pad_id: int
    mask_id: int
    unmaskable: NDArray[np.bool_]  # [largest id + 1] True for special tokens, including the unknown token
    replacements: NDArray[np.int64]  # ids for random replacement: real tokens that are not special
    word_boundaries: WordBoundaries | None = None  # None: the tokenizer does not mark where words begin

    @property
    def num_special_tokens(self) -> int:
        """Special tokens that are added to each sequence."""
        return len(self.prefix) + len(self.suffix)


def build_vocabulary(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """Build the vocabulary. Raises UserError for a tokenizer that changes texts. tokenizer: from `load_tokenizer`."""
    special = special_token_ids(tokenizer)
    real = sorted(set(tokenizer.get_vocab().values()))
    unmaskable = np.zeros(real[-1] + 1, dtype=np.bool_)
    unmaskable[sorted(special)] = True
    replacements = [token for token in real if token not in special]
    prefix, suffix = _special_affixes(tokenizer, replacements)
    return Vocabulary(
        prefix=prefix,
        suffix=suffix,
        pad_id=tokenizer.pad_token_id,
        mask_id=tokenizer.mask_token_id,
        unmaskable=unmaskable,
        replacements=np.array(replacements, dtype=np.int64),
        word_boundaries=word_boundaries(tokenizer.backend_tokenizer.to_str()),
    )


def check_word_boundaries(unit: str, corpora: Iterable[Corpus], vocabulary: Vocabulary) -> None:
    """Raise UserError where word boundaries are unknown; warn of text that seems to be written without spaces."""
    for corpus in corpora:
        if vocabulary.word_boundaries is None:
            raise UserError(
                f"masking.unit is '{unit}', but the tokenizer of {corpus.path} does not mark word boundaries as "
                "WordPiece, byte-level BPE or SentencePiece do; expected 'token'"
            )
        if corpus.manifest.lacks_words:
            log.warning(
                "masking.unit is '%s', but text in %s seems to be written without spaces, so its word boundaries are "
                "unknown. Build corpora with Chinese text with --segmenter jieba; for other text without spaces use "
                "masking.unit 'token'",
                unit,
                corpus.path,
            )


def _special_affixes(
    tokenizer: PreTrainedTokenizerFast, ordinary: Iterable[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the special ids that the tokenizer's post-processor puts before and after a text. ordinary: ids of tokens
    that are not special; the first whose text gives tokens is used."""
    for token in ordinary:
        text = tokenizer.convert_ids_to_tokens(token)
        try:
            encoding = tokenizer(text, return_special_tokens_mask=True)
        except Exception:  # tokenizers raises it for a word without tokens, such as ##a
            continue
        ids, added = encoding["input_ids"], encoding["special_tokens_mask"]
        if 0 not in added:
            continue
        start, end = added.index(0), len(added) - added[::-1].index(0)
        if ids[start:end] == tokenizer(text, add_special_tokens=False)["input_ids"]:
            return tuple(ids[:start]), tuple(ids[end:])
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} changes the tokens of a text when it adds special tokens"
        )
    raise UserError(f"the tokenizer {tokenizer.name_or_path} makes no tokens of the words in its vocabulary")
