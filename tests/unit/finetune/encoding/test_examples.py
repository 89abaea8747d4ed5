import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiment.models.tokenizer import load_tokenizer
from finetune.data.records import Record, Table
from finetune.encoding.encoder import Encoder
from finetune.encoding.examples import Padding, Split
from finetune.inference import collate, evaluation_batches
from finetune.kinds.classification import Config, Kind
from finetune.prepared_task import encode_split
from finetune.training.updater import training_batches, training_order

KIND = Kind(Config(train="f.csv", validation="f.csv"), ("a", "b"))


def encode(encoder: Path, *texts: tuple[str, ...], max_length: int = 64, labelled: bool = True) -> Split:
    label = {"label": "a"} if labelled else {}
    records = tuple(Record("f.csv", {**dict(zip(("text", "text_pair"), row, strict=False)), **label}) for row in texts)
    made = Encoder(load_tokenizer(encoder), max_length, token_types=True)
    return encode_split(Table(Path("f.csv"), records, labelled), KIND, made, training=True)


def ids(split: Split, index: int) -> list[int]:
    found: list[int] = split.examples[index].sequences[0].input_ids.tolist()
    return found


# The vocabulary: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, word0 5, word1 6, …


def test_pairs_have_separators_and_token_types(encoder: Path) -> None:
    """Catches pairs glued into one segment: the second text must have token type 1."""
    made = encode(encoder, ("word0 word1", "word2"))
    assert ids(made, 0) == [2, 5, 6, 3, 7, 3]
    assert made.examples[0].sequences[0].token_type_ids.tolist() == [0, 0, 0, 0, 1, 1]


def test_the_longer_text_of_a_pair_is_cut_and_counted(encoder: Path) -> None:
    """Catches truncation from the second text only, and a count that takes a full sequence for a cut one."""
    made = encode(
        encoder, ("word0 word1 word2 word3 word4 word5", "word9"), ("word0 word1 word2 word3", "word4"), max_length=8
    )
    assert ids(made, 0) == [2, 5, 6, 7, 8, 3, 14, 3]
    assert ids(made, 1) == [2, 5, 6, 7, 8, 3, 9, 3]
    assert [example.sequences[0].cut for example in made.examples] == [2, 0]


def test_few_long_texts_are_encoded_together(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches gigabytes for 256 documents of a book's length, and a text at the end of a batch that is left out."""
    sizes, encode_all = [], Encoder.encode_all
    monkeypatch.setattr(Encoder, "encode_all", lambda made, rows: sizes.append(len(rows)) or encode_all(made, rows))
    monkeypatch.setattr("finetune.prepared_task._CHARACTERS", 80)
    made = encode(encoder, *[("word0 word1 word2",)] * 5, ("word3",), ("word0", "word1 word2 word3"), ("word4",))
    assert sizes == [2, 2, 3, 1]
    assert [len(example.sequences[0]) for example in made.examples] == [5] * 5 + [3, 7, 3]


def test_special_tokens_in_a_text_are_text(encoder: Path) -> None:
    """Catches a literal [MASK] or [SEP] in the data becoming the token that the model knows by that id."""
    found = ids(encode(encoder, ("word0 [MASK] [SEP] word1",)), 0)
    assert 4 not in found
    assert found.count(3) == 1


def test_a_batch_is_padded_to_its_longest_example(encoder: Path) -> None:
    """Catches padding to max_seq_length, an attention mask over padding, and targets in another order."""
    made = encode(encoder, ("word0",), ("word0 word1 word2",), ("word1",))
    examples = [made.examples[2], made.examples[1]]
    batch = collate(KIND, examples, Padding(0, "right", 0), device=torch.device("cpu"))
    assert batch.inputs["input_ids"].tolist() == [[2, 6, 3, 0, 0], [2, 5, 6, 7, 3]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.targets.tolist() == [0, 0]


def test_a_split_without_labels_has_no_targets(encoder: Path) -> None:
    """Catches an unlabelled split that is scored against made-up labels."""
    assert encode(encoder, ("word0",), labelled=False).examples[0].target is None


@settings(max_examples=50)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(1, 17), st.integers(0, 2**32))
def test_an_epoch_visits_every_example_once(lengths: list[int], batch_size: int, seed: int) -> None:
    """Catches examples that are lost or repeated by shuffling, by grouping, or in a last short batch."""
    orders = [
        training_batches(lengths, batch_size, torch.Generator().manual_seed(seed)),
        evaluation_batches(lengths, batch_size),
    ]
    for order in orders:
        assert sorted(place for batch in order for place in batch) == list(range(len(lengths)))
        assert len(order) == -(-len(lengths) // batch_size)


def test_batches_of_one_length() -> None:
    """Catches padding for a model whose outputs depend on it."""
    assert evaluation_batches([3, 5, 3, 5, 3, 1], 2, equal=True) == [[1, 3], [0, 2], [4], [5]]


def test_no_two_epochs_or_seeds_have_the_same_order() -> None:
    """Catches seeds that share an order, so that their scores differ less than they should."""

    def order(seed: int, epoch: int) -> list[int]:
        updates = itertools.islice(training_order([1] * 64, batch_size=8, seed=seed, first=8 * epoch), 8)
        return [index for _, indices in updates for index in indices]

    assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


@pytest.mark.parametrize(("count", "batch_size"), [(600, 16), (1600, 32)])
def test_examples_of_a_small_split_change_their_batch_mates(count: int, batch_size: int) -> None:
    """Catches batches of the same examples in every epoch and seed, because the whole split is sorted by length."""
    lengths = np.random.default_rng(0).lognormal(3, 0.5, count).astype(int).tolist()

    def mates(seed: int) -> list[set[int]]:
        batches = training_batches(lengths, batch_size, torch.Generator().manual_seed(seed))
        found = {index: set(batch) - {index} for batch in batches for index in batch}
        return [found[index] for index in range(count)]

    again = [len(before & after) / len(before) for before, after in zip(mates(1), mates(2), strict=True)]
    assert np.mean(again) < 0.2


def test_training_batches_group_by_length_and_differ_by_epoch() -> None:
    """Catches batches of mixed lengths (slow), and an order that repeats or ignores its generator."""
    lengths = [n % 50 + 1 for n in range(1000)]
    generator = torch.Generator().manual_seed(1)
    first, second = (training_batches(lengths, 10, generator) for _ in range(2))
    assert first != second
    assert first == training_batches(lengths, 10, torch.Generator().manual_seed(1))
    slots = sum(len(batch) * max(lengths[place] for place in batch) for batch in first)
    assert slots == pytest.approx(sum(lengths), rel=0.05)
