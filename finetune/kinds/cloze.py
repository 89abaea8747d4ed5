"""Cloze exams: an article with blanks, and options for each blank, as in CLOTH (Xie et al. 2018)."""

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from experiment.errors import UserError
from experiment.intervals import wilson_interval
from finetune.data.columns import ClozeAnswersColumn, Columns, Name, OptionsColumn, TextColumn
from finetune.data.records import Record, Table
from finetune.data.task_config import TaskConfig
from finetune.encoding.encoder import Encoder, window_around, windows
from finetune.encoding.examples import Batch, Example
from finetune.kinds.multiple_choice import best_choices, choice_loss, has_tie
from finetune.masked_tokens import full_width_advice, masked_logits
from finetune.scores.calibration import Classified, pad_probabilities, scale
from finetune.scores.metrics import is_constant
from finetune.scores.significance import Interval, accuracy_interval
from finetune.task_kind import Loss, LossOptions, Prediction, Scorer, TaskKind, predictor_usage

_BLANK = "_"
_EXCERPT = 60  # characters on each side
_MODELS = {
    "multiple_choice": "AutoModelForMultipleChoice",
    "binary": "AutoModelForSequenceClassification",
    "zero_shot": "AutoModelForMaskedLM",
}

Context = Literal["article", "around", "between"]


class ClozeColumns(Columns):
    """Columns of a cloze task. A row is an article."""

    article: TextColumn = "article"
    """Column with the text; each `_` in it is a blank."""

    options: OptionsColumn = "options"
    """Column with a list for each blank: its options."""

    answers: ClozeAnswersColumn = "answers"
    """Column with a list of letters: the right option of each blank, `A` for the first, unless `task.labels` says
    otherwise."""


class Config(TaskConfig):
    """An article with blanks, and options for each blank."""

    kind: Literal["cloze"] = "cloze"
    columns: ClozeColumns = ClozeColumns()
    metric: Literal["accuracy"] = "accuracy"

    labels: tuple[Name, ...] | None = None
    """Names of the first, second, … option in `answers`; default: the letters from `A`. Options after the last name
    have their number."""

    context: Context = "article"
    """Context shown around a blank: the whole article, in overlapping windows if it is too long; the article cut around
    the blank; or the text between the neighbouring blanks."""

    other_blanks: Literal["filled", "masked", "dropped"] = "filled"
    """Content of the other blanks that are shown: the right option, in training only, and otherwise a mask; always
    a mask; or nothing."""

    scoring: Literal["multiple_choice", "binary", "zero_shot"] = "multiple_choice"
    """How an option is scored: by a multiple-choice head on the text with the option filled in; by a classifier of
    such texts as right or wrong; or by the masked-LM head, without training."""

    @property
    def is_trained(self) -> bool:
        return self.scoring != "zero_shot"


@dataclass(frozen=True)
class _Masked:
    """A mask that stands for a token of some options."""

    position: int  # in the sequence
    tokens: Mapping[int, int]  # option -> its token


@dataclass(frozen=True)
class _Blank:
    index: int  # in the article
    lengths: tuple[int, ...]  # of its options, in tokens
    masked: tuple[_Masked, ...] = ()  # of each sequence; zero-shot only


class _Surroundings(NamedTuple):
    """The tokens before and after a blank."""

    left: list[int]
    right: list[int]
    cut: int  # tokens that are left out


class Kind(TaskKind[Config]):
    """A prediction has `answers`, a letter for each blank, and `probabilities`, a list for each blank with one for each
    option.

    If several windows show a blank, the scores of its options are the means over the windows.
    """

    config_type = Config
    hub_task = "multiple-choice"
    usage = predictor_usage({"article": "A _ text.", "options": [["short", "long"]]})
    answer = "answers"

    def __init__(self, config: Config, _: tuple[str, ...]) -> None:
        super().__init__(config, ())  # `labels` of the config are names in `answers`, not of the head's outputs
        self.auto_model = _MODELS[config.scoring]
        self._letters = config.labels or tuple(string.ascii_uppercase)

    @property
    def head(self) -> dict[str, Any]:
        if self.config.scoring != "binary":
            return {}
        return {
            "num_labels": 2,
            "id2label": {0: "wrong", 1: "right"},
            "label2id": {"wrong": 0, "right": 1},
            "problem_type": "single_label_classification",
        }

    def describe(self, train: Table) -> list[str]:
        return [f"{sum(len(record.values['options']) for record in train.records):,} blanks in train"]

    def evaluated_texts(self, record: Record) -> Iterator[str]:
        """Yield the article with the right options in its blanks; without answers, the text between blanks."""
        segments, options, answers = self._parse(record)
        if answers is None:
            yield from segments
        else:
            filled = [row[answer] for row, answer in zip(options, answers, strict=True)]
            yield "".join(chain.from_iterable(zip(segments, [*filled, ""], strict=True)))

    def check_input(self, record: Record) -> None:
        self._parse(record)

    def expand(self, record: Record, encoder: Encoder, training: bool) -> list[Example]:
        """Return the examples of each blank: one for each window that shows it."""
        segments, options, answers = self._parse(record)
        room = encoder.room()
        first, *others = (segment.rstrip() for segment in segments)
        segment_ids = [*encoder.ids_of_texts([first]), *encoder.ids_of_continuations(others)]
        option_ids = [[ids[: room // 2] for ids in row] for row in _option_ids(segments, options, encoder)]
        fillings = self._fillings(option_ids, answers if training else None, encoder)
        examples = []
        for blank, ids in enumerate(option_ids):
            size = room - max(map(len, ids))
            for shown in _surroundings(segment_ids, fillings, blank, self.config.context, size):
                target = None if answers is None else answers[blank]
                examples.append(self._example(blank, ids, shown, target, encoder))
        return examples

    def count_options(self, record: Record) -> int:
        return sum(map(len, record.values["options"]))

    def count_option_tokens(self, records: Sequence[Record], encoder: Encoder) -> int:
        """Zero-shot, each token of an option of several tokens is masked in turn."""
        if self.config.scoring != "zero_shot":
            return 0
        longest = encoder.room() // 2
        options = [each for record in records for row in record.values["options"] for each in set(row)]
        return sum(size * (size - 1) for size in (min(len(ids), longest) for ids in encoder.ids_of_texts(options)))

    def probe(self, encoder: Encoder) -> Example:
        return self.expand(Record("", {"article": "a _", "options": [["b", "c"]]}), encoder, training=False)[0]

    def segments(self, record: Record) -> list[str]:
        """Return the text before, between and behind the blanks of a record."""
        return list(record.values["article"].split(_BLANK))

    def _parse(self, record: Record) -> tuple[list[str], list[list[str]], list[int] | None]:
        """Return the text between the blanks, the options, and the index of each right option if the record has them.

        Raises UserError for another number of blanks, options and answers, and for an unknown letter.
        """
        segments, options = self.segments(record), record.values["options"]
        letters = record.values.get("answers")
        counts = [len(segments) - 1, len(options), len(options if letters is None else letters)]
        if len(set(counts)) > 1 or not options:
            raise UserError(
                f"{record.place}: {counts[0]} blanks '{_BLANK}' in the article, {counts[1]} lists of options and "
                f"{counts[2]} answers; expected one or more, and as many of each"
                + full_width_advice(_BLANK, _BLANK.join(segments))
            )
        if letters is None:
            return segments, options, None
        answers = []
        for number, (row, letter) in enumerate(zip(options, letters, strict=True), 1):
            if letter not in (known := self._names(len(row))):
                problem = f"unknown answer '{letter}'; known: {', '.join(known)}"
                raise UserError(f"{record.place}, blank {number}: {problem}")
            answers.append(known.index(letter))
        return segments, options, answers

    def _names(self, count: int) -> list[str]:
        """Return the names of the options of a blank in `answers`: numbers from 1 for options without a letter."""
        return [*self._letters[:count], *(str(number + 1) for number in range(len(self._letters), count))]

    def _fillings(
        self, option_ids: Sequence[Sequence[list[int]]], answers: Sequence[int] | None, encoder: Encoder
    ) -> list[list[int]]:
        """Return the tokens in each blank while another one is asked for. answers: None if they must not be shown."""
        if self.config.other_blanks == "filled" and answers is not None:
            return [row[answer] for row, answer in zip(option_ids, answers, strict=True)]
        if self.config.other_blanks == "dropped":
            return [[] for _ in option_ids]
        return [[_mask_id(encoder)] for _ in option_ids]

    def _example(
        self, blank: int, options: Sequence[list[int]], shown: _Surroundings, target: int | None, encoder: Encoder
    ) -> Example:
        lengths = tuple(map(len, options))
        if self.config.scoring != "zero_shot":
            filled = [encoder.assemble([*shown.left, *ids, *shown.right], cut=shown.cut) for ids in options]
            return Example(tuple(filled), target, _Blank(blank, lengths))
        # Options of one token share a sequence: in all of them it is the token that is masked.
        start = len(shown.left) + encoder.starts(0)[0]
        masked: dict[tuple[int, ...], _Masked] = {}
        for option, ids in enumerate(options):
            for index, token in enumerate(ids):
                key = (*ids[:index], _mask_id(encoder), *ids[index + 1 :])
                place = masked.get(key, _Masked(start + index, {}))
                masked[key] = _Masked(place.position, {**place.tokens, option: token})
        sequences = [encoder.assemble([*shown.left, *ids, *shown.right], cut=shown.cut) for ids in masked]
        return Example(tuple(sequences), target, _Blank(blank, lengths, tuple(masked.values())))

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return S1 scores of a multiple-choice head, S2 scores of wrong and right; or, zero-shot, the log-probability
        of the masked token of each option (as many columns as a blank has options), 0 for options that mask another
        one."""
        if self.config.scoring == "multiple_choice":
            logits: Tensor = model(**{name: tensor[None] for name, tensor in batch.inputs.items()}).logits
            return logits.reshape(-1, 1)
        if self.config.scoring == "binary":
            return super().forward(model, batch)
        masked = [place for example in batch.examples for place in example.details.masked]
        positions = [place.position for place in masked]
        log_probabilities_SV = masked_logits(model, batch.inputs, range(len(masked)), positions).log_softmax(-1)
        most = max(len(example.details.lengths) for example in batch.examples)
        options_SO = torch.tensor([[place.tokens.get(option, -1) for option in range(most)] for place in masked])
        options_SO = options_SO.to(log_probabilities_SV.device)
        return log_probabilities_SV.gather(1, options_SO.clamp(min=0)) * (options_SO >= 0)

    def loss(self, outputs: Tensor, batch: Batch, options: LossOptions) -> Loss:
        """Return the cross-entropy over the options of each blank; for binary scoring, of right and wrong for each
        option."""
        assert batch.targets is not None
        sizes = [len(example.sequences) for example in batch.examples]
        if self.config.scoring == "binary":
            is_correct = torch.zeros(len(outputs), dtype=torch.long, device=outputs.device)
            first = torch.tensor([0, *sizes[:-1]], device=outputs.device).cumsum(0)
            is_correct[first + batch.targets] = 1
            return Loss.of(F.cross_entropy(outputs.float(), is_correct, reduction="sum"), len(outputs))
        groups = zip(torch.split(outputs.float(), sizes), batch.examples, strict=True)
        return choice_loss([self._option_scores(rows, example.details) for rows, example in groups], batch.targets)

    def decode(self, record: Record, examples: Sequence[Example], outputs: Sequence[NDArray[np.float32]]) -> Prediction:
        rows = iter(outputs)
        scores: list[list[Tensor]] = [[] for _ in record.values["options"]]
        for example in examples:
            found = torch.from_numpy(np.stack([next(rows) for _ in example.sequences]))
            scores[example.details.index].append(self._option_scores(found, example.details))
        probabilities = [torch.softmax(torch.stack(each).mean(0), dim=0).tolist() for each in scores]
        return {
            "answers": [self._names(len(each))[best_choices(each)[0]] for each in probabilities],
            "probabilities": probabilities,
        }

    def _option_scores(self, outputs: Tensor, blank: _Blank) -> Tensor:
        """Return the scores of the options of a blank, log-probabilities up to a constant.

        Zero-shot: the pseudo-log-likelihood (Salazar et al. 2020) of the option's tokens, each masked in turn, divided
        by their number: otherwise short options would win.
        """
        if self.config.scoring == "multiple_choice":
            return outputs[:, 0].log_softmax(0)
        if self.config.scoring == "binary":
            return outputs.log_softmax(-1)[:, 1]
        return outputs.sum(0)[: len(blank.lengths)] / torch.tensor(blank.lengths, device=outputs.device)

    def scorer(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> Scorer:
        counts = np.array([(sum(row), len(row)) for row in _is_correct(records, predictions)])

        def score(rows: NDArray[np.int64]) -> dict[str, float]:
            correct, blanks = counts[rows].sum(axis=0)
            return {"accuracy": float(correct / blanks)}

        return score

    def intervals(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> dict[str, Interval]:
        """Return intervals for a new sample of articles: the blanks of one are not independent."""
        is_correct = _is_correct(records, predictions)
        articles = [number for number, found in enumerate(is_correct) for _ in found]
        return {"accuracy": accuracy_interval([each for found in is_correct for each in found], articles)}

    def breakdowns(
        self, records: Sequence[Record], predictions: Sequence[Prediction]
    ) -> dict[str, list[dict[str, Any]]]:
        """Return accuracy by article, and by the position of a blank in its article."""
        is_correct = _is_correct(records, predictions)
        most = max(map(len, is_correct))
        positions = [[found[place] for found in is_correct if len(found) > place] for place in range(most)]
        return {
            "accuracy_by_article": [
                _accuracy_row("row", record.row, found) for record, found in zip(records, is_correct, strict=True)
            ],
            "accuracy_by_blank": [_accuracy_row("blank", number, found) for number, found in enumerate(positions, 1)],
        }

    def is_collapsed(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> bool:
        """Return whether no blank has a best option, or all have the same letter although the right ones differ."""
        is_tied = [has_tie(blank) for prediction in predictions for blank in prediction["probabilities"]]
        answers = [letter for prediction in predictions for letter in prediction["answers"]]
        targets = [letter for record in records for letter in record.values["answers"]]
        return all(is_tied) or is_constant(answers, targets)

    def classified(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> Classified:
        """Return labels and probabilities of each blank."""
        targets = [answer for record in records for answer in self._parse(record)[2] or []]
        blanks = [{"probabilities": row} for prediction in predictions for row in prediction["probabilities"]]
        is_correct = np.concatenate(_is_correct(records, predictions))
        return Classified(np.array(targets), pad_probabilities(blanks), is_correct)

    def calibrate(self, prediction: Prediction, temperature: float) -> Prediction:
        scaled = [scale(np.array(row), temperature).tolist() for row in prediction["probabilities"]]
        return {**prediction, "probabilities": scaled}

    def rows(self, record: Record, prediction: Prediction) -> list[tuple[Mapping[str, Any], Prediction]]:
        """Return a row for each blank, with the text around it."""
        segments, options, _ = self._parse(record)
        answers = record.values.get("answers")
        return [
            (
                {"blank": index + 1, "text": _excerpt(segments, index), "options": options[index]}
                | ({} if answers is None else {"answers": answers[index]}),
                {"answers": answer, "probabilities": probabilities},
            )
            for index, (answer, probabilities) in enumerate(
                zip(prediction["answers"], prediction["probabilities"], strict=True)
            )
        ]


def _option_ids(
    segments: Sequence[str], options: Sequence[Sequence[str]], encoder: Encoder
) -> Iterator[list[list[int]]]:
    """Yield the tokens of each blank's options, encoded with the space before the blank, if there is one.

    Byte-level BPE and SentencePiece would otherwise add a token for a space, as after a quotation mark or in Chinese.
    """
    for number, (before, row) in enumerate(zip(segments[:-1], options, strict=True)):
        if before[-1:].isspace():
            yield encoder.ids_of_texts([f" {option}" for option in row])
        elif number or before:
            yield encoder.ids_of_continuations(row)
        else:
            yield encoder.ids_of_texts(row)


def _excerpt(segments: Sequence[str], blank: int) -> str:
    """Return the text around a blank, which is longer than other blanks in it."""
    before, after = (_BLANK.join(part) for part in (segments[: blank + 1], segments[blank + 1 :]))
    return " ".join(f"{before[-_EXCERPT:]}{3 * _BLANK}{after[:_EXCERPT]}".split())


def _mask_id(encoder: Encoder) -> int:
    mask_id: int | None = encoder.tokenizer.mask_token_id
    if mask_id is None:
        raise UserError("a cloze task that masks blanks needs a tokenizer with a mask token")
    return mask_id


def _is_correct(records: Sequence[Record], predictions: Sequence[Prediction]) -> list[list[bool]]:
    """Return whether each blank of each article is filled correctly."""
    return [
        [
            target == found and not has_tie(probabilities)
            for target, found, probabilities in zip(
                record.values["answers"], prediction["answers"], prediction["probabilities"], strict=True
            )
        ]
        for record, prediction in zip(records, predictions, strict=True)
    ]


def _accuracy_row(name: str, number: int, is_correct: Sequence[bool]) -> dict[str, Any]:
    accuracy = float(np.mean(is_correct))
    low, high = wilson_interval(accuracy, len(is_correct))
    return {name: number, "blanks": len(is_correct), "accuracy": accuracy, "low": low, "high": high}


def _surroundings(
    segments: Sequence[list[int]], fillings: Sequence[list[int]], blank: int, context: Context, size: int
) -> list[_Surroundings]:
    """Return the context around a blank, once for each sequence that shows it. At most `size` tokens each.

    segments: the tokens between the blanks of an article, one list more than blanks. fillings: the tokens in each
    blank; `blank` itself does not count. context: "article" gives all windows over the article that show
    tokens on both sides of the blank, "around" one that is cut around it, "between" the text between the neighbouring
    blanks.
    """
    before, after = segments[blank], segments[blank + 1]
    if context != "between":
        parts = [part for pair in zip(segments, fillings, strict=False) for part in pair]
        before = list(chain(*parts[: 2 * blank + 1]))
        after = list(chain(*parts[2 * blank + 2 :], segments[-1]))
    position, length = len(before), len(before) + len(after)
    if context == "article":
        shown = [window for window in windows(length, size) if _shows(window, position, length)]
    else:
        shown = [window_around(position, length, size)]
    cut = 0 if context == "article" else length - len(shown[0])
    return [_Surroundings(before[window.start :], after[: window.stop - position], cut) for window in shown]


def _shows(window: range, position: int, length: int) -> bool:
    """Return whether a window shows tokens before and after a position, if there are any."""
    return (window.start < position or window.start == 0) and (window.stop > position or window.stop == length)
