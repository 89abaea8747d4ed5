"""Extractive question answering: the part of a text that answers a question."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from pydantic import PositiveInt
from torch import Tensor, nn

from experiment.errors import UserError
from experiment.formatting import counted, shorten
from finetune.data.columns import AnswersColumn, Columns, ContextColumn, TextColumn
from finetune.data.records import Record, Table
from finetune.data.task_config import TaskConfig
from finetune.encoding.encoder import Encoder, Tokens, windows
from finetune.encoding.examples import Batch, Example, padding_last
from finetune.scores.calibration import confidence_losses
from finetune.scores.metrics import answer_scores
from finetune.task_kind import Loss, LossOptions, Prediction, Scorer, TaskKind, predictor_usage

_MOST_LOST = 0.1  # share of the training questions that may be left out


class QuestionAnsweringColumns(Columns):
    """Columns of a question answering task."""

    question: TextColumn = "question"
    """Column with the question."""

    context: ContextColumn = "context"
    """Column with the text that contains the answer."""

    answers: AnswersColumn = "answers"
    """Column with the right answers, as in SQuAD: `{"text": […], "answer_start": […]}`, starts in characters. Training
    uses the first, scoring the texts of all."""


class Config(TaskConfig):
    """The part of a text that answers a question."""

    has_labels = False

    kind: Literal["question_answering"] = "question_answering"
    columns: QuestionAnsweringColumns = QuestionAnsweringColumns()
    metric: Literal["f1", "exact_match"] = "f1"

    no_answer: bool = False
    """Whether a question may have no answer, as in SQuAD 2.0."""

    max_answer_tokens: PositiveInt = 30
    """Maximum length of a predicted answer in tokens."""


@dataclass(frozen=True)
class _Window:
    """The part of a context that a sequence shows."""

    start: int  # position of its first token in the sequence
    nothing: int  # position in the sequence that stands for no answer
    offsets: NDArray[np.int32]  # T2 characters (start, end) of the context that each token covers


class _Span(NamedTuple):
    """Tokens of a window."""

    first: int
    last: int
    score: float


class Kind(TaskKind[Config]):
    """A prediction has `answer`, its `start` in characters (null for no answer), and `score`, its probability.

    A context that is too long for one sequence is cut into windows. In windows without the answer, the classification
    token is the right one, as in BERT (Devlin et al. 2019).
    """

    config_type = Config
    answer = "answer"
    auto_model = "AutoModelForQuestionAnswering"
    hub_task = "question-answering"
    usage = predictor_usage({"question": "Who wrote it?", "context": "The text that contains the answer."})

    @property
    def head(self) -> dict[str, Any]:
        return {"num_labels": 2}  # scores of the first and the last token

    @classmethod
    def find_labels(cls, config: Config, train: Table) -> tuple[str, ...]:
        """Return no labels. Raises UserError if many answers are not where they should be."""
        if len(lost := _lost(train)) > _MOST_LOST * len(train):
            answer = lost[0].values["answers"][0]
            raise UserError(
                f"{lost[0].place}: the answer '{shorten(answer['text'])}' is not at character {answer['start']} of the "
                f"context, nor exactly once elsewhere; {len(lost):,} of {len(train):,} questions in train have such an "
                "answer"
            )
        return ()

    def describe(self, train: Table) -> list[str]:
        none, lost = sum(not record.values["answers"] for record in train.records), _lost(train)
        lines = [f"{none:,} of {len(train):,} questions in train have no answer"] if self.config.no_answer else []
        if lost:
            lines.append(
                f"{counted(len(lost), 'question')} of train left out, such as {lost[0].place}: the text of the answer "
                "is not at its start, nor exactly once elsewhere in the context"
            )
        return lines

    def check_input(self, record: Record) -> None:
        if not record.values["context"].strip():
            raise UserError(f"{record.place}: the context is empty")

    def check_target(self, record: Record) -> None:
        if not record.values["answers"] and not self.config.no_answer:
            raise UserError(f"{record.place}: no answer; if questions may have none, set task.no_answer: true")

    def expand(self, record: Record, encoder: Encoder, training: bool) -> list[Example]:
        """Return the windows of the context; none if the tokenizer drops all its characters, such as U+200B, and in
        training if the place of the answer is not known."""
        self.check_input(record)
        asked = encoder.ids(record.values["question"])
        question = asked[: encoder.room(2) // 2]
        context, covered = encoder.ids_and_offsets(record.values["context"])
        if not context and training:
            raise UserError(f"{record.place}: the context is empty")
        if not context or (training and _is_lost(record)):
            return []
        offsets_N2 = np.array(covered, dtype=np.int32)
        answer = self._answer_tokens(record, offsets_N2)
        examples = []
        for shown in windows(len(context), encoder.room(2) - len(question)):
            tokens = encoder.assemble(question, context[shown.start : shown.stop], cut=len(asked) - len(question))
            start = encoder.starts(len(question), len(shown))[1]
            window = _Window(start, _classification_token(tokens, encoder), offsets_N2[shown.start : shown.stop])
            examples.append(Example((tokens,), None if answer is None else _target(window, shown, answer), window))
        return examples

    def _answer_tokens(self, record: Record, offsets_N2: NDArray[np.int32]) -> range | None:
        """Return the tokens of the context that cover the first answer; empty for no answer, or one that is not found;
        None for an unlabelled record."""
        if (answers := record.values.get("answers")) is None:
            return None
        self.check_target(record)
        if not answers or (start := _answer_start(record)) < 0:
            return range(0)
        stop = start + len(answers[0]["text"])
        covering = np.flatnonzero((offsets_N2[:, 1] > start) & (offsets_N2[:, 0] < stop))
        return range(covering[0], covering[-1] + 1) if len(covering) else range(0)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """ST2 scores of starts and ends; the padding comes last."""
        found = model(**batch.inputs)
        scores = torch.stack([found.start_logits, found.end_logits], dim=-1).float()
        padding = batch.inputs["attention_mask"] == 0
        return padding_last(scores.masked_fill(padding[..., None], torch.finfo(torch.float32).min), batch)

    def loss(self, outputs: Tensor, batch: Batch, options: LossOptions) -> Loss:
        """Return the cross-entropy of the start and of the end; its mean is over windows."""
        assert batch.targets is not None
        return Loss.of(F.cross_entropy(outputs, batch.targets, reduction="sum") / 2, len(outputs))

    def decode(self, record: Record, examples: Sequence[Example], outputs: Sequence[NDArray[np.float32]]) -> Prediction:
        if not examples:
            return {"answer": "", "start": None, "score": 1.0}
        parts: list[_Window] = [example.details for example in examples]
        shown = [scores[part.start :][: len(part.offsets)] for part, scores in zip(parts, outputs, strict=True)]
        spans = [_best_span(scores_T2, self.config.max_answer_tokens) for scores_T2 in shown]
        best = max(range(len(spans)), key=lambda index: spans[index].score)
        # There is no answer only if no window shows one.
        nothing_2 = min((scores[part.nothing] for part, scores in zip(parts, outputs, strict=True)), key=np.sum)
        least = float(nothing_2.sum())
        candidates = _best_token_scores(parts, shown)
        if self.config.no_answer:
            candidates = np.concatenate([candidates, nothing_2[None]])
        log_total = float(torch.logsumexp(torch.from_numpy(candidates), dim=0).sum())
        if self.config.no_answer and least >= spans[best].score:
            return {"answer": "", "start": None, "score": float(np.exp(least - log_total))}
        offsets_T2 = parts[best].offsets
        start, stop = int(offsets_T2[spans[best].first, 0]), int(offsets_T2[spans[best].last, 1])
        score = float(np.exp(spans[best].score - log_total))
        covered = record.values["context"][start:stop]
        answer = covered.strip()  # a token of a byte-level tokenizer begins with the space before it
        return {"answer": answer, "start": start + covered.index(answer), "score": score}

    def scorer(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> Scorer:
        """Means over the questions, in [0, 1]. Each answer is compared with the right one that fits best."""
        f1, exact = _answer_metrics(records, predictions)
        return lambda rows: {"f1": float(f1[rows].mean()), "exact_match": float(exact[rows].mean())}

    def losses(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> NDArray[np.float64]:
        """Return the cross-entropy of an answer's probability with its F1 as the target: wrong answers that the model
        is sure of are the worst."""
        f1, _ = _answer_metrics(records, predictions)
        return confidence_losses([prediction["score"] for prediction in predictions], f1)


def _answer_start(record: Record) -> int:
    """Return the character at which the first answer starts: the given one, or else that of the only place of its text;
    -1 if its text has several places or none."""
    context, answer = record.values["context"], record.values["answers"][0]
    text, start = answer["text"], int(answer["start"])
    if start >= 0 and context.startswith(text, start):
        return start
    first: int = context.find(text)
    return first if first == context.rfind(text) else -1


def _is_lost(record: Record) -> bool:
    """Return whether a record has an answer whose place is not known."""
    return bool(record.values.get("answers")) and _answer_start(record) < 0


def _lost(train: Table) -> list[Record]:
    return [record for record in train.records if _is_lost(record)]


def _answer_metrics(records: Sequence[Record], predictions: Sequence[Prediction]) -> NDArray[np.float64]:
    """2N F1 and exact match of each answer, with the right one that fits best."""
    best = []
    for record, prediction in zip(records, predictions, strict=True):
        targets = [answer["text"] for answer in record.values["answers"]] or [""]
        best.append(np.max([answer_scores(prediction["answer"], target) for target in targets], axis=0))
    return np.array(best).T


def _classification_token(tokens: Tokens, encoder: Encoder) -> int:
    """Return the position of the token, which stands for no answer; 0 for a tokenizer that has none."""
    ids = tokens.input_ids.tolist()
    wanted = encoder.tokenizer.cls_token_id
    return ids.index(wanted) if wanted in ids else 0


def _target(window: _Window, shown: range, answer: range) -> list[int]:
    """Return the position of the first and of the last token of the answer; of no answer if the window does not show
    all of it."""
    if not answer or answer.start < shown.start or answer.stop > shown.stop:
        return [window.nothing, window.nothing]
    return [window.start + answer.start - shown.start, window.start + answer.stop - 1 - shown.start]


def _best_token_scores(parts: Sequence[_Window], shown: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """T2 start and end scores of the tokens of a context, each from the window that gives it the highest."""
    if len(shown) == 1:
        return shown[0]
    places = np.concatenate([part.offsets for part in parts])
    tokens, numbers = np.unique(places, axis=0, return_inverse=True)
    best = np.full((len(tokens), 2), -np.inf, dtype=np.float32)
    np.maximum.at(best, numbers.ravel(), np.concatenate(shown))
    return best


def _best_span(scores_T2: NDArray[np.float32], max_tokens: int) -> _Span:
    """Return the span of at most max_tokens tokens with the largest sum of start and end score."""
    most = min(max_tokens, len(scores_T2))
    ends = np.pad(scores_T2[:, 1], (0, most - 1), constant_values=-np.inf)
    sums_TM = scores_T2[:, :1] + sliding_window_view(ends, most)  # M: how many tokens follow the first one
    first, more = np.unravel_index(sums_TM.argmax(), sums_TM.shape)
    return _Span(int(first), int(first + more), float(sums_TM[first, more]))
