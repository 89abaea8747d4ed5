"""Token classification: a tag for each word of a sentence, such as the names in it."""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import regex
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from experiment.errors import UserError
from experiment.formatting import shorten
from experiment.unspaced_scripts import UNSPACED
from finetune.data.columns import Columns, TagsColumn, WordsColumn
from finetune.data.records import Record, Table
from finetune.data.task_config import TaskConfig
from finetune.encoding.encoder import Encoder, most_context, windows
from finetune.encoding.examples import Batch, Example, padding_last
from finetune.kinds.classification import balanced_weights, weighted_cross_entropy
from finetune.scores.calibration import confidence_losses
from finetune.scores.metrics import (
    LabelScores,
    entity_counts,
    entity_label_scores,
    entity_scores,
    entity_tags,
    is_constant,
)
from finetune.task_kind import Loss, LossOptions, Prediction, Scorer, TaskKind

_NO_TAG = -100  # target of a token that carries none, which cross-entropy ignores
_UNDIVIDED = regex.compile(f"[{UNSPACED} ]")
_SHOWN = 5  # words in a message
_LONGEST_LIST = 250  # characters, of tags in a message


class TokenClassificationColumns(Columns):
    """Columns of a token classification task."""

    words: WordsColumn = "tokens"
    """Column with the words: a JSON list, or text with spaces between them."""

    tags: TagsColumn = "tags"
    """Column with a tag for each word, in the same way."""


class Config(TaskConfig):
    """A tag for each word of a sentence."""

    kind: Literal["token_classification"] = "token_classification"
    columns: TokenClassificationColumns = TokenClassificationColumns()
    metric: Literal["f1", "precision", "recall", "accuracy"] = "f1"


# The first token of a word carries its tag. The pipeline splits a text into words as the tokenizer does.
_USAGE = """
from transformers import AutoTokenizer, pipeline

$model
tokenizer = AutoTokenizer.from_pretrained(model, model_max_length=$length)
windows = {"tokenizer": tokenizer, "stride": $overlap, "aggregation_strategy": "first"}
tagger = pipeline("token-classification", model=model, **windows)
print(tagger("A sentence."))
"""


@dataclass(frozen=True)
class _Tagged:
    """The words that get their tag from a sequence."""

    words: tuple[int, ...]  # by index in the sentence
    positions: tuple[int, ...]  # of the first token of each, in the sequence


class Kind(TaskKind[Config]):
    """A prediction has `tags`, one for each word, and `scores`, their probabilities. The first token of a word carries
    its tag.

    A sentence that is too long for one sequence is cut into windows; a word gets its tag from the window that shows
    most of its context.
    """

    config_type = Config
    answer = "tags"
    auto_model = "AutoModelForTokenClassification"
    hub_task = "token-classification"
    usage = _USAGE
    smooths_labels = True
    weights_labels = True

    @classmethod
    def find_labels(cls, config: Config, train: Table) -> tuple[str, ...]:
        """Return the tags of the training split, sorted."""
        labels = sorted({tag for record in train.records for tag in record.values["tags"]})
        if len(labels) < 2:
            found = f"every word has the tag '{labels[0]}'" if labels else "no words"
            raise UserError(f"{train.path}: {found}; expected two or more tags")
        return tuple(labels)

    def describe(self, train: Table) -> list[str]:
        counts = Counter(tag for record in train.records for tag in record.values["tags"])
        total = counts.total()
        single = ", ".join(label for label, tag in entity_tags(self.labels).items() if tag == f"B-{label}")
        return [
            f"{total:,} words in train, {len(self.labels):,} tags: {self.describe_shares(counts, total)}",
            *([f"scored as entities of one word: {shorten(single, _LONGEST_LIST)}"] if single else []),
        ]

    def evaluated_texts(self, record: Record) -> Iterator[str]:
        """Yield the sentence, not its words; without spaces, which divide numbers, if each word is a character and the
        script has no spaces, or the spaces are words."""
        words = record.values["words"]
        text = "".join(words)
        is_divided = any(sum(map(str.isalnum, word)) > 1 for word in words) or not _UNDIVIDED.search(text)
        yield " ".join(words) if is_divided else text

    def check_target(self, record: Record) -> None:
        self._tag_ids(record)

    def expand(self, record: Record, encoder: Encoder, training: bool) -> list[Example]:
        labels = self._tag_ids(record) if "tags" in record.values else None
        return list(_examples(record.values["words"], labels, encoder))

    def _tag_ids(self, record: Record) -> list[int]:
        """Return the tag ids. Raises UserError for an unknown tag, and for another number of tags than words."""
        words, tags = record.values["words"], record.values["tags"]
        if len(tags) != len(words):
            raise UserError(
                f"{record.place}: expected a tag for each word; words: {_counted(words)}; tags: {_counted(tags)}"
            )
        return [self.label_id(tag, record.place) for tag in tags]

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """ST ids, without the padding of the left side."""
        return pad_sequence([example.target for example in examples], batch_first=True, padding_value=_NO_TAG)

    def label_weights(self, examples: Sequence[Example]) -> tuple[float, ...]:
        """Return weights that give each tag the same share of the loss."""
        targets = torch.cat([example.target for example in examples])
        return balanced_weights(targets[targets != _NO_TAG].tolist(), len(self.labels))

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """STC scores of the tags; the padding comes last."""
        return padding_last(model(**batch.inputs).logits, batch)

    def loss(self, outputs: Tensor, batch: Batch, options: LossOptions) -> Loss:
        """Return the cross-entropy, weighted by tag; its mean is over words."""
        assert batch.targets is not None
        scores_NC = outputs[:, : batch.targets.shape[1]].flatten(0, 1)
        losses = weighted_cross_entropy(scores_NC, batch.targets.flatten(), options)
        return Loss(losses, (batch.targets != _NO_TAG).sum().float())

    def decode(self, record: Record, examples: Sequence[Example], outputs: Sequence[NDArray[np.float32]]) -> Prediction:
        tags, scores = [""] * len(record.values["words"]), [0.0] * len(record.values["words"])
        for example, scores_TC in zip(examples, outputs, strict=True):
            tagged: _Tagged = example.details
            best = torch.from_numpy(scores_TC[list(tagged.positions)]).softmax(-1).max(-1)
            for word, label, score in zip(tagged.words, best.indices.tolist(), best.values.tolist(), strict=True):
                tags[word], scores[word] = self.labels[label], score
        return {"tags": tags, "scores": scores}

    def scorer(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> Scorer:
        """Precision, recall and F1 of whole entities, over all types; accuracy of the tags."""
        targets, predicted = _sides(records, predictions)
        entities = entity_counts(targets, predicted, self.labels)
        pairs = [list(zip(*tags, strict=True)) for tags in zip(targets, predicted, strict=True)]
        tags = np.array([(sum(tag == other for tag, other in sentence), len(sentence)) for sentence in pairs])

        def score(rows: NDArray[np.int64]) -> dict[str, float]:
            correct, count = tags[rows].sum(axis=0)
            return {**entity_scores(*entities[rows].sum(axis=0)), "accuracy": float(correct / max(count, 1))}

        return score

    def is_collapsed(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> bool:
        """Return whether all words get the same tag."""
        tags = [tag for prediction in predictions for tag in prediction["tags"]]
        return is_constant(tags, [tag for record in records for tag in record.values["tags"]])

    def losses(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> NDArray[np.float64]:
        """Return, for the worst word of each sentence, the cross-entropy of its tag being right or not.

        Sentences are ranked as in Wang and Mueller (2022, "Detecting Label Errors in Token Classification Data").
        """
        losses = []
        for record, prediction in zip(records, predictions, strict=True):
            pairs = zip(record.values["tags"], prediction["tags"], strict=True)
            is_correct = [float(tag == predicted) for tag, predicted in pairs]
            losses.append(confidence_losses(prediction["scores"], is_correct).max(initial=0.0))
        return np.array(losses)

    def label_pairs(
        self, records: Sequence[Record], predictions: Sequence[Prediction]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        targets, predicted = (
            np.array([self.label_ids[tag] for tags in side for tag in tags], dtype=int)
            for side in _sides(records, predictions)
        )
        return targets, predicted

    def label_scores(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> LabelScores:
        """Return the scores of each type of entities; an entity is right as a whole or not at all."""
        return entity_label_scores(*_sides(records, predictions), self.labels)


def _sides(
    records: Sequence[Record], predictions: Sequence[Prediction]
) -> tuple[list[Sequence[str]], list[Sequence[str]]]:
    """Return the tags of each sentence, and the predicted ones."""
    return [record.values["tags"] for record in records], [prediction["tags"] for prediction in predictions]


def _examples(words: Sequence[str], labels: Sequence[int] | None, encoder: Encoder) -> Iterator[Example]:
    """Yield an example for each window over the sentence; each word is tagged in one of them."""
    room = encoder.room()
    longest = max(room // 3, 1)  # tokens of a word: any such word lies whole in a window
    pieces = encoder.ids_of_words(words)
    starts = np.cumsum([0, *(len(piece[:longest]) for piece in pieces)]).tolist()
    ids = [token for piece in pieces for token in piece[:longest]]
    whole = [_whole_words(window, starts) for window in windows(len(ids), room)]
    for window, tagged in zip(whole, _tagged_words(whole, starts), strict=True):
        if tagged:
            tokens = encoder.assemble(ids[window.start : window.stop])
            first = encoder.starts(len(window))[0]
            positions = [first + starts[word] - window.start for word in tagged]
            target = None
            if labels is not None:
                target = torch.full((len(tokens),), _NO_TAG)
                target[positions] = torch.tensor([labels[word] for word in tagged])
            yield Example((tokens,), target, _Tagged(tuple(tagged), tuple(positions)))


def _whole_words(window: range, starts: Sequence[int]) -> range:
    """Return the part of a window of tokens that consists of whole words. starts: of the words, and the end."""
    return range(starts[bisect_left(starts, window.start)], starts[bisect_right(starts, window.stop) - 1])


def _tagged_words(whole: Sequence[range], starts: Sequence[int]) -> list[list[int]]:
    """Return the words that each window tags, by index. starts: of the words, and the end."""
    tagged: list[list[int]] = [[] for _ in whole]
    firsts, stops = [window.start for window in whole], [window.stop for window in whole]
    for word, start in enumerate(starts[:-1]):
        first = bisect_right(stops, start)  # of the few windows that show the word
        shown = whole[first : bisect_right(firsts, start)]
        tagged[first + most_context(shown, start)].append(word)
    return tagged


def _counted(texts: Sequence[str]) -> str:
    return f"{len(texts)} ({', '.join(texts[:_SHOWN])}{', …' if len(texts) > _SHOWN else ''})"
