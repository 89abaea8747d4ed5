"""The demo's task is valid only if pretraining sees nothing of validation and test."""

import random
from pathlib import Path

import pytest

from benchmarks.package_task import (
    NAMES,
    PackageDocument,
    make_package_task,
    read_package_documents,
    sentences,
    write_jsonl,
)
from experiment.errors import UserError

WORDS = [
    f"{first}{second}" for first in ("ba", "de", "fi", "go", "lu") for second in ("mor", "ner", "sil", "tak", "vun")
]
SIZES = {"train": 4, "validation": 2, "test": 3}


def documents(count: int = 12) -> list[PackageDocument]:
    """`count` documents of each package and of another one, each with three unique sentences."""
    draw = random.Random(0)

    def sentence() -> str:
        return " ".join(draw.choices(WORDS, k=20)).capitalize() + "."

    return [
        PackageDocument(" ".join(sentence() for _ in range(3)), package, f"{package}/{number}")
        for package in (*NAMES, "other")
        for number in range(count)
    ]


def test_splits_are_balanced_and_share_no_document() -> None:
    """Accuracy would be misleading: labels are imbalanced, or a document is in two splits."""
    task = make_package_task(documents(), SIZES, seed=1)
    for split, size in SIZES.items():
        assert sorted(example.package for example in task.splits[split]) == sorted([*NAMES] * size)
    names = [example.document for examples in task.splits.values() for example in examples]
    assert len(set(names)) == len(names)


def test_held_out_documents_are_not_in_the_pretraining_text() -> None:
    """The model would be tested on text it was pretrained on."""
    everything = documents()
    task = make_package_task(everything, SIZES, seed=1)
    held_out = {example.document for split in ("validation", "test") for example in task.splits[split]}
    kept = {document.name for document in task.pretraining}
    assert kept == {document.name for document in everything if document.package in NAMES} - held_out
    text = "\n".join(document.text for document in task.pretraining)
    assert not any(example.sentence in text for split in ("validation", "test") for example in task.splits[split])
    assert all(example.sentence in text for example in task.splits["train"])


def test_sentences_in_several_documents_are_excluded() -> None:
    """A sentence could be memorized from a document that is not held out, where it is quoted or ends differently."""
    everything = documents()
    everything += [
        PackageDocument(f'Elsewhere: "{sentence[:-8]} and so on.', "other", f"other/copy-{number}")
        for number, sentence in enumerate(
            first
            for document in everything
            if document.package == "torch"
            for first in [next(sentences(document.text))]
        )
    ]
    task = make_package_task(everything, SIZES, seed=1)
    firsts = {next(sentences(document.text)) for document in everything}
    chosen = [example for examples in task.splits.values() for example in examples if example.package == "torch"]
    assert chosen
    assert not firsts & {example.sentence for example in chosen}
    assert task.repeated == 12


def test_sentences_that_name_their_package_are_excluded() -> None:
    """The task would be reduced to finding the name."""
    everything = [
        document._replace(text=document.text.replace(".", " NumPy.", 2)) if document.package == "numpy" else document
        for document in documents()
    ]
    task = make_package_task(everything, SIZES, seed=1)
    assert task.giveaways == 24
    assert not any("NumPy" in example.sentence for examples in task.splits.values() for example in examples)


def test_the_draw_depends_on_the_seed_only() -> None:
    """Two runs of the demo would not be comparable."""
    first, again, other = (make_package_task(documents(), SIZES, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.splits != other.splits


def test_a_package_with_too_little_documentation_is_named() -> None:
    """The task would be imbalanced, or the demo would fail with an IndexError."""
    few = [document for document in documents() if document.package != "scipy" or document.name.endswith("1")]
    with pytest.raises(UserError, match=r"scipy gives 2 examples, 9 are needed"):
        make_package_task(few, SIZES, seed=1)


def test_documents_round_trip(tmp_path: Path) -> None:
    """`text`, `package` and `document` are the names that `deepcloze python_docs` writes."""
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "Größe.", "package": "numpy", "document": "numpy/a"}\n', encoding="utf-8")
    assert read_package_documents(path) == [PackageDocument("Größe.", "numpy", "numpy/a")]
    write_jsonl(path, [PackageDocument("Größe.", "numpy", "numpy/a")])
    assert '"text": "Größe."' in path.read_text(encoding="utf-8")
