"""Metrics of predictions: pure functions."""

import re
import statistics
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_CONSTANT = 0.01  # numbers whose spread is below this share of the targets' are constant
_NDCG_CUTOFF = 10
# Chinese and Japanese, which have no spaces between words, with their punctuation and full-width forms.
_CJK = re.compile("[\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ROWS = 256  # of a matrix of similarities that are computed at once
_ROUNDING = 1e-6  # of a product of unit vectors that were computed in fp32; in bf16 they differ by more
# Prefix of a tag -> the one of IOBES: M of BMES is I, L and U of BILOU are E and S.
_LETTERS = {"B": "B", "I": "I", "E": "E", "S": "S", "M": "I", "L": "E", "U": "S"}
# Of tags that are not written as B-X: b-X and B_X; X-B and X_B.
_SPELLINGS = (
    re.compile("(?P<letter>[BIESMLU])[-_](?P<type>.+)", re.IGNORECASE),
    re.compile("(?P<type>.+)[-_](?P<letter>[BIESMLU])", re.IGNORECASE),
)

# Shape suffixes: C labels; N texts or queries, M documents, R rows of a part, D hidden.

LabelIds = NDArray[np.int64]  # N

Vectors = NDArray[np.float32]
"""Vectors of length 1, so that products are cosines."""

Number = int | float  # pydantic would turn whole numbers into floats if the type were float

LabelScores = Mapping[str, Mapping[str, Number]]
"""Label -> precision, recall, f1 and support (how often it occurs)."""

Tags = Sequence[Sequence[str]]  # of the words of each sentence


def classification_scores(targets: LabelIds, predicted: LabelIds) -> dict[str, float]:
    """Compute all classification metrics, each in [0, 1] except matthews in [-1, 1].

    F1 is averaged over the labels that occur in either array, as scikit-learn does by default; uar, the unweighted
    average recall (balanced accuracy), over the labels in `targets`. matthews is the correlation coefficient of
    Matthews (1975), extended to more than two labels by Gorodkin (2004); 0 if undefined.
    """
    labels, rows = max(targets.max(), predicted.max()) + 1, len(targets)
    ids = targets[targets == predicted], targets, predicted
    correct, support, found = (np.bincount(each, minlength=labels).astype(float) for each in ids)
    f1 = f1_of_counts(correct, support, found)
    spread = (rows**2 - found @ found) * (rows**2 - support @ support)
    return {
        "accuracy": float(correct.sum() / rows),
        "macro_f1": float(f1[support + found > 0].mean()),
        "weighted_f1": float(f1 @ support / rows),
        "uar": float((correct[support > 0] / support[support > 0]).mean()),
        "matthews": float((rows * correct.sum() - found @ support) / np.sqrt(spread)) if spread else 0.0,
    }


def f1_of_counts(correct: Any, support: Any, predicted: Any) -> Any:
    """Return F1 of counts as in `scores_of_counts`, of one label or of an array of them."""
    return 2 * correct / np.maximum(support + predicted, 1)


def confusion_matrix(targets: LabelIds, predicted: LabelIds, label_count: int) -> NDArray[np.int64]:
    """Return counts CC: rows by label, columns by predicted label."""
    return np.bincount(targets * label_count + predicted, minlength=label_count**2).reshape(label_count, label_count)


def correlation(name: Literal["pearson", "spearman"], first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Return the correlation coefficient of Pearson or Spearman of N pairs of numbers, in [-1, 1].

    It is 0 if undefined: if all numbers of one side are the same.
    """
    from scipy.stats import pearsonr, spearmanr  # takes half a second

    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.nan_to_num({"pearson": pearsonr, "spearman": spearmanr}[name](first, second).statistic))


def summarize(values: Sequence[float]) -> dict[str, list[float] | float | None]:
    """Return a metric over the seeds: values, mean, sample standard deviation (None for a single seed) and median."""
    return {
        "values": list(values),
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "median": statistics.median(values),
    }


def label_scores(targets: LabelIds, predicted: LabelIds, labels: Sequence[str]) -> LabelScores:
    """Return the scores of labels of which each record has one."""
    ids = targets[targets == predicted], targets, predicted
    return scores_of_counts(labels, *(np.bincount(each, minlength=len(labels)) for each in ids))


def scores_of_counts(
    labels: Sequence[str], correct: NDArray[np.int64], support: NDArray[np.int64], predicted: NDArray[np.int64]
) -> LabelScores:
    """C counts of each label: how often it is predicted and correct, occurs, and is predicted. A score of nothing is
    0, as in scikit-learn."""
    precision, recall = correct / np.maximum(predicted, 1), correct / np.maximum(support, 1)
    f1 = f1_of_counts(correct, support, predicted)
    columns = {"precision": precision, "recall": recall, "f1": f1, "support": support}
    return {label: {name: values[at].item() for name, values in columns.items()} for at, label in enumerate(labels)}


def top_confusions(
    pairs: NDArray[np.int64], counts: NDArray[np.int64], labels: Sequence[str], count: int = 10
) -> list[dict[str, Any]]:
    """Return the most frequent mistakes, as {label, predicted, count, share}. share: of the label's records.

    pairs: C · label + predicted label, sorted. counts: how often each pair occurs.
    """
    targets, predicted = np.divmod(pairs, len(labels))
    shares = counts / np.bincount(targets, counts)[targets]
    wrong = np.flatnonzero(targets != predicted)
    top = wrong[np.argsort(-counts[wrong], kind="stable")[:count]]
    found = zip(*(each[top].tolist() for each in (targets, predicted, counts, shares)), strict=True)
    return [{"label": labels[a], "predicted": labels[b], "count": n, "share": share} for a, b, n, share in found]


def is_constant(answers: Sequence[Any], targets: Sequence[Any]) -> bool:
    """Return whether all answers are the same although the targets differ. For numbers: whether their spread is near
    zero.

    Such a model has collapsed. Fine-tuning on little data ends this way for some seeds (Devlin et al. 2019; Mosbach et
    al. 2021, "On the Stability of Fine-tuning BERT"), and the mean over the seeds then says little.
    """
    if all(isinstance(value, float) for value in (*answers, *targets)):
        return bool(statistics.pstdev(answers) < _CONSTANT * statistics.pstdev(targets))
    return all(answer == answers[0] for answer in answers) and any(target != targets[0] for target in targets)


def entity_counts(targets: Tags, predicted: Tags, labels: Sequence[str]) -> NDArray[np.int64]:
    """Return N3 counts of the entities of each sentence, of all types, as conlleval of CoNLL-2000 counts them: those
    that are found, those that it has, and those that are predicted."""
    expected, found = _entities(targets, labels), _entities(predicted, labels)
    ends = np.cumsum([len(tags) + 1 for tags in targets])  # seqeval counts a word between sentences
    sides = expected & found, expected, found
    sentences = [np.searchsorted(ends, [first for _, first, _ in entities], side="right") for entities in sides]
    return np.stack([np.bincount(numbers, minlength=len(targets)) for numbers in sentences], axis=1)


def entity_scores(correct: int, support: int, predicted: int) -> dict[str, float]:
    """Return F1, precision and recall of whole entities (micro). Arguments: sums of `entity_counts`."""
    precision, recall = float(correct / max(predicted, 1)), float(correct / max(support, 1))
    return {"f1": 2 * precision * recall / ((precision + recall) or 1.0), "precision": precision, "recall": recall}


def entity_label_scores(targets: Tags, predicted: Tags, labels: Sequence[str]) -> LabelScores:
    """Return the scores of each type of entities; an entity is right as a whole or not at all."""
    expected, found = _entities(targets, labels), _entities(predicted, labels)
    types = sorted({tag[2:] for tag in entity_tags(labels).values() if tag != "O"})
    counts = [Counter(entity[0] for entity in entities) for entities in (expected & found, expected, found)]
    return scores_of_counts(types, *(np.array([count[name] for name in types]) for count in counts))


def _entities(sentences: Tags, labels: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the type of each entity, and its first and last word, counted over all sentences."""
    from seqeval.metrics.sequence_labeling import get_entities  # imports scikit-learn

    tags = entity_tags(labels)
    return set(get_entities([[tags.get(tag, f"B-{tag}") for tag in sentence] for sentence in sentences]))


def entity_tags(labels: Sequence[str]) -> dict[str, str]:
    """Return label -> the tag that seqeval reads: O, or B-, I-, E- or S- and a type.

    Tags of BMES and BILOU are translated, and so are letters alone, if no label has a type, and b-X, B_X, X-B and X_B,
    if all labels but O are written in this way, in which o is O, too. Any other label is an entity of one word.
    """
    others = [label for label in labels if label not in ("O", "o")]
    letters = {label.upper() for label in others}
    if "B" in letters and letters <= _LETTERS.keys():
        found = {label: f"{_LETTERS[label.upper()]}-entity" for label in others}
    elif not (found := _in_other_spelling(others)):
        has_prefixes = any(label.startswith("B-") for label in others)
        known = {letter for letter, prefix in _LETTERS.items() if has_prefixes or letter == prefix}
        parts = {label: label.partition("-") for label in others}
        found = {
            label: f"{_LETTERS[letter]}-{name}" if dash and letter in known else f"B-{label}"
            for label, (letter, dash, name) in parts.items()
        }
        if "o" in labels and not any(label.startswith(("B-", "I-", "E-", "S-")) for label in others):
            found["o"] = "B-o"  # a tag such as PKU's for onomatopoeia
    return dict.fromkeys(labels, "O") | found


def _in_other_spelling(labels: Sequence[str]) -> dict[str, str]:
    """Return the tags of labels that all have another spelling than B-X; empty if they have not. A type must have
    labels for its beginning and its inside, since a type such as VITAMIN-B may end like a tag."""
    if any(label.startswith(("B-", "I-", "E-", "S-")) for label in labels):
        return {}
    for spelling in _SPELLINGS:
        parts = [(part["letter"].upper(), part["type"]) for part in map(spelling.fullmatch, labels) if part]
        begun, continued = ({name for letter, name in parts if letter in letters} for letters in ("B", "IM"))
        if len(parts) == len(labels) and begun & continued:
            return {label: f"{_LETTERS[letter]}-{name}" for label, (letter, name) in zip(labels, parts, strict=True)}
    return {}


def answer_scores(found: str, target: str) -> tuple[float, float]:
    """Return F1 of the words of an answer, and 1 if they are the right ones, else 0, as the script of SQuAD (Rajpurkar
    et al. 2016) compares them: without case, punctuation and articles."""
    words, target_words = _words(found, target)
    common, exact = (Counter(words) & Counter(target_words)).total(), float(words == target_words)
    return 2 * common / (len(words) + len(target_words)) if words and target_words else exact, exact


def _words(*answers: str) -> list[list[str]]:
    """Split answers into words in lower case, without punctuation and articles. If one of them is Chinese or Japanese,
    each character in these scripts is a word, as in MLQA's script for Chinese (Lewis et al. 2020)."""
    texts = [text.lower().translate(_NO_PUNCTUATION) for text in answers]
    if not any(map(_CJK.search, answers)):
        return [re.sub(r"\b(a|an|the)\b", " ", text).split() for text in texts]
    texts = ["".join(each for each in text if unicodedata.category(each)[0] != "P") for text in texts]
    return [_CJK.sub(r" \g<0> ", text).split() for text in texts]


def document_ranks(
    queries_ND: Vectors, documents_MD: Vectors, own_N: NDArray[np.int64], left_out_N: NDArray[np.int64]
) -> list[int]:
    """Return the rank of each query's own document among all documents, from 1.

    own_N: its number. left_out_N: the number of a document that does not count, such as the query's own text; the
    query's own document always counts.

    Of documents that are equally similar, up to rounding, all have the last of their ranks, so that a model that gives
    all texts the same vector finds nothing; so does one whose vectors are not numbers.
    """
    ranks: list[int] = []
    for start in range(0, len(queries_ND), _ROWS):
        similarity_RM = queries_ND[start : start + _ROWS] @ documents_MD.T
        own_R1, other_R1 = own_N[start : start + _ROWS, None], left_out_N[start : start + _ROWS, None]
        least_R1 = np.take_along_axis(similarity_RM, own_R1, axis=1)
        found_RM = ~(similarity_RM < least_R1 - _ROUNDING)  # NaN is not smaller
        too_many_R1 = np.take_along_axis(found_RM, other_R1, axis=1) & (other_R1 != own_R1)
        ranks += (found_RM.sum(axis=1) - too_many_R1[:, 0]).tolist()
    return ranks


def ndcg(ranks: Sequence[int]) -> float:
    """Normalized discounted cumulative gain of the first 10 documents of a query (Järvelin and Kekäläinen 2002).

    ranks: of all its relevant documents, which have the same gain.
    """
    ideal = range(1, min(len(ranks), _NDCG_CUTOFF) + 1)
    return _discounted([rank for rank in ranks if rank <= _NDCG_CUTOFF]) / _discounted(ideal)


def _discounted(ranks: Sequence[int]) -> float:
    return float((1 / np.log2(1 + np.asarray(ranks))).sum())


def potentials(vectors_ND: Vectors) -> NDArray[np.float64]:
    """Return N, the mean of exp(−2 ‖x − y‖²) over the other vectors y of a vector x.

    The logarithm of their mean is the uniformity of Wang and Isola (2020), https://arxiv.org/abs/2005.10242: 0 if all
    vectors are equal, down to −4 in the limit of vectors spread over the sphere.
    """
    if len(vectors_ND) < 2:
        return np.ones(len(vectors_ND))
    sums = [
        np.exp(-4 * (1 - vectors_ND[start : start + _ROWS] @ vectors_ND.T)).sum(axis=1, dtype=np.float64)
        for start in range(0, len(vectors_ND), _ROWS)
    ]
    return np.asarray((np.concatenate(sums) - 1) / (len(vectors_ND) - 1))  # a vector's own distance is 0
