"""Embedding: a vector for a text, close to the vectors of similar texts, or of documents that answer a query."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from experiment.errors import UserError, user_errors_in
from experiment.models.model_names import local_model
from finetune.data.columns import ContextColumn, NegativesColumn, PairedColumn, ScoreColumn, TextColumns
from finetune.data.records import Record, Table
from finetune.data.task_config import TaskConfig
from finetune.encoding.encoder import Encoder, TextOrPair
from finetune.encoding.examples import Batch, Example
from finetune.pooling import Pooling, declared_pooling, hidden_states, pool
from finetune.scores.metrics import Vectors, correlation, document_ranks, ndcg, potentials
from finetune.task_kind import Loss, LossOptions, Prediction, Scorer, TaskKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DECIMALS = 8  # of the numbers of a vector: as precise as fp32, in half the characters
_SIMILAR = 0.8  # of the range of scores: pairs above it are similar (Gao et al. 2021, SimCSE, for STS-B)
_COLLAPSED = 0.99  # mean potential; vectors have a cosine of 0.9975

# Shape suffixes: N examples, S sequences, M candidates, D hidden.


class EmbeddingColumns(TextColumns):
    """Columns of an embedding task. Only `text` is needed to predict."""

    text: ContextColumn = "sentence1"
    """Column with a text, or a query."""

    text_pair: PairedColumn = "sentence2"
    """Column with a similar text, or a document that answers the query; with `score`, with any other text."""

    negative: NegativesColumn | None = None
    """Column with a text that is not similar (a hard negative), or with a JSON list of them; or a list of columns. Not
    all splits need it."""

    score: ScoreColumn | None = None
    """Column with a number that says how similar the two texts are. A split without it has pairs of similar texts."""


class Config(TaskConfig):
    """A vector for a text, trained with pairs of similar texts or with scored pairs."""

    has_labels = False

    kind: Literal["embedding"] = "embedding"
    columns: EmbeddingColumns = EmbeddingColumns()
    metric: Literal["spearman", "mrr", "ndcg@10", "alignment", "uniformity"] = "spearman"

    pooling: Pooling | None = None
    """The mean over the hidden states of all tokens, or the hidden state of the first one, such as [CLS]. null: that of
    the model, if it is one of sentence-transformers, otherwise `mean`."""

    normalize: bool = True
    """Whether to scale vectors to length 1. Training compares cosines either way."""

    scale: PositiveFloat = 20.0
    """Factor of cosines in the loss: the inverse of the temperature."""

    dimensions: tuple[PositiveInt, ...] = ()
    """Smaller sizes that vectors can be cut to: their first components are trained, too (Matryoshka)."""

    def for_model(self, model: str, earlier: Mapping[str, Any]) -> Self:
        if (pooling := self.pooling or earlier.get("task.pooling")) is None:
            with user_errors_in("task.pooling is not set"):
                pooling = declared_pooling(local_model(model, modules=True)) or "mean"
        return self.model_copy(update={"pooling": pooling})


_USAGE = """
from sentence_transformers import SentenceTransformer

$model
encoder = SentenceTransformer(model)
print(encoder.encode(["A text."]).tolist())
"""


class Kind(TaskKind[Config]):
    """A prediction has `embedding`; for a record with a pair, also `similarity`, the cosine of the two vectors, and
    `others`, the vectors of its other texts, all as arrays until a row is written."""

    config_type = Config
    lower_is_better = ("alignment", "uniformity")
    answer = "embedding"
    compares_examples = True
    auto_model = "AutoModel"
    hub_task = "sentence-similarity"
    library = "sentence-transformers"
    usage = _USAGE

    @property
    def embedding(self) -> tuple[Pooling, bool]:
        return self.config.pooling or "mean", self.config.normalize

    def describe(self, train: Table) -> list[str]:
        scores = [score for record in train.records if (score := _score(record)) is not None]
        if scores:
            return [f"scores in train: {min(scores):g} to {max(scores):g}, mean {np.mean(scores):.3g}; loss: CoSENT"]
        negatives = sum(len(record.values.get("negative", ())) for record in train.records)
        return [f"pairs in train have no scores; {negatives:,} hard negatives; loss: in-batch negatives"]

    def check_target(self, record: Record) -> None:
        metric, scored = self.config.metric, _score(record) is not None
        if metric == "spearman" and not scored:
            raise UserError(
                f"{record.place}: no score, which task.metric: {metric} needs; name its column in task.columns.score, "
                "or set task.metric: mrr"
            )
        if metric in ("mrr", "ndcg@10") and scored:
            raise UserError(f"{record.place}: pairs with scores have no {metric}; set task.metric: spearman")

    def encoded_texts(self, record: Record) -> list[TextOrPair]:
        return [(text, None) for text in (record.values["text"], *_others(record))]

    def expand(self, record: Record, encoder: Encoder, training: bool) -> list[Example]:
        text, others = record.values["text"], _others(record)
        if others and not training:
            self.check_target(record)
        target = _score(record) if _score(record) is not None else others or None
        return [Example(tuple(map(encoder.encode, [text, *others])), target, details=text)]

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """Return N scores; or, of pairs without scores, NM: whether a candidate is no negative, because it is the text
        itself, another document of it, or the same as its own. The candidates are the N documents, then all
        negatives."""
        if isinstance(examples[0].target, float):
            return torch.tensor([example.target for example in examples])
        documents: dict[str, set[str]] = {}
        for example in examples:
            documents.setdefault(example.details, {example.details}).add(example.target[0])
        candidates = [example.target[0] for example in examples]
        candidates += [negative for example in examples for negative in example.target[1:]]
        places: dict[str, list[int]] = {}
        for place, candidate in enumerate(candidates):
            places.setdefault(candidate, []).append(place)
        same = torch.zeros(len(examples), len(candidates), dtype=torch.bool)
        for row, example in zip(same, examples, strict=True):
            row[[place for text in documents[example.details] for place in places.get(text, ())]] = True
        return same.fill_diagonal_(False)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute SD vectors."""
        hidden_STD = hidden_states(cast(nn.Module, model.base_model), batch.inputs)
        if (largest := max(self.config.dimensions, default=0)) > hidden_STD.shape[-1]:
            raise UserError(f"task.dimensions: {largest} is more than the model has: {hidden_STD.shape[-1]}")
        vectors_SD = pool(hidden_STD, batch.inputs["attention_mask"], self.embedding[0])
        return F.normalize(vectors_SD, dim=-1) if self.config.normalize else vectors_SD

    def loss(self, outputs: Tensor, batch: Batch, options: LossOptions) -> Loss:
        """Sum over all dimensions the loss of in-batch negatives, or CoSENT for scored pairs (Kusupati et al. 2022,
        "Matryoshka Representation Learning")."""
        assert batch.targets is not None
        counts = np.array([len(example.sequences) for example in batch.examples])
        first = counts.cumsum() - counts
        negatives = np.setdiff1d(np.arange(len(outputs)), [first, first + 1])
        compute = cosent_loss if batch.targets.is_floating_point() else in_batch_negatives_loss
        losses = []
        for size in {*self.config.dimensions, outputs.shape[-1]}:
            vectors_SD = F.normalize(outputs[:, :size], dim=-1)
            candidates_MD = vectors_SD[np.concatenate([first + 1, negatives])]
            losses.append(compute(vectors_SD[first], candidates_MD, batch.targets, self.config.scale))
        return Loss.of(torch.stack(losses).sum() * len(counts), len(counts))

    def decode(self, record: Record, examples: Sequence[Example], outputs: Sequence[NDArray[np.float32]]) -> Prediction:
        if len(outputs) == 1:
            return {"embedding": _numbers(outputs[0])}
        similarity = float(_unit(outputs[0].astype(float)) @ _unit(outputs[1].astype(float)))
        # The vectors of a whole split are kept for `relate`: as lists they would take 10 times the memory.
        return {"embedding": outputs[0], "similarity": similarity, "others": outputs[1:]}

    def relate(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> Sequence[Prediction]:
        """Return numbers in place of vectors, see `_relate`; `dimensions` has the numbers of smaller vectors."""
        sizes = self.config.dimensions
        rows, *smaller = (_relate(records, predictions, size) for size in (None, *sizes))
        if not sizes:
            return rows
        return [
            {**row, "dimensions": dict(zip(map(str, sizes), cut, strict=True))}
            for row, *cut in zip(rows, *smaller, strict=True)
        ]

    def scorer(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> Scorer:
        """Score vectors. With scores: Spearman's correlation of cosine and score, 0 if undefined. Without: mean
        reciprocal rank of the first of each text's documents among all `text_pair` and `negative` of the records, but
        the text itself only if it is one of its documents, and nDCG@10.

        alignment: mean squared distance of similar pairs, and uniformity, both of unit vectors (Wang and Isola 2020).
        """
        similarity = np.array([prediction["similarity"] for prediction in predictions])
        scores = np.array([_score(record) for record in records], dtype=float)
        ranked = {"mrr": "reciprocal_rank", "ndcg@10": "ndcg@10"} if "rank" in predictions[0] else {}
        means = {metric: _mean(predictions, name) for metric, name in ranked.items()}
        potential = _mean(predictions, "potential")

        def score(rows: NDArray[np.int64]) -> dict[str, float]:
            similar = similarity[rows]
            found = {metric: mean(rows) for metric, mean in means.items()}
            if not ranked:
                drawn = scores[rows]
                found = {"spearman": correlation("spearman", drawn, similar)}
                similar = similar[drawn >= drawn.min() + _SIMILAR * np.ptp(drawn)]
            alignment = float(np.mean(2 - 2 * similar))
            return {**found, "alignment": alignment, "uniformity": math.log(potential(rows))}

        return score

    def breakdowns(
        self, records: Sequence[Record], predictions: Sequence[Prediction]
    ) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """Return the scores of vectors cut to each of `dimensions`."""
        rows = []
        for size in self.config.dimensions:
            cut = [prediction["dimensions"][str(size)] for prediction in predictions]
            rows.append({"dimension": size, **self.scores(records, cut)})
        return {"dimensions": rows} if rows else {}

    def is_collapsed(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> bool:
        """Return whether all texts have nearly the same vector; False for a single text."""
        texts = {record.values["text"] for record in records}
        return len(texts) > 1 and self.scores(records, predictions)["uniformity"] > math.log(_COLLAPSED)

    def rows(self, record: Record, prediction: Prediction) -> Sequence[tuple[Mapping[str, Any], Prediction]]:
        shown = {key: value for key, value in prediction.items() if key not in ("others", "dimensions")}
        if "embedding" in shown:
            shown["embedding"] = _numbers(shown["embedding"])
        return [(record.values, shown)]

    def losses(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> NDArray[np.float64]:
        """Return the distance between the ranks of similarity and score, as a share of the rows; without scores,
        1 − 1 / rank of the document."""
        if "rank" in predictions[0]:
            return np.array([1 - 1 / prediction["rank"] for prediction in predictions])
        from scipy.stats import rankdata

        similarity = [prediction["similarity"] for prediction in predictions]
        distances = np.abs(rankdata(similarity) - rankdata([_score(record) for record in records]))
        return np.asarray(distances / len(records))

    def library_files(self, model: "PreTrainedModel", max_seq_length: int) -> Mapping[str, Any]:
        steps = {"Transformer": "", "Pooling": "1_Pooling"} | (
            {"Normalize": "2_Normalize"} if self.config.normalize else {}
        )
        return {
            "modules.json": [
                {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{step}"}
                for number, (step, path) in enumerate(steps.items())
            ],
            "sentence_bert_config.json": {"max_seq_length": max_seq_length, "do_lower_case": False},
            "1_Pooling/config.json": {
                "word_embedding_dimension": model.config.get_text_config().hidden_size,
                "pooling_mode_cls_token": self.embedding[0] == "cls",
                "pooling_mode_mean_tokens": self.embedding[0] == "mean",
            },
        }


def in_batch_negatives_loss(texts_ND: Tensor, candidates_MD: Tensor, excluded_NM: Tensor, scale: float) -> Tensor:
    """Return the cross-entropy of a text's own document, which has the number of the text, among all candidates
    (Henderson et al. 2017, "Efficient Natural Language Response Suggestion for Smart Reply"). Vectors are unit vectors.

    excluded_NM: candidates that do not count for a text.
    """
    scores_NM = scale * texts_ND @ candidates_MD.T
    return F.cross_entropy(
        scores_NM.masked_fill(excluded_NM, -math.inf), torch.arange(len(scores_NM), device=scores_NM.device)
    )


def cosent_loss(texts_ND: Tensor, others_ND: Tensor, scores_N: Tensor, scale: float) -> Tensor:
    """Compute log(1 + Σ exp(scale · (cosine of i − cosine of j))) over all pairs i, j of which j has the higher score
    (Huang et al. 2024, "CoSENT: Consistent Sentence Embedding via Similarity Ranking"). Vectors are unit vectors."""
    cosines_N = scale * (texts_ND * others_ND).sum(dim=1)
    differences_NN = cosines_N[:, None] - cosines_N
    wrong = differences_NN[scores_N[:, None] < scores_N]
    return torch.cat([wrong.new_zeros(1), wrong]).logsumexp(dim=0)


def _score(record: Record) -> float | None:
    score: float | None = record.values.get("score")
    return score


def _others(record: Record) -> list[str]:
    """Return the other text of a record, and its negatives; scored records need none."""
    if "text_pair" not in record.values:
        return []
    return [record.values["text_pair"], *(record.values.get("negative", ()) if _score(record) is None else ())]


def _numbers(vector: Vectors | list[float]) -> list[float]:
    """Return a vector as it is written."""
    numbers: list[float] = np.round(np.asarray(vector, dtype=float), _DECIMALS).tolist()
    return numbers


def _unit(vectors: Vectors) -> Vectors:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12))


def _relate(records: Sequence[Record], predictions: Sequence[Prediction], size: int | None) -> list[dict[str, Any]]:
    """Relate each record: `similarity`; without scores, `rank` of its document among all `text_pair` and `negative`.

    Of each text, with the first record that has it and None with others: `potential` (see `potentials`); without
    scores, `reciprocal_rank` of the first of its documents, and `ndcg@10`. size: of vectors; None: as they are.
    """
    texts_ND = _unit(np.array([each["embedding"][:size] for each in predictions], dtype=np.float32))
    others = [_unit(np.array(each["others"], dtype=np.float32)[:, :size]) for each in predictions]
    similarity_N = (texts_ND * np.stack([vectors[0] for vectors in others])).sum(axis=1, dtype=float)
    rows: list[dict[str, Any]] = [{"similarity": each, "potential": None} for each in similarity_N.tolist()]
    texts = [record.values["text"] for record in records]
    first = _first_places(texts)
    for number, potential in zip(first.values(), potentials(texts_ND[list(first.values())]).tolist(), strict=True):
        rows[number]["potential"] = potential
    if _score(records[0]) is not None:
        return rows
    documents = _first_places([text for record in records for text in _others(record)])
    numbers = {text: number for number, text in enumerate(documents)}
    own = [numbers[record.values["text_pair"]] for record in records]
    of_itself = {text for text, record in zip(texts, records, strict=True) if text == record.values["text_pair"]}
    itself = [
        number if text in of_itself else numbers.get(text, number) for text, number in zip(texts, own, strict=True)
    ]
    documents_MD = np.concatenate(others)[list(documents.values())]
    ranks = document_ranks(texts_ND, documents_MD, np.array(own), np.array(itself))
    by_text: dict[str, dict[int, int]] = {}
    for text, document, row, rank in zip(texts, own, rows, ranks, strict=True):
        row |= {"rank": rank, "reciprocal_rank": None, "ndcg@10": None}
        by_text.setdefault(text, {})[document] = rank
    for text, number in first.items():
        found = list(by_text[text].values())
        rows[number] |= {"reciprocal_rank": 1 / min(found), "ndcg@10": ndcg(found)}
    return rows


def _first_places(texts: Sequence[str]) -> dict[str, int]:
    places: dict[str, int] = {}
    for place, text in enumerate(texts):
        places.setdefault(text, place)
    return places


def _mean(predictions: Sequence[Prediction], name: str) -> Callable[[NDArray[np.int64]], float]:
    """Return the function that averages a number over the drawn predictions that have it. If none of them has it, which
    is possible with empty texts, it returns the average over all predictions."""
    has = np.array([prediction[name] is not None for prediction in predictions])
    values = np.array([prediction[name] for prediction in predictions], dtype=float)

    def mean(rows: NDArray[np.int64]) -> float:
        drawn = rows[has[rows]]
        return float(values[drawn if len(drawn) else has].mean())

    return mean
