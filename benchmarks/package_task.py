"""The demo's task: classify a sentence of documentation by the package it is about.

1. A sentence is excluded if eight of its consecutive words occur in another document, of any package: it, or its
   template, could have been memorized.
2. A sentence is excluded if it names its own package.
3. A document gives at most one example, so that examples are independent, and belongs to one split.
4. The pretraining text is the documentation of these packages without the documents of validation and test. Documents
   of train stay in it: their text may be read during pretraining, but not their labels.
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

# Dependencies of deepcloze, so always installed; in lower case, the words that name each.
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
EXAMPLES: Mapping[str, int] = {"train": 60, "validation": 50, "test": 150}  # per package
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|\n")
_WORDS = range(12, 41)  # number of words in an example
_SHINGLE_WORDS = 8
_MIN_LETTERS = 0.85  # fraction of letters and spaces; below it the text is more of a formula

Shingle = tuple[str, ...]
"""Consecutive lower-case words."""


class PackageDocument(NamedTuple):
    text: str
    package: str
    name: str  # unique


class Example(NamedTuple):
    sentence: str
    package: str
    document: str


@dataclass(frozen=True)
class PackageTask:
    splits: Mapping[str, Sequence[Example]]  # balanced and shuffled
    pretraining: Sequence[PackageDocument]
    repeated: int  # sentences excluded because they occur in several documents
    giveaways: int  # sentences excluded because they name their package


def read_package_documents(path: Path) -> list[PackageDocument]:
    """Read the output of `deepcloze python_docs`."""
    with path.open(encoding="utf-8") as lines:
        rows = map(json.loads, lines)
        return [PackageDocument(row["text"], row["package"], row["document"]) for row in rows]


def make_package_task(documents: Sequence[PackageDocument], sizes: Mapping[str, int], seed: int) -> PackageTask:
    """Draw `sizes[split]` examples of each package. Raises UserError if a package has too few."""
    candidates, repeated, giveaways = _find_candidates(documents)
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
    """Yield the sentences of a document, with white space normalized to single spaces."""
    for sentence in _SENTENCE_END.split(text):
        if words := sentence.split():
            yield " ".join(words)


def _find_candidates(documents: Sequence[PackageDocument]) -> tuple[dict[str, list[tuple[str, list[str]]]], int, int]:
    """For each package, its documents' names and usable sentences; how many are repeated; how many name the package."""
    found = [
        (document, list(filter(_is_example, sentences(document.text))))
        for document in documents
        if document.package in NAMES
    ]
    occurrences = _count_documents({_shingle(sentence) for _, examples in found for sentence in examples}, documents)
    candidates: dict[str, list[tuple[str, list[str]]]] = {package: [] for package in NAMES}
    repeated = giveaways = 0
    for document, examples in found:
        unique = [sentence for sentence in examples if occurrences[_shingle(sentence)] == 1]
        usable = [sentence for sentence in unique if not _names_package(sentence, document.package)]
        repeated += len(examples) - len(unique)
        giveaways += len(unique) - len(usable)
        if usable:
            candidates[document.package].append((document.name, usable))
    return candidates, repeated, giveaways


def write_jsonl(path: Path, rows: Iterable[Example | PackageDocument]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows)


def _shingle(sentence: str) -> Shingle:
    """Eight words that identify a sentence. Skips the first word, which may have a bracket or quote elsewhere."""
    return tuple(sentence.lower().split()[1 : 1 + _SHINGLE_WORDS])


def _count_documents(shingles: set[Shingle], documents: Sequence[PackageDocument]) -> Counter[Shingle]:
    """Return the number of documents that contain each shingle."""
    counts: Counter[Shingle] = Counter()
    for document in documents:
        words = document.text.lower().split()
        counts.update(shingles.intersection(zip(*(words[first:] for first in range(_SHINGLE_WORDS)), strict=False)))
    return counts


def _names_package(sentence: str, package: str) -> bool:
    return any(name in sentence.lower() for name in NAMES[package])


def _is_example(sentence: str) -> bool:
    if not (sentence[0].isupper() and sentence.endswith(".") and sentence.count(" ") + 1 in _WORDS):
        return False
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return letters >= _MIN_LETTERS * len(sentence)
