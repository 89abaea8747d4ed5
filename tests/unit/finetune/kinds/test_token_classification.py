import random
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

from experiment.csv_and_jsonl import CsvFormat
from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer
from finetune.data.formats import FileFormat
from finetune.data.records import Record, Table, read_table
from finetune.encoding.encoder import Encoder, most_context, windows
from finetune.encoding.examples import Batch, padding_last
from finetune.kinds import token_classification
from finetune.kinds.token_classification import Config, Kind, _tagged_words, _whole_words
from finetune.scores.metrics import confusion_matrix
from finetune.task_kind import LossOptions

CONFIG = Config(train="f", validation="f")
KIND = Kind(CONFIG, ("B-X", "I-X", "O"))


def encode(folder: Path, max_length: int) -> Encoder:
    return Encoder(load_tokenizer(folder), max_length, token_types=True)


def test_the_first_token_of_a_word_carries_its_tag(encoder: Path) -> None:
    """Catches tags on the wrong tokens. The last word has three tokens: [UNK], word1 and [UNK]."""
    words = ["word0", "word1!", "?word1?"]
    record = Record("f", {"words": words, "tags": ["O", "B-X", "I-X"]})
    (example,) = KIND.expand(record, encode(encoder, 16), training=True)
    assert example.sequences[0].input_ids.tolist() == [2, 5, 6, 1, 1, 6, 1, 3]
    assert example.target.tolist() == [-100, 2, 0, -100, 1, -100, -100, -100]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.integers(3, 20))
def test_every_word_gets_one_tag(encoder: Path, lengths: list[int], max_length: int) -> None:
    """Catches words at the edges of windows that get no tag, or two; also words longer than a window."""
    words = ["!" * length for length in lengths]  # one token for each character
    record = Record("f", {"words": words, "tags": ["O"] * len(words)})
    made = KIND.expand(record, encode(encoder, max_length), training=True)
    assert sum((example.target != -100).sum().item() for example in made) == len(words)
    assert all(len(example.sequences[0]) <= max_length for example in made)
    outputs = [torch.zeros(max_length, 3).numpy() for _ in made]
    assert KIND.decode(record, made, outputs)["tags"] == ["B-X"] * len(words)


def test_the_words_of_a_sequence_are_decoded_together(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a softmax for each word, which takes 16 times as long, and another word's score."""
    record = Record("f", {"words": ["word0", "!!", "word1"]})
    (example,) = KIND.expand(record, encode(encoder, 16), training=False)
    scores_TC = np.random.default_rng(0).normal(size=(len(example.sequences[0]), 3)).astype(np.float32)
    rows = [torch.from_numpy(scores_TC[position]).softmax(-1) for position in (1, 2, 4)]
    calls, convert = [], torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: calls.append(1) or convert(array))
    found = KIND.decode(record, [example], [scores_TC])
    assert found["tags"] == [KIND.labels[int(row.argmax())] for row in rows]
    assert found["scores"] == [float(row.max()) for row in rows]
    assert len(calls) == 1


@given(st.lists(st.integers(1, 12), max_size=40), st.integers(1, 30))
def test_a_word_is_tagged_in_the_first_window_with_most_context(lengths: list[int], size: int) -> None:
    """Catches another window for words in two or three of them, also at the end, where windows overlap most."""
    starts = [0, *accumulate(min(length, max(size // 3, 1)) for length in lengths)]
    whole = []
    for window in windows(starts[-1], size):
        inside = [start for start in starts if window.start <= start <= window.stop]
        whole.append(range(inside[0], inside[-1]))
        assert _whole_words(window, starts) == whole[-1]
    owners = [most_context(whole, start) for start in starts[:-1]]
    expected = [[word for word, owner in enumerate(owners) if owner == number] for number in range(len(whole))]
    assert _tagged_words(whole, starts) == expected


def test_a_word_is_not_searched_in_all_windows(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a request of many short words that keeps a server busy for minutes."""
    compared = []

    def counted(found: Sequence[range], position: int) -> int:
        compared.append(len(found))
        return most_context(found, position)

    monkeypatch.setattr(token_classification, "most_context", counted)
    KIND.expand(Record("f", {"words": ["word0"] * 200}), encode(encoder, 8), training=False)
    assert len(compared) == 200
    assert max(compared) <= 3


def test_words_near_the_edge_of_a_window_are_tagged_in_another(encoder: Path) -> None:
    """Catches tags from windows that show nothing of what follows."""
    record = Record("f", {"words": [f"word{n}" for n in range(12)]})
    first, second = KIND.expand(record, encode(encoder, 11), training=False)
    assert (len(first.sequences[0]), len(second.sequences[0])) == (11, 11)
    assert first.details.words == (0, 1, 2, 3, 4, 5)
    assert second.details.words == (6, 7, 8, 9, 10, 11)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_moved_behind_the_tokens(side: str) -> None:
    """Catches tags taken from padding, for tokenizers that pad on the left."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    mask = mask if side == "left" else mask.flip(1)
    outputs = torch.arange(10).reshape(2, 5, 1) * 1.0
    outputs = outputs if side == "left" else torch.stack([outputs[0].roll(-2, 0), outputs[1]])
    found = padding_last(outputs, Batch((), {"attention_mask": mask}, None))
    assert found[0, :3, 0].tolist() == [2, 3, 4]
    assert found[1, :, 0].tolist() == [5, 6, 7, 8, 9]


def test_the_loss_is_a_mean_over_words() -> None:
    """Catches a mean over sentences, and padding or further tokens of a word that count."""
    targets = torch.tensor([[-100, 0, 1, -100], [-100, 2, -100, -100]])
    outputs = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    loss = KIND.loss(outputs, Batch((), {}, targets), LossOptions())
    expected = -(outputs.log_softmax(-1)[[0, 0, 1], [1, 2, 1], [0, 1, 2]]).mean()
    assert (loss.sum / loss.weight).item() == pytest.approx(expected.item())


def scores(targets: str, predicted: str) -> dict[str, float]:
    return KIND.scores([Record("f", {"tags": targets.split()})], [{"tags": predicted.split()}])


def test_entities_count_as_a_whole() -> None:
    """Catches F1 of single tags: of two names one has its end wrong."""
    found = scores("B-X I-X O B-X", "B-X O O B-X")
    assert (found["precision"], found["recall"], found["f1"], found["accuracy"]) == (0.5, 0.5, 0.5, 0.75)
    found = scores("B-X I-X O B-Y O", "B-X I-X O B-X B-X")
    assert (found["precision"], found["recall"]) == (pytest.approx(1 / 3), 0.5)
    assert set(scores("", "").values()) == {0.0}  # as a bootstrap may draw sentences without words


def test_one_tag_for_all_words_is_a_collapse() -> None:
    """Catches a collapse that is missed because sentences differ in length."""
    records = [Record("f", {"tags": ["O", "B-X"]}), Record("f", {"tags": ["O"]})]
    assert KIND.is_collapsed(records, [{"tags": ["O", "O"]}, {"tags": ["O"]}])
    assert not KIND.is_collapsed(records, [{"tags": ["O", "B-X"]}, {"tags": ["B-X"]}])


def test_tags_without_a_prefix_are_entities() -> None:
    """Catches the first letter of a tag taken for its prefix: `NOUN` would be an `OUN`."""
    for noun in ("NOUN", "PROPER-NOUN"):
        found = scores(f"{noun} VERB O", f"{noun} {noun} O")
        assert (found["precision"], found["recall"]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("targets", "predicted"),
    [
        ("B-X M-X E-X O S-X", "B-X M-X E-X O O"),  # BMES, as in Chinese data sets
        ("B-X I-X L-X O U-X", "B-X I-X L-X O O"),  # BILOU
        ("B-X I-X E-X O S-X", "B-X I-X E-X O O"),  # IOBES
        ("B-X I-X I-X O B-X", "B-X I-X I-X O O"),
        ("B I I O B", "B I I O O"),
        ("B M E O S", "B M E O O"),
        ("b-X m-X e-X o s-X", "b-X m-X e-X o o"),
        ("B_X I_X I_X O B_X", "B_X I_X I_X O O"),
        ("X-B X-I X-I O X-B", "X-B X-I X-I O O"),
        ("X_B X_M X_E O X_S", "X_B X_M X_E O O"),
        ("b i i o b", "b i i o o"),
    ],
)
def test_every_scheme_of_tags_counts_the_same_entities(targets: str, predicted: str) -> None:
    """Catches M-X taken for a type, so that a name of three characters counts as three entities."""
    kind = Kind(CONFIG, tuple(sorted(set(targets.split()))))
    records, predictions = [Record("f", {"tags": targets.split()})], [{"tags": predicted.split()}]
    found = kind.scores(records, predictions)
    assert (found["precision"], found["recall"], found["f1"]) == (1.0, 0.5, pytest.approx(2 / 3))
    (name,) = kind.label_scores(records, predictions)
    assert name == ("X" if "X" in targets else "entity")


@pytest.mark.parametrize(
    ("labels", "single"),
    [
        ("B-X I-X O", None),
        ("NOUN VERB", "NOUN, VERB"),
        ("n o v", "n, o, v"),  # the tag o of PKU
        ("I-X I-Y o", None),
        ("B-X I-X OTHER", "OTHER"),
        ("B_X I_X O X", "B_X, I_X, X"),
        ("VITAMIN-B VITAMIN-E O", "VITAMIN-B, VITAMIN-E"),  # types, none of which continues
        ("HEP-B HEP-I B-CELL", "HEP-B, HEP-I"),
        ("S-B S-I O", None),
    ],
)
def test_tags_that_are_entities_of_one_word_are_named(labels: str, single: str | None) -> None:
    """Catches a score of single tags that looks like one of entities, and types that end in a letter of a scheme."""
    kind = Kind(CONFIG, tuple(labels.split()))
    lines = kind.describe(Table(Path("f"), (Record("f", {"tags": labels.split()}),), labelled=True))
    assert lines[1:] == ([] if single is None else [f"scored as entities of one word: {single}"])


def test_scores_of_each_type_of_entity() -> None:
    """Catches scores of single tags, types that only occur in another seed, and tags without a prefix."""
    kind = Kind(CONFIG, ("B-X", "I-X", "NOUN", "O", "S-Z"))
    records = [Record("f", {"tags": tags.split()}) for tags in ("B-X I-X O", "B-X NOUN NOUN")]
    predictions = [{"tags": tags.split()} for tags in ("B-X O O", "B-X NOUN O")]
    found = kind.label_scores(records, predictions)
    assert list(found) == ["NOUN", "X", "Z"]
    assert found["X"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert found["NOUN"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}
    assert found["Z"]["support"] == 0
    matrix = confusion_matrix(*kind.label_pairs(records, predictions), 5)
    assert (matrix[1, 3], matrix[2, 3], matrix.sum(), np.trace(matrix)) == (1, 1, 6, 4)


def test_scores_are_those_of_seqeval() -> None:
    """Catches entities that are counted in another way, and a division by zero where there are none."""
    draw = random.Random(0)
    labels = ("B-X", "B-Y", "E-Y", "I-X", "I-Y", "O", "S-X")
    kind = Kind(CONFIG, labels)
    for number in range(50):
        targets, predicted = ([draw.choices(labels, k=length) for length in (3, 1, 6)] for _ in range(2))
        if number < 2:
            predicted = [["O"] * len(tags) for tags in predicted]
        if number == 0:
            targets = predicted
        records = [Record("f", {"tags": tags}) for tags in targets]
        found = kind.scores(records, [{"tags": tags} for tags in predicted])
        expected = precision_recall_fscore_support(targets, predicted, average="micro", zero_division=0)
        assert (found["precision"], found["recall"], found["f1"]) == expected[:3]


def test_the_worst_sentence_has_the_worst_word() -> None:
    """Catches a mean over words, in which a wrong tag of a long sentence is lost, and scores of right tags only."""
    records = [Record("f", {"tags": tags.split()}) for tags in ("O O O", "O", "")]
    predictions = [{"tags": ["O", "B-X", "O"], "scores": [0.9, 0.8, 0.6]}, {"tags": ["O"], "scores": [0.5]}]
    losses = KIND.losses(records, [*predictions, {"tags": [], "scores": []}])
    assert losses == pytest.approx([-np.log(0.2), -np.log(0.5), 0.0])


def test_words_and_tags_must_be_as_many(encoder: Path, tmp_path: Path) -> None:
    """Catches tags that shift by a word."""
    path = tmp_path / "f.tsv"
    path.write_text("tokens\ttags\na b\tO O\na b\tO\n")
    table = read_table(path, CONFIG.columns)
    message = r"f\.tsv:3: expected a tag for each word; words: 2 \(a, b\); tags: 1 \(O\)$"
    with pytest.raises(UserError, match=message):
        [KIND.expand(record, encode(encoder, 8), training=True) for record in table.records]


@pytest.mark.parametrize(
    ("tags", "hint"),
    [
        ("['O', 'O']", "not JSON, where texts are in double quotes"),
        ("[B-ORG, O]", "not JSON: write a list as "),
        ('["O", ""]', "a tag is empty"),
    ],
)
def test_tags_that_are_nearly_right_are_rejected(tmp_path: Path, tags: str, hint: str) -> None:
    """Catches a list as Python prints it, whose brackets and quotes become parts of tags, and a tag ''."""
    path = tmp_path / "f.tsv"
    path.write_text(f"tokens\ttags\na b\t{tags}\n")
    with pytest.raises(UserError, match=rf"f\.tsv:2: expected a list of tags.* in 'tags', found .*; {hint}"):
        read_table(path, CONFIG.columns, FileFormat(csv=CsvFormat(quoting=3)))


@pytest.mark.parametrize("tags", ["[CLS] O [SEP]", "[CLS]"])
def test_tags_may_be_in_brackets(tmp_path: Path, tags: str) -> None:
    """Catches tags of special tokens that are taken for a list."""
    path = tmp_path / "f.tsv"
    path.write_text(f"tokens\ttags\n{tags}\t{tags}\n")
    (record,) = read_table(path, CONFIG.columns).records
    assert record.values["tags"] == tags.split()


def test_null_tags_and_numbers_for_words(tmp_path: Path) -> None:
    """Catches a test split without tags that is rejected, and a traceback for words that are no text."""
    path = tmp_path / "f.jsonl"
    path.write_text('{"tokens": ["a", "b"], "tags": null}\n')
    table = read_table(path, CONFIG.columns, targets_required=False)
    assert ([record.values for record in table.records], table.labelled) == ([{"words": ["a", "b"]}], False)
    path.write_text('{"tokens": [1, 2], "tags": null}\n')
    with pytest.raises(UserError, match=r"f\.jsonl:1: expected a list of words.* in 'tokens', found \[1, 2\]"):
        read_table(path, CONFIG.columns, targets_required=False)


@pytest.mark.parametrize("tags", ["[]", "[-1, -1]", "[-1.0, -1.0]", "[null, null]", '"[-1, -1]"', '"-1 -1"'])
def test_a_test_split_may_hide_its_tags(tmp_path: Path, tags: str) -> None:
    """Catches a test split of the Hub that is rejected, because its tags are withheld; a sentence without words has no
    tags either."""
    path = tmp_path / "f.jsonl"
    path.write_text(f'{{"tokens": ["a", "b"], "tags": {tags}}}\n' * 2)
    assert not read_table(path, CONFIG.columns, targets_required=False).labelled
    path.write_text('{"tokens": [], "tags": []}\n{"tokens": ["a"], "tags": ["O"]}\n')
    assert read_table(path, CONFIG.columns, targets_required=False).records[0].values == {"words": [], "tags": []}


def test_class_numbers_are_no_tags(tmp_path: Path) -> None:
    """Catches a message that does not say where the names are."""
    path = tmp_path / "f.jsonl"
    path.write_text('{"tokens": ["a", "b"], "tags": [0, -1]}\n')
    with pytest.raises(UserError, match=r"expected a list of tags.*, found \[0, -1\]; .* read them as hub:FOLDER$"):
        read_table(path, CONFIG.columns)


def test_one_tag_is_no_task() -> None:
    """Catches a wrong column."""
    table = Table(Path("f"), (Record("f", {"words": ["a"], "tags": ["O"]}),), labelled=True)
    with pytest.raises(UserError, match="every word has the tag 'O'"):
        Kind.find_labels(CONFIG, table)
