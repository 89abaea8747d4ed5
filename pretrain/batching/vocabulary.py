"""What batching has to know of a tokenizer: which ids frame a sequence, which may be masked, which may replace one."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from experiment.errors import UserError
from pretrain.corpus.words import WordBoundaries, word_boundaries


@dataclass(frozen=True)
class Vocabulary:
    prefix: tuple[int, ...]  # special ids before the text of a sequence, such as [CLS]
    suffix: tuple[int, ...]  # and after it, such as [SEP]
    pad_id: int
    mask_id: int
    unmaskable: NDArray[np.bool_]  # [largest id + 1] special tokens, the unknown token included
    replacements: NDArray[np.int64]  # ids that a random replacement is drawn from: real ones, none of them special
    word_boundaries: WordBoundaries | None = None  # where words begin; None: the tokenizer does not tell

    @property
    def num_special_tokens(self) -> int:
        """Special tokens around every sequence."""
        return len(self.prefix) + len(self.suffix)


def build_vocabulary(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """Raises UserError for a tokenizer that masked language modelling cannot be done with."""
    if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        missing = [name for name in ("mask_token", "pad_token") if getattr(tokenizer, f"{name}_id") is None]
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has no {' and no '.join(missing)}: it cannot mask")
    special = set(tokenizer.all_special_ids)
    real = sorted(set(tokenizer.get_vocab().values()))
    unmaskable = np.zeros(real[-1] + 1, dtype=np.bool_)
    unmaskable[sorted(special)] = True
    prefix, suffix = _frame(tokenizer)
    return Vocabulary(
        prefix=prefix,
        suffix=suffix,
        pad_id=tokenizer.pad_token_id,
        mask_id=tokenizer.mask_token_id,
        unmaskable=unmaskable,
        replacements=np.array([token for token in real if token not in special], dtype=np.int64),
        word_boundaries=word_boundaries(tokenizer.backend_tokenizer.to_str()),
    )


def _frame(tokenizer: PreTrainedTokenizerFast) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special ids that the tokenizer's post-processor puts before and after a text."""
    text = next(word for word in tokenizer.get_vocab() if word.isalnum())
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    framed = tokenizer(text)["input_ids"]
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return tuple(framed[:start]), tuple(framed[start + len(bare) :])
    raise UserError(f"the tokenizer {tokenizer.name_or_path} changes a text's own tokens when it adds special ones")
