import csv
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiment.config import build_config
from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer
from finetune.config import FinetuneConfig
from finetune.data.records import Record, Table, read_table
from finetune.encoding.encoder import Encoder
from finetune.encoding.examples import Batch
from finetune.kinds.question_answering import Config, Kind, _best_span
from finetune.run import run
from finetune.task_kind import LossOptions, Prediction

CONFIG = Config(train="f", validation="f")
KIND = Kind(CONFIG, ())
WITH_NONE = Kind(Config(train="f", validation="f", no_answer=True), ())
CONTEXT = "Word0 word1, word2 word3 word4 word5 word6 word7"


def record(*answers: str, **values: Any) -> Record:
    found = [{"text": text, "start": CONTEXT.index(text)} for text in answers]
    return Record("f:2", {"question": "word9 word9?", "context": CONTEXT, "answers": found, **values})


def encode(folder: Path, max_length: int = 64) -> Encoder:
    return Encoder(load_tokenizer(folder), max_length, token_types=True)


def test_the_target_is_where_the_answer_is(encoder: Path) -> None:
    """Catches positions in the question, in characters, or off by one."""
    (example,) = KIND.expand(record("word1, word2"), encode(encoder), training=True)
    first, last = example.target
    # [CLS] word9 word9 ? [SEP] word0 word1 , word2 …: the comma and the question mark are [UNK]
    assert example.sequences[0].input_ids.tolist()[first : last + 1] == [6, 1, 7]
    assert example.sequences[0].token_type_ids is not None
    assert example.sequences[0].token_type_ids[first] == 1


def test_windows_without_the_answer_point_to_the_classification_token(encoder: Path) -> None:
    """Catches half an answer as a target, and an answer that no window shows although it is short."""
    made = KIND.expand(record("word6 word7"), encode(encoder, 13), training=True)
    assert len(made) == 2
    assert made[0].target == [0, 0]
    first, last = made[1].target
    assert made[1].sequences[0].input_ids.tolist()[first : last + 1] == [11, 12]
    assert all(len(example.sequences[0]) <= 13 for example in made)


def test_an_answer_without_tokens_is_no_answer(encoder: Path) -> None:
    """Catches a traceback for an answer whose characters the tokenizer drops."""
    values = {"context": "word0 \x01 word1", "answers": [{"text": "\x01", "start": 6}]}
    (example,) = KIND.expand(record(**values), encode(encoder), training=True)
    assert example.target == [0, 0]


def scores_for(made: Any, window: int, span: tuple[int, int], nothing: float = -5.0) -> list[Any]:
    """Outputs that prefer a span (of tokens of the context) in a window."""
    outputs = [np.full((len(example.sequences[0]) + 3, 2), -10.0, dtype=np.float32) for example in made]
    for example, rows in zip(made, outputs, strict=True):
        rows[example.details.nothing] = nothing
    rows, start = outputs[window], made[window].details.start
    rows[start + span[0], 0] = rows[start + span[1], 1] = 3.0
    return outputs


def test_an_answer_is_cut_from_the_context(encoder: Path) -> None:
    """Catches answers made of tokens: in lower case, with spaces before punctuation."""
    (example,) = made = KIND.expand(record("word1"), encode(encoder), training=False)
    prediction = KIND.decode(record(), made, scores_for(made, 0, (0, 2)))
    assert (prediction["answer"], prediction["start"]) == ("Word0 word1,", 0)
    assert 0.99 < prediction["score"] <= 1.0
    assert json.loads(json.dumps(prediction)) == prediction
    assert example.details.nothing == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12), st.integers(1, 15))
def test_the_best_span_is_that_of_all_spans(scores: list[tuple[int, int]], most: int) -> None:
    """Catches spans that are too long, backwards or past the end, and another one of two that are equally good."""
    spans = [(first, last) for first in range(len(scores)) for last in range(first, min(first + most, len(scores)))]
    best = max(spans, key=lambda span: scores[span[0]][0] + scores[span[1]][1])
    found = _best_span(np.array(scores, dtype=np.float32), most)
    assert found == (*best, scores[best[0]][0] + scores[best[1]][1])


def test_the_best_span_of_a_long_context_needs_little_memory() -> None:
    """Catches a sum for each pair of tokens."""
    scores = np.zeros((2000, 2), dtype=np.float32)
    scores[1500, 0] = scores[1505, 1] = 1
    tracemalloc.start()
    found, (_, peak) = _best_span(scores, 30), tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == (1500, 1505, 2.0)
    assert peak < 1 << 20


def test_the_space_before_an_answer_is_not_part_of_it(encoder: Path) -> None:
    """Catches answers that begin with a space, and starts off by one, for tokens that cover the space before them."""
    (example,) = KIND.expand(record("word1"), encode(encoder), training=False)
    offsets = np.maximum(example.details.offsets - [1, 0], 0)
    made = [replace(example, details=replace(example.details, offsets=offsets))]
    prediction = KIND.decode(record(), made, scores_for(made, 0, (3, 4)))
    assert (prediction["answer"], prediction["start"]) == ("word2 word3", CONTEXT.index("word2"))


def test_the_best_window_answers(encoder: Path) -> None:
    """Catches positions of one window looked up in another, and offsets as Python numbers, which take four times the
    memory of everything else in an example."""
    made = KIND.expand(record("word1"), encode(encoder, 13), training=False)
    assert np.shares_memory(made[0].details.offsets, made[1].details.offsets)
    shown = made[1].details.offsets
    prediction = KIND.decode(record(), made, scores_for(made, 1, (0, 0), nothing=9.0))
    start, stop = shown[0]
    assert (prediction["answer"], prediction["start"]) == (CONTEXT[start:stop], start)


def test_a_token_in_two_windows_counts_once(encoder: Path) -> None:
    """Catches a score of a quarter for an answer that both windows are sure of."""
    made = KIND.expand(record("word1"), encode(encoder, 13), training=False)
    first, second = (example.details.offsets.tolist() for example in made[:2])
    shared = next(place for place in first if place in second)
    outputs = scores_for(made, 0, (first.index(shared),) * 2)
    outputs[1] = scores_for(made, 1, (second.index(shared),) * 2)[1]
    prediction = KIND.decode(record(), made, outputs)
    assert prediction["start"] == shared[0]
    assert 0.99 < prediction["score"] <= 1.0


def test_no_answer_needs_all_windows(encoder: Path) -> None:
    """Catches "no answer" because one window shows none, and answers to a task in which there is always one."""
    made = WITH_NONE.expand(record(), encode(encoder, 13), training=False)
    assert made[0].target == [0, 0]
    outputs = scores_for(made, 1, (0, 0), nothing=9.0)
    assert WITH_NONE.decode(record(), made, outputs)["answer"] == ""
    assert WITH_NONE.decode(record(), made, outputs)["start"] is None
    outputs[1][made[1].details.nothing] = -5.0
    assert WITH_NONE.decode(record(), made, outputs)["answer"] != ""


@pytest.mark.parametrize("answers", [{}, {"answers": []}, {"answers": [{"text": "\u200b", "start": 0}]}])
def test_a_context_without_tokens_has_no_answer(encoder: Path, answers: dict[str, Any]) -> None:
    """Catches one row among thousands that ends a prediction, or fails a request, although its context is not empty."""
    given = Record("f:2", {"question": "word9?", "context": "\u200b", **answers})
    found = KIND.decode(given, KIND.expand(given, encode(encoder), training=False), [])
    assert found == {"answer": "", "start": None, "score": 1.0}


def test_spans_are_in_order_and_short(encoder: Path) -> None:
    """Catches an end before the start, and answers of half the text."""
    made = KIND.expand(record("word1"), encode(encoder), training=False)
    outputs = scores_for(made, 0, (4, 2))
    assert KIND.decode(record(), made, outputs)["answer"] != ""
    short = Kind(Config(train="f", validation="f", max_answer_tokens=2), ())
    outputs = scores_for(made, 0, (1, 5))
    assert len(short.decode(record(), made, outputs)["answer"].split()) <= 2


def test_padding_takes_no_part_in_the_loss(encoder: Path) -> None:
    """Catches a softmax over padding, which depends on the other examples of a batch."""

    class Fake(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            scores = torch.arange(input_ids.shape[1]).float().expand(input_ids.shape)
            return type("Found", (), {"start_logits": scores, "end_logits": -scores})

    def loss(length: int) -> float:
        mask = (torch.arange(length) < 4).long()[None]
        batch = Batch((), {"input_ids": mask, "attention_mask": mask}, torch.tensor([[1, 2]]))
        found = KIND.loss(KIND.forward(Fake(), batch), batch, LossOptions())
        return (found.sum / found.weight).item()

    logits = torch.arange(4).float()
    expected = -(logits.log_softmax(0)[1] + (-logits).log_softmax(0)[2]) / 2
    assert loss(4) == pytest.approx(expected.item())
    assert loss(9) == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("found", "right", "f1", "exact"),
    [
        ("the Cat.", ["cat"], 1.0, 1.0),
        ("a black cat", ["the cat sat", "dog"], 0.5, 0.0),
        ("", [], 1.0, 1.0),
        ("cat", [], 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0),
        ("cat cat", ["cat"], 2 / 3, 0.0),
        ("«cat»", ["cat"], 0.0, 0.0),
        ("北京大学", ["北京大学的"], 8 / 9, 0.0),
        ("A", ["维生素A"], 0.4, 0.0),
        ("《红楼梦》", ["红楼梦。"], 1.0, 1.0),
        ("（1998）", ["1998年"], 2 / 3, 0.0),
        ("iPhone 4手机", ["iphone 4 手机"], 1.0, 1.0),
        ("维生素A", ["维生素B"], 6 / 8, 0.0),
        ("トヨタの𠮷田", ["トヨタ，𠮷田"], 10 / 11, 0.0),
    ],
)
def test_scores_are_those_of_squad_and_mlqa(found: str, right: list[str], f1: float, exact: float) -> None:
    """Catches articles, case or punctuation that count, words counted twice, the mean over answers instead of the
    best, and Chinese answers that are one word each."""
    answers = [{"text": text, "start": 0} for text in right]
    prediction: Prediction = {"answer": found, "start": 0, "score": 1.0}
    assert KIND.scores([Record("f", {"answers": answers})], [prediction]) == pytest.approx(
        {"f1": f1, "exact_match": exact}
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"answers": []}, r"f:2: no answer; if questions may have none, set task\.no_answer: true"),
        ({"context": " ", "answers": []}, r"f:2: the context is empty"),
        ({"context": "\u200b", "answers": []}, r"f:2: the context is empty"),
    ],
)
def test_mistakes_are_named(encoder: Path, values: dict[str, Any], message: str) -> None:
    """Catches a question without an answer taken for one that has none, and a traceback for an empty context."""
    with pytest.raises(UserError, match=message):
        KIND.expand(record(**values), encode(encoder), training=True)


@pytest.mark.parametrize("start", [0, -1, 1000])
def test_an_answer_at_another_place_is_found(encoder: Path, start: int) -> None:
    """Catches training on another part of the text, and a run that is rejected for one wrong start."""
    right, wrong = record("word2"), record(answers=[{"text": "word2", "start": start}, {"text": "none", "start": 3}])
    targets = [KIND.expand(each, encode(encoder), training=True)[0].target for each in (right, wrong)]
    assert targets[0] == targets[1] != [0, 0]


@pytest.mark.parametrize("text", ["word", "word9", "o"])
def test_an_answer_that_is_not_found_is_not_trained_on(encoder: Path, text: str) -> None:
    """Catches a question that is trained as one without an answer, or left out silently, and one that is not scored
    although its text is known."""
    lost = record(answers=[{"text": text, "start": 2}])
    assert KIND.expand(lost, encode(encoder), training=True) == []
    KIND.check_target(lost)
    (example,) = KIND.expand(lost, encode(encoder), training=False)
    assert example.target == [0, 0]
    assert KIND.scores([lost], [{"answer": text, "start": 0, "score": 1.0}])["f1"] == 1.0
    few = Table(Path("f"), (*[record("word2")] * 9, lost), labelled=True)
    assert Kind.find_labels(CONFIG, few) == ()
    assert KIND.describe(few) == [
        "1 question of train left out, such as f:2: the text of the answer is not at its start, nor exactly once "
        "elsewhere in the context"
    ]
    many = Table(Path("f"), (*[record("word2")] * 4, lost), labelled=True)
    message = rf"f:2: the answer '{text}' is not at character 2 .*; 1 of 5 questions in train have such an answer$"
    with pytest.raises(UserError, match=message):
        Kind.find_labels(CONFIG, many)


@pytest.mark.usefixtures("no_figures")
def test_questions_that_are_not_trained_on_are_not_scored_in_training(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches training scores below those of the questions that the model has seen, a list of its worst rows that has
    others, rows with the numbers of others, and questions that are left out silently."""
    cells = [
        {
            "question": "word9?",
            "context": CONTEXT,
            "answers": {"text": [text], "answer_start": [CONTEXT.index("word5")]},
        }
        for text in (*["word5"] * 4, "none", *["word5"] * 6)
    ]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in cells))
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "task": {"name": "qa", "kind": "question_answering", "train": str(tmp_path / "f.jsonl")},
        "model": {"init_from": str(encoder), "max_seq_length": 24},
        "training": {"epochs": 1, "seeds": [1], "score_train": True, "fit_on": "train+validation", "precision": "fp32"},
    }
    run(build_config(FinetuneConfig, tree, {}))
    for name in ("predictions-train.csv", "worst-train.csv"):
        with (tmp_path / "run" / "seed-1" / name).open() as file:
            assert sorted(int(row["row"]) for row in csv.DictReader(file)) == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert "1 question of train left out" in " ".join(capsys.readouterr().err.split())
    card = (tmp_path / "run" / "seed-1" / "model" / "README.md").read_text()
    record = json.loads((tmp_path / "run" / "seed-1" / "COMPLETE").read_text())
    assert f"| train | f.jsonl | 10 | {record['settings']['data']['train']} |" in card


@pytest.mark.parametrize(
    "cell",
    [
        {"text": ["word1"], "answer_start": [6]},
        [{"text": "word1", "answer_start": 6}],
        '{"text": ["word1"], "answer_start": [6]}',
    ],
)
def test_forms_of_answers(tmp_path: Path, cell: object) -> None:
    """Catches one of the forms in which SQuAD is distributed being refused."""
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({"question": "x", "context": CONTEXT, "answers": cell}))
    (found,) = read_table(path, CONFIG.columns).records
    assert found.values["answers"] == [{"text": "word1", "start": 6}]


@pytest.mark.parametrize("texts", [[], [""], ["FAKE_ANSWER_1"]])
def test_a_test_split_may_hide_its_answers(tmp_path: Path, texts: list[str]) -> None:
    """Catches answers that are all withheld, as on the Hugging Face Hub or in CMRC 2018 (all starts are -1), taken for
    questions without an answer; a few such questions are some of SQuAD 2.0."""
    path = tmp_path / "f.jsonl"
    hidden, shown = {"text": texts, "answer_start": [-1] * len(texts)}, {"text": ["word1"], "answer_start": [6]}
    rows = [json.dumps({"question": "x", "context": CONTEXT, "answers": each}) for each in (hidden, hidden, shown)]
    path.write_text("\n".join(rows[:2]))
    table = read_table(path, CONFIG.columns, targets_required=False)
    assert not table.labelled
    assert "answers" not in table.records[0].values
    assert read_table(path, CONFIG.columns, targets_required=True).labelled
    path.write_text("\n".join(rows))
    found = read_table(path, CONFIG.columns, targets_required=False).records[0].values["answers"]
    assert [answer["text"] for answer in found] == [text for text in texts if text]


@pytest.mark.parametrize("cell", [{"text": ["a"], "answer_start": []}, [{"text": "a"}], [1], "word1", 3])
def test_other_answers_are_rejected(tmp_path: Path, cell: object) -> None:
    """Catches a traceback for an invalid answer."""
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({"question": "x", "context": CONTEXT, "answers": cell}))
    with pytest.raises(UserError, match=r"f\.jsonl:1: expected answers .* in 'answers', found"):
        read_table(path, CONFIG.columns)


def test_the_worst_answers_are_wrong_and_sure() -> None:
    """Catches questions ranked by how unsure the model is: a right answer with a low score before a wrong one."""
    records = [record("word1"), record("word1"), record("word1, word2"), record()]
    predictions = [
        {"answer": "word1", "score": 0.9},
        {"answer": "word5", "score": 0.9},
        {"answer": "word2", "score": 0.8},
        {"answer": "", "score": 0.5},
    ]
    f1 = 2 / 3
    expected = [-np.log(0.9), -np.log(0.1), -f1 * np.log(0.8) - (1 - f1) * np.log(0.2), -np.log(0.5)]
    assert KIND.losses(records, predictions) == pytest.approx(expected)
