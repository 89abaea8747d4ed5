"""Fill masks in texts with a masked language model: the most probable tokens, or given options in order."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from experiment.errors import UserError
from experiment.models.tokenizer import decode_token, vocabulary_size
from finetune.data.records import Record
from finetune.encoding.encoder import Encoder
from finetune.encoding.examples import Example, pad_sequences
from finetune.inference import compute_together
from finetune.kinds import cloze
from finetune.masked_tokens import full_width_advice, masked_logits
from finetune.prediction.loaded_model import LoadedModel
from finetune.prediction.predictor import Predictor
from finetune.prediction.saved_task import SavedTask

_MASKS = 64  # whose probabilities are in memory at once: a batch may have a thousand, with a MB each

Candidates = list[list[tuple[int, float]]]
"""For each mask of a text, (token id, probability) of its candidates, the most probable first."""


class Masks(NamedTuple):
    """The `details` of an encoded text."""

    positions: tuple[int, ...]
    top_k: int  # candidates for each


class _OptionRanking(cloze.Kind):
    """Zero-shot cloze on texts whose masks are the tokenizer's, not `_`."""

    def segments(self, record: Record) -> list[str]:
        return list(record.values["segments"])

    def probe(self, encoder: Encoder) -> Example:
        record = Record("", {"segments": ["a", ""], "options": [["b", "c"]]})
        return self.expand(record, encoder, training=False)[0]


def ranking_task() -> SavedTask:
    """Return the task of a masked language model: to rank options for the masks in a text."""
    # Masks are special tokens in the text, as in the fill-mask pipeline of transformers.
    config = cloze.Config(scoring="zero_shot", other_blanks="masked", special_tokens_in_text=True)
    return SavedTask(_OptionRanking(config, ()), None, padded=None)


@dataclass(frozen=True)
class MaskFiller:
    """A masked language model, loaded for `ranking_task`, that fills masks. Threads may share it, but only one may
    compute."""

    loaded: LoadedModel

    @cached_property
    def ranking(self) -> Predictor:
        """Ranks options: records have `segments`, the texts around the masks, and `options` for each mask."""
        return Predictor.of(self.loaded, ranking_task())

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loaded.encoder.tokenizer

    @cached_property
    def vocabulary_size(self) -> int:
        """The scores that are of tokens; those after them pad the vocabulary of some models."""
        return vocabulary_size(self.tokenizer)

    @cached_property
    def _added_tokens(self) -> dict[int, str]:
        """As they are in the vocabulary: `convert_ids_to_tokens` returns them normalized."""
        return {identifier: str(token.content) for identifier, token in self.tokenizer.added_tokens_decoder.items()}

    @property
    def mask(self) -> str:
        """The text of a mask."""
        return str(self.tokenizer.mask_token)

    def fill(self, texts: Sequence[str], top_k: int = 5) -> list[list[list[dict[str, Any]]]]:
        """Return the `top_k` most probable tokens of each mask in each text, see `describe`.

        Raises UserError for a text without a mask, and for one whose masks do not fit into a sequence.
        """
        masked = [self.encode(text, f"text {number}", top_k) for number, text in enumerate(texts, 1)]
        return [self.describe(candidates) for candidates in self.compute(masked)]

    def encode(self, text: str, place: str, top_k: int) -> Example:
        """Do the first step of `fill`: encode a text; `details`: its masks. place: the name of the text in messages."""
        with self.loaded.tokenizer_lock:
            tokens = self.loaded.encoder.encode(text)
        positions = (tokens.input_ids == self.tokenizer.mask_token_id).nonzero()[:, 0].tolist()
        if len(positions) < len(self.split(text, place)) - 1:
            raise UserError(f"{place}: a {self.mask} is beyond the first {self.loaded.encoder.max_length} tokens")
        return Example((tokens,), details=Masks(tuple(positions), min(top_k, len(self.tokenizer))))

    def compute(self, texts: Sequence[Example]) -> list[Candidates]:
        """Do the second step, for any texts together."""
        return compute_together(texts, self.loaded.padding, self._compute_batch)

    def _compute_batch(self, texts: Sequence[Example]) -> list[Candidates]:
        masks: list[Masks] = [text.details for text in texts]
        rows = [row for row, found in enumerate(masks) for _ in found.positions]
        positions = [position for found in masks for position in found.positions]
        inputs = pad_sequences(
            [text.sequences[0] for text in texts], self.loaded.padding, self.loaded.device.torch_device
        )
        with torch.inference_mode(), self.loaded.device.autocast():
            logits_MV = masked_logits(self.loaded.model, inputs, rows, positions)
        most = max(each.top_k for each in masks)
        found = [each.softmax(-1)[:, : self.vocabulary_size].topk(most) for each in torch.split(logits_MV, _MASKS)]
        candidates = (pair for each in found for pair in zip(each.indices.tolist(), each.values.tolist(), strict=True))
        return [[list(zip(*next(candidates), strict=True))[: each.top_k] for _ in each.positions] for each in masks]

    def describe(self, candidates: Candidates) -> list[list[dict[str, Any]]]:
        """Do the last step: return the candidates as {token, piece, probability}.

        token: its text, without spaces around it; piece: as it is in the vocabulary, which tells ` the` from `the`.
        Raises NotFiniteError.
        """
        self.loaded.check_finite([found for _, found in mask] for mask in candidates)
        return [
            [
                {
                    "token": decode_token(self.tokenizer, token).strip(),
                    "piece": self._added_tokens.get(token) or self.tokenizer.convert_ids_to_tokens(token),
                    "probability": found,
                }
                for token, found in mask
            ]
            for mask in candidates
        ]

    def split(self, text: str, place: str) -> list[str]:
        """Return the text before, between and behind the masks. Raises UserError if there is none."""
        if len(segments := text.split(self.mask)) == 1:
            raise UserError(f"{place}: no {self.mask} to fill{full_width_advice(self.mask, text)}")
        return segments

    def option_record(self, text: str, options: Sequence[Sequence[str]], place: str) -> Record:
        """Return a record for `ranking`. options: of each mask, two or more. Raises UserError for another number, and
        for an empty option."""
        segments = self.split(text, place)
        if not all(option.strip() for row in options for option in row):
            raise UserError(f"{place}: an option is empty")
        if len(segments) != len(options) + 1:
            raise UserError(f"{place}: {len(segments) - 1} {self.mask}, but {len(options)} lists of options")
        return Record(place, {"segments": segments, "options": list(map(list, options))})

    @staticmethod
    def rank(record: Record, probabilities: Sequence[Sequence[float]]) -> list[list[dict[str, Any]]]:
        """Return the options of each mask as {token, probability}, the most probable first."""
        return [
            [
                {"token": option, "probability": probability}
                for probability, option in sorted(zip(found, options, strict=True), key=lambda pair: -pair[0])
            ]
            for options, found in zip(record.values["options"], probabilities, strict=True)
        ]
