"""Fill masked sentences of held-out text with new checkpoints of a run, for its report.

The fillings are computed when a report is made, from the exported models and on one core: training is neither changed
nor slowed down. The sentences are chosen once, and kept with the fillings.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from heapq import nlargest
from itertools import pairwise, product
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import regex
from numpy.typing import NDArray

from experiment.config import read_recorded
from experiment.errors import UserError, describe_disk_error, notify
from experiment.run_files.checkpoints import checkpoint_step, weights_digest
from experiment.run_files.fillings import (
    CheckpointFillings,
    FilledSentence,
    MaskedSentence,
    add_fillings,
    read_fillings,
    spread,
)
from experiment.run_files.goodput import reached_checkpoints, read_attempt_times
from experiment.run_files.run_folder import RunFolder
from experiment.unspaced_scripts import HAN, WIDE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_SENTENCES = 10
_TOP = 5
_CHECKPOINTS = 6
_SHORTEST, _LONGEST = 8, 40  # tokens of a sentence
_LONGEST_WORD = 4  # tokens of a masked word
_ENDS = frozenset(".!?。！？")
_SEED = 0
_HAN = regex.compile(f"[{HAN}]+")
_BETWEEN_HAN = regex.compile(f"(?<=^|[{HAN}{WIDE}]) +(?=[{HAN}{WIDE}])")


def fill_new_checkpoints(folder: RunFolder) -> None:
    """Add the fillings of six evenly spread checkpoints, if they have none yet. Problems are printed: a report does not
    need them."""
    known = read_fillings(folder)
    done = {(found.step, found.weights) for found in known}
    shown = spread(list(_checkpoints(folder).items()), _CHECKPOINTS)
    new = {path: digest for path, digest in shown if (checkpoint_step(path), digest) not in done}
    if not new:
        return
    with _printed_problems("no held-out sentences"):
        sentences = [filled.sentence for filled in known[0].sentences] if known else _sentences_of(folder, max(new))
        for path in new if sentences else ():
            if not path.exists():  # deleted meanwhile by the run
                continue
            with _printed_problems(f"no fillings of {path.name}"):
                filled = tuple(_fill(path / "hf", sentences))
                add_fillings(folder, CheckpointFillings(checkpoint_step(path), new[path], filled))


@contextmanager
def _printed_problems(without: str) -> Iterator[None]:
    try:
        yield
    except (UserError, OSError, ValueError, KeyError, RuntimeError) as error:  # such as a deleted checkpoint
        notify(f"report: {without}: {describe_disk_error(error) or error}")


def _checkpoints(folder: RunFolder) -> dict[Path, str]:
    """Return the weights digest of each complete checkpoint. Skips checkpoints that are being deleted or copied, and
    those of steps that the run trains again."""
    found = {}
    for path in reached_checkpoints(folder, read_attempt_times(folder)):
        with suppress(OSError, ValueError):
            found[path] = weights_digest(path)
    return found


def _sentences_of(folder: RunFolder, checkpoint: Path) -> list[MaskedSentence]:
    """Return masked sentences from the first corpus of `corpus.eval`, short enough for a checkpoint; empty without
    one."""
    from experiment.models.tokenizer import load_tokenizer
    from pretrain.corpus.cache import open_local

    held_out = (read_recorded(folder.config).get("corpus") or {}).get("eval") or {}
    for path in list(held_out.values())[:1]:
        corpus, tokenizer = open_local(path), load_tokenizer(checkpoint / "hf")
        longest = min(_LONGEST, tokenizer.model_max_length - tokenizer.num_special_tokens_to_add())
        lengths = np.concatenate(list(corpus.document_lengths())).astype(np.int64)
        starts, cut = np.cumsum(lengths) - lengths, np.minimum(lengths, longest)
        order = np.random.default_rng(_SEED).permutation(np.flatnonzero(lengths >= _SHORTEST))
        spans = ((starts[at : at + 1], cut[at : at + 1]) for at in order.tolist())
        texts = ((corpus.read(*span), corpus.read_word_starts(*span)) for span in spans)
        return choose_sentences(texts, tokenizer)
    return []


def choose_sentences(
    texts: Iterator[tuple[NDArray[np.int32], NDArray[np.bool_] | None]], tokenizer: "PreTrainedTokenizerFast"
) -> list[MaskedSentence]:
    """Choose ten different sentences, each with one masked word. texts: their beginnings [T] as token ids, and which
    tokens begin a word, None: as the tokenizer says."""
    from pretrain.batching.vocabulary import build_vocabulary

    vocabulary, draw = build_vocabulary(tokenizer), np.random.default_rng(_SEED)
    chosen: dict[MaskedSentence, None] = {}
    boundaries = vocabulary.word_boundaries
    for text, word_starts in texts:
        ids = _first_sentence(text, tokenizer)
        starts = np.ones(len(ids), dtype=np.bool_) if word_starts is None else word_starts[: len(ids)]
        if word_starts is None and boundaries is not None:
            starts = boundaries.word_starts(ids)
        words = [
            (start, end)
            for start, end in pairwise(np.flatnonzero(starts).tolist())  # the last word may be cut off
            if end - start <= _LONGEST_WORD and not vocabulary.unmaskable[ids[start:end]].any()
        ]
        if (sentence := _mask_word(ids, words, tokenizer, draw)) is not None:
            chosen[sentence] = None
        if len(chosen) == _SENTENCES:
            break
    return list(chosen)


def _first_sentence(ids: NDArray[np.int32], tokenizer: "PreTrainedTokenizerFast") -> NDArray[np.int32]:
    for end in range(_SHORTEST, len(ids)):
        if tokenizer.decode([int(ids[end - 1])]).strip() in _ENDS:
            return ids[:end]
    return ids


def _mask_word(
    ids: NDArray[np.int32],
    words: Sequence[tuple[int, int]],
    tokenizer: "PreTrainedTokenizerFast",
    draw: np.random.Generator,
) -> MaskedSentence | None:
    """Mask a word of one token, or of Chinese characters that are a token each; None if there is none, or the text
    cannot be put together again. words: the first token of each, and the one after it."""
    texts = {word: tokenizer.decode(ids[slice(*word)].tolist()).strip() for word in words}
    named = [word for word, text in texts.items() if _is_maskable(_close_up(text), word[1] - word[0])]
    if not named:
        return None
    start, end = named[int(draw.integers(len(named)))]
    answer = texts[start, end]
    text, until = tokenizer.decode(ids.tolist()), tokenizer.decode(ids[:end].tolist()).rstrip()
    if not (until.endswith(answer) and text.startswith(until)) or str(tokenizer.mask_token) in text:
        return None
    closed = _close_up(answer)
    before, after = _close_up(until).removesuffix(closed), _close_up(f"{answer}{text.removeprefix(until)}")
    sentence = MaskedSentence(before, closed, after.removeprefix(closed))
    return sentence if _count_masks(sentence, tokenizer) == end - start else None


def _is_maskable(word: str, tokens: int) -> bool:
    return word.isalpha() if tokens == 1 else tokens == len(word) and _HAN.fullmatch(word) is not None


def _count_masks(sentence: MaskedSentence, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the number of tokens of the masked word."""
    before, until = (tokenizer.tokenize(text) for text in (sentence.before, sentence.before + sentence.answer))
    return max(len(until) - len(before), 1)  # a space before the word may be a token, or a part of the word


def _close_up(text: str) -> str:
    """Remove the spaces that a WordPiece tokenizer puts between Chinese characters, also in words that were added."""
    closed: str = _BETWEEN_HAN.sub("", text)
    return closed


def _fill(model: Path, sentences: Sequence[MaskedSentence]) -> Iterator[FilledSentence]:
    import torch

    from finetune.prediction.loaded_model import load_on_cpu
    from finetune.prediction.mask_filler import MaskFiller, ranking_task

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # leave the other cores to the run, which may be training on this machine
    try:
        filler = MaskFiller(load_on_cpu(model, ranking_task()))
        masks = [filler.mask * _count_masks(sentence, filler.tokenizer) for sentence in sentences]
        texts = [f"{sentence.before}{mask}{sentence.after}" for sentence, mask in zip(sentences, masks, strict=True)]
        for sentence, candidates in zip(sentences, filler.fill(texts, _TOP), strict=True):
            yield FilledSentence(sentence, _best_words(candidates))
    finally:
        torch.set_num_threads(threads)


def _best_words(candidates: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[tuple[str, float], ...]:
    """Return the most probable words, with their probabilities. candidates: for each token of the word. The tokens are
    predicted independently."""
    words = (
        ("".join(token["token"] for token in tokens), math.prod(token["probability"] for token in tokens))
        for tokens in product(*candidates)
    )
    return tuple((word, round(probability, 6)) for word, probability in nlargest(_TOP, words, itemgetter(1)))
