"""Texts to the token ids that a model expects; windows over texts that are too long for one sequence."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import regex
import torch
from torch import Tensor

from experiment.errors import UserError
from experiment.models.tokenizer import load_any_tokenizer
from experiment.unspaced_scripts import UNSPACED, WIDE
from finetune.data.dialogue import TurnJoiner
from finetune.data.task_config import TaskConfig

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

_UNSPACED = regex.compile(f"[{UNSPACED}{WIDE}]")  # no space beside them


@dataclass(frozen=True)
class Tokens:
    """One sequence."""

    input_ids: Tensor  # T int64
    token_type_ids: Tensor | None  # T int64; None if the model has none
    cut: int = 0  # tokens that were left out, because it was too long

    def __len__(self) -> int:
        return len(self.input_ids)


TextOrPair = tuple[str, str | None]


class _Frame(NamedTuple):
    """The special tokens around the texts of a sequence, as (ids, token types), and the types of the texts."""

    specials: tuple[tuple[list[int], list[int]], ...]  # before, between and after the texts
    text_types: tuple[int, ...]


@dataclass(frozen=True)
class Encoder:
    """Encodes texts for one model."""

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int  # tokens of a sequence, special tokens included
    token_types: bool  # whether the model has token types
    special_tokens_in_text: bool = False  # whether those written out in a text are special; otherwise they are text
    spaced_words: bool = False  # whether there is a space between all words, also in scripts without spaces
    cache: Mapping[TextOrPair, Tokens] = field(default_factory=dict, repr=False, compare=False)  # what `encode` returns

    def encode(self, text: str, text_pair: str | None = None) -> Tokens:
        """Return a text or a pair as one sequence. If it is too long, the longer text is cut at its end."""
        return self.cache.get((text, text_pair)) or self.encode_all([(text, text_pair)])[0]

    def encode_all(self, rows: Sequence[TextOrPair]) -> list[Tokens]:
        """Like `encode` for each row, in about half the time, and on all cores with fast tokenizers."""
        # Fast tokenizers make a single text of a pair with an empty text.
        is_pair = [bool(pair) or (pair is not None and not self.tokenizer.is_fast) for _, pair in rows]
        singles = self._encode_texts([text for (text, _), paired in zip(rows, is_pair, strict=True) if not paired])
        pairs = self._encode_pairs([row for row, paired in zip(rows, is_pair, strict=True) if paired])
        return [next(pairs if paired else singles) for paired in is_pair]

    def with_cache(self, rows: Sequence[TextOrPair]) -> "Encoder":
        """Return a copy that has these rows in its cache; they are tokenized in one call."""
        return replace(self, cache=dict(zip(rows, self.encode_all(rows), strict=True))) if rows else self

    def _encode_texts(self, texts: Sequence[str]) -> Iterator[Tokens]:
        if not texts:
            return
        encoded = self._tokenize(texts, truncation="longest_first", max_length=self.max_length)
        for index, ids in enumerate(encoded["input_ids"]):
            cut = 0 if len(ids) < self.max_length else self._count_cut(encoded, index, texts[index])
            yield self._sequence(ids, encoded["token_type_ids"][index] if self.token_types else [], cut)

    def _encode_pairs(self, pairs: Sequence[TextOrPair]) -> Iterator[Tokens]:
        """Yield what truncation="longest_first" gives, in linear time: fast tokenizers make a sequence of each two
        parts of the texts that they cut off, slow ones warn of each pair."""
        if not pairs:
            return
        flat = [text for first, second in pairs for text in (first, second or "")]
        found = self._tokenize(flat, special=False)["input_ids"]
        for texts in map(list, zip(found[::2], found[1::2], strict=True)):
            room = self.room(2)
            if cut := max(sum(map(len, texts)) - room, 0):
                shorter = 0 if len(texts[0]) <= len(texts[1]) else 1
                # Fast tokenizers give an odd room's last token to the longer text, slow ones to the first.
                half = room // 2 if self.tokenizer.is_fast or shorter == 1 else room - room // 2
                kept = min(len(texts[shorter]), half)
                for index, size in ((shorter, kept), (1 - shorter, room - kept)):
                    start = len(texts[index]) - size if self.tokenizer.truncation_side == "left" else 0
                    texts[index] = texts[index][start : start + size]
            yield self.assemble(*texts, cut=cut)

    def _count_cut(self, encoded: "BatchEncoding", index: int, text: str) -> int:
        """Count the tokens that a sequence of maximum length lacks."""
        if not self.tokenizer.is_fast:
            return len(self._tokenize(text)["input_ids"]) - self.max_length
        # The rest of the text is kept, in sequences with special tokens: no need to tokenize a long text again.
        added: int = self.tokenizer.num_special_tokens_to_add(pair=False)
        assert encoded.encodings is not None
        return sum(len(part) - added for part in encoded.encodings[index].overflowing)

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, without special tokens."""
        found: list[int] = self._tokenize(text, special=False)["input_ids"]
        return found

    def ids_of_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, without special tokens, at least one each unless the text is empty."""
        found: list[list[int]] = self._tokenize(texts, special=False)["input_ids"] if texts else []
        return [ids or (self._unknown() if text else []) for ids, text in zip(found, texts, strict=True)]

    def _unknown(self) -> list[int]:
        """Return one token, for a text that the tokenizer drops."""
        tokens = (self.tokenizer.unk_token_id, self.tokenizer.mask_token_id, *self.ids("a A"))
        padding = self.tokenizer.pad_token_id  # models skip it
        return [next((token for token in tokens if token not in (None, padding)), padding)]

    def _sequence(self, ids: list[int], types: list[int], cut: int) -> Tokens:
        """Return a sequence of at least one token: no model computes an empty one, which would be all padding."""
        ids, types = (ids, types) if ids else (self._unknown(), [0])
        return Tokens(torch.tensor(ids), torch.tensor(types) if self.token_types else None, cut)

    def ids_of_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts that continue others, at least one each unless the text is empty. SentencePiece
        would mark the beginning of each as a word's, even if it is punctuation."""
        if not texts:
            return []
        before, *found = self.ids_of_texts(["(", *(f"({text}" for text in texts)])
        known = self.tokenizer.unk_token_id not in before
        return [
            (ids[len(before) :] if known and ids[: len(before)] == before else self.ids(text))
            or (self._unknown() if text else [])
            for text, ids in zip(texts, found, strict=True)
        ]

    def ids_and_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens of a text, without special tokens, and the characters (start, end) that each of them
        covers.

        Raises UserError for a tokenizer that does not know them.
        """
        if not self.tokenizer.is_fast:
            raise UserError(
                f"{type(self.tokenizer).__name__} does not tell which characters a token covers, as this kind of task "
                "needs; use a model whose tokenizer has a tokenizer.json"
            )
        encoded = self._tokenize(text, special=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def ids_of_words(self, words: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each word of a sentence, at least one each."""
        # Tokenizers that tell the start of a word by the space before it need that space. Beside a character of a
        # script without spaces, it would be a token of its own, before that of the character.
        pairs = enumerate(() if self.spaced_words else pairwise(words), start=1)
        closed = {index for index, (before, word) in pairs if _UNSPACED.search(before[-1:] + word[:1])}
        texts = [f" {word}" if index else word for index, word in enumerate(words) if index not in closed]
        spaced = iter(self.ids_of_texts(texts))
        others = iter(self.ids_of_continuations([words[index] for index in sorted(closed)]))
        return [next(others if index in closed else spaced) or self._unknown() for index in range(len(words))]

    def room(self, texts: int = 1) -> int:
        """Return how many tokens fit into a sequence of one text, or of a pair, beside the special tokens.

        Raises UserError if there is no room for each text.
        """
        room = self.max_length - sum(len(ids) for ids, _ in self._frames[texts - 1].specials)
        if room < texts:
            raise UserError(f"model.max_seq_length: {self.max_length} tokens leave no room for text")
        return room

    def assemble(self, *texts: Sequence[int], cut: int = 0) -> Tokens:
        """Return a sequence of one text or a pair of texts, given as token ids. cut: how many were left out."""
        frame = self._frames[len(texts) - 1]
        ids, types = map(list, frame.specials[0])
        for text, text_type, specials in zip(texts, frame.text_types, frame.specials[1:], strict=True):
            ids += [*text, *specials[0]]
            types += [text_type] * len(text) + specials[1]
        assert len(ids) <= self.max_length
        return self._sequence(ids, types, cut)

    def starts(self, *lengths: int) -> list[int]:
        """Return the start of each text in a sequence of one text or a pair. lengths: of the texts, in tokens."""
        before = [len(ids) for ids, _ in self._frames[len(lengths) - 1].specials]
        return [sum(before[: index + 1]) + sum(lengths[:index]) for index in range(len(lengths))]

    @cached_property
    def _frames(self) -> tuple[_Frame, _Frame]:
        """The special tokens around a single text, and those around a pair."""
        text = "a A"  # of which a tokenizer for upper-case letters only, such as those of DNA, keeps one
        return self._find_frame(text), self._find_frame(text, text)

    def _find_frame(self, *texts: str) -> _Frame:
        encoded = self.tokenizer(
            *texts,
            verbose=False,
            return_special_tokens_mask=True,
            return_token_type_ids=True,
            return_attention_mask=False,
        )
        mask = encoded["special_tokens_mask"]
        if self.tokenizer.is_fast:
            places = encoded.sequence_ids()
        else:
            order, size = count(), mask.count(0) // len(texts)  # the texts are equal
            places = [None if special else next(order) // size for special in mask]
        specials: list[tuple[list[int], list[int]]] = [([], [])]
        text_types: list[int] = []
        before = None
        for token, kind, place in zip(encoded["input_ids"], encoded["token_type_ids"], places, strict=True):
            if place is None:
                specials[-1][0].append(token)
                specials[-1][1].append(kind)
            elif place != before:
                text_types.append(kind)
                specials.append(([], []))
            before = place
        assert len(text_types) == len(texts), "a tokenizer that puts nothing between the texts of a pair"
        return _Frame(tuple(specials), tuple(text_types))

    def _tokenize(self, text: str | Sequence[str], special: bool = True, **options: Any) -> Any:
        return self.tokenizer(
            text,
            add_special_tokens=special,
            split_special_tokens=not self.special_tokens_in_text,
            return_attention_mask=False,
            return_token_type_ids=self.token_types,
            verbose=False,
            **options,
        )


def load_task_tokenizer(folder: Path, task: TaskConfig, fine_tunes: bool = False) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a model folder. Raises UserError if it lacks a special token that the task needs (a task
    that is not trained masks tokens), and for a model that needs more than token ids, such as RoCBERT.

    fine_tunes: truncate on the right; False: on the side saved in the tokenizer. Dialogues: always on the left.
    """
    more = {"sep_token": task.dialogue is not None, "mask_token": not task.is_trained}
    tokenizer = load_any_tokenizer(folder, ["pad_token", *(role for role, is_needed in more.items() if is_needed)])
    if inputs := sorted(set(tokenizer("")) - {"input_ids", "token_type_ids", "attention_mask"}):
        raise UserError(
            f"tokenizer: {folder} holds a {type(tokenizer).__name__}; {', '.join(inputs)} are not supported"
        )
    if task.dialogue is not None:
        tokenizer.truncation_side = "left"  # keep the text itself rather than the turns before it
    elif fine_tunes:
        tokenizer.truncation_side = "right"
    return tokenizer


def turn_joiner(folder: Path, task: TaskConfig) -> TurnJoiner | None:
    """Return a joiner of dialogue turns for the model in a folder, if the task has any."""
    return None if task.dialogue is None else TurnJoiner(task.dialogue, load_task_tokenizer(folder, task).sep_token)


def windows(length: int, size: int) -> list[range]:
    """Return windows of `size` positions that cover `length` positions. Each overlaps the next by a third or more."""
    if length <= size:
        return [range(length)]
    step = max(size - size // 3, 1)
    return [range(start, start + size) for start in (*range(0, length - size, step), length - size)]


def window_around(position: int, length: int, size: int) -> range:
    """Return at most `size` of `length` positions, with the middle at `position` or as near as the ends allow."""
    start = max(min(position - size // 2, length - size), 0)
    return range(start, min(start + size, length))


def most_context(found: Sequence[range], position: int) -> int:
    """Return the index of the window with the most context of a position: the one whose nearer end is farthest."""
    margins = [min(position - window.start, window.stop - 1 - position) for window in found]
    return margins.index(max(margins))
