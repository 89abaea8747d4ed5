"""The demo's task: tell from one sentence of documentation which package it is about.

1. A sentence of which eight words in a row stand in another document, of whatever package, is no example: it, or the
   template it was written by, could be looked up.
2. Nor is one that names its own package.
3. A document gives at most one example, so that examples are independent, and belongs to one split.
4. The text for pretraining is the documentation of these packages but for the documents of validation and test. Those
   of train stay in it: their text may be read beforehand, their labels are never seen there.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from experiment.errors import UserError

# deepcloze itself needs these, so they are always installed. In lower case, what gives each of them away.
NAMES: Mapping[str, tuple[str, ...]] = {
    "matplotlib": ("matplotlib", "pyplot", "mpl"),
    "networkx": ("networkx", "nx."),
    "numpy": ("numpy", "np."),
    "pandas": ("pandas", "pd."),
    "python": ("python",),
    "scikit-learn": ("scikit", "sklearn"),
    "scipy": ("scipy",),
    "sympy": ("sympy",),
    "torch": ("torch",),
    "transformers": ("transformers", "hugging"),
}
EXAMPLES: Mapping[str, int] = {"train": 60, "validation": 50, "test": 150}  # of each package
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|\n")
_WORDS = range(12, 41)  # in a sentence that is an example
_MARK_WORDS = 8
_FEWEST_LETTERS = 0.85  # share of letters and spaces below which it is rather a formula

Mark = tuple[str, ...]


class Document(NamedTuple):
    text: str
    package: str
    name: str  # unique


class Example(NamedTuple):
    sentence: str
    package: str
    document: str


@dataclass(frozen=True)
class PackageTask:
    splits: Mapping[str, Sequence[Example]]  # balanced, in random order
    pretraining: Sequence[Document]
    repeated: int  # sentences of the packages that were dropped since they stand in several documents
    giveaways: int  # … since they name their package


def read_documents(path: Path) -> list[Document]:
    """What `deepcloze python_docs` wrote."""
    with path.open(encoding="utf-8") as lines:
        rows = map(json.loads, lines)
        return [Document(row["text"], row["package"], row["document"]) for row in rows]


def make_task(documents: Sequence[Document], sizes: Mapping[str, int], seed: int) -> PackageTask:
    """Draw `sizes[split]` examples of each package. Raises UserError where a package has too few."""
    fitting = [
        (document, found)
        for document in documents
        if document.package in NAMES and (found := list(filter(_is_example, sentences(document.text))))
    ]
    appearances = _count_documents({_mark(sentence) for _, found in fitting for sentence in found}, documents)
    candidates: dict[str, list[tuple[str, list[str]]]] = {package: [] for package in NAMES}
    repeated = giveaways = 0
    for document, found in fitting:
        unique = [sentence for sentence in found if appearances[_mark(sentence)] == 1]
        usable = [sentence for sentence in unique if not _names(document.package, sentence)]
        repeated += len(found) - len(unique)
        giveaways += len(unique) - len(usable)
        if usable:
            candidates[document.package].append((document.name, usable))

    splits: dict[str, list[Example]] = {split: [] for split in sizes}
    needed = sum(sizes.values())
    for package, choice in candidates.items():
        if len(choice) < needed:
            raise UserError(f"the documentation of {package} gives {len(choice)} examples, {needed} are needed")
        draw = random.Random(f"{seed} {package}")
        chosen = [Example(draw.choice(usable), package, name) for name, usable in draw.sample(choice, needed)]
        for split, size in sizes.items():
            splits[split] += chosen[:size]
            del chosen[:size]
    for split, examples in splits.items():
        random.Random(f"{seed} {split}").shuffle(examples)
    held_out = {example.document for split in ("validation", "test") for example in splits[split]}
    pretraining = [document for document in documents if document.package in NAMES and document.name not in held_out]
    return PackageTask(splits, pretraining, repeated, giveaways)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a document, white space made single spaces."""
    for sentence in _SENTENCE_END.split(text):
        if words := sentence.split():
            yield " ".join(words)


def write_jsonl(path: Path, rows: Iterable[Example | Document]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows)


def _mark(sentence: str) -> Mark:
    """Eight words by which a sentence is recognised wherever it stands; the first may have a bracket or quote there."""
    return tuple(sentence.lower().split()[1 : 1 + _MARK_WORDS])


def _count_documents(marks: set[Mark], documents: Sequence[Document]) -> Counter[Mark]:
    """In how many documents each of the marks stands."""
    counts: Counter[Mark] = Counter()
    for document in documents:
        words = document.text.lower().split()
        counts.update(marks.intersection(zip(*(words[first:] for first in range(_MARK_WORDS)), strict=False)))
    return counts


def _names(package: str, sentence: str) -> bool:
    return any(name in sentence.lower() for name in NAMES[package])


def _is_example(sentence: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in sentence)
    whole = sentence[0].isupper() and sentence.endswith(".")
    return whole and sentence.count(" ") + 1 in _WORDS and letters >= _FEWEST_LETTERS * len(sentence)
