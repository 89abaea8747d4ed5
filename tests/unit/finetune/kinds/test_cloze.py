import csv
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing
from transformers import BertForMaskedLM, PreTrainedTokenizerFast, XLNetTokenizer

from experiment.config import build_config
from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer
from finetune.config import FinetuneConfig
from finetune.data.records import Record, read_table
from finetune.encoding.encoder import Encoder
from finetune.encoding.examples import Example, Padding
from finetune.inference import collate
from finetune.kinds.cloze import Config, Kind, _excerpt
from finetune.prediction.predictor import Predictor
from finetune.resolve import load_run_config
from finetune.results.predictions import prediction_rows
from finetune.run import finetune, run
from finetune.scores.calibration import calibration_error
from finetune.task_kind import LossOptions

CPU = torch.device("cpu")
# The vocabulary: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, word0 5, word1 6, …
ARTICLE = "word0 _ word1 _ word2 word3 word4 _ word5"
OPTIONS = [["word10", "word11"], ["word12", "word13 word14"], ["word15", "word16", "word17"]]
RECORD = Record("f:1", {"article": ARTICLE, "options": OPTIONS, "answers": ["A", "B", "C"]})


def kind(**keys: Any) -> Kind:
    return Kind(Config(train="f", validation="f", **keys), ())


def make(encoder: Path, max_length: int = 64) -> Encoder:
    return Encoder(load_tokenizer(encoder), max_length, token_types=True)


def expand(encoder: Path, training: bool = False, max_length: int = 64, **keys: Any) -> list[Example]:
    return kind(**keys).expand(RECORD, make(encoder, max_length), training)


def texts(example: Example) -> list[str]:
    """The sequences of an example, without [CLS] and [SEP]; words by their numbers, masks as _."""
    return [
        " ".join("_" if token == 4 else str(token - 5) for token in sequence.input_ids.tolist()[1:-1])
        for sequence in example.sequences
    ]


@pytest.mark.parametrize(
    ("other_blanks", "training", "expected"),
    [
        ("filled", True, ["0 10 1 12 2 3 4 17 5", "0 10 1 13 14 2 3 4 17 5"]),
        ("filled", False, ["0 _ 1 12 2 3 4 _ 5", "0 _ 1 13 14 2 3 4 _ 5"]),
        ("masked", True, ["0 _ 1 12 2 3 4 _ 5", "0 _ 1 13 14 2 3 4 _ 5"]),
        ("dropped", True, ["0 1 12 2 3 4 5", "0 1 13 14 2 3 4 5"]),
    ],
)
def test_other_blanks(encoder: Path, other_blanks: str, training: bool, expected: list[str]) -> None:
    """Catches answers of other blanks that are shown while scoring: an exam does not show them."""
    made = expand(encoder, training, other_blanks=other_blanks)
    assert texts(made[1]) == expected
    assert [example.target for example in made] == [0, 1, 2]


@pytest.mark.parametrize(
    ("context", "max_length", "expected"),
    [
        ("between", 64, [["0 10 1", "0 11 1"], ["1 12 2 3 4", "1 13 14 2 3 4"], ["2 3 4 15 5"]]),
        ("between", 7, [["0 10 1", "0 11 1"], ["1 12 2 3", "1 13 14 2 3"], ["2 3 4 15 5"]]),
        ("around", 7, [["0 10 1 _ 2", "0 11 1 _ 2"], ["1 12 2 3", "1 13 14 2 3"], ["4 15 5"]]),
        ("around", 64, [["0 10 1 _ 2 3 4 _ 5"], ["0 _ 1 12 2 3 4 _ 5"], ["0 _ 1 _ 2 3 4 15 5"]]),
    ],
)
def test_contexts_of_one_sequence(encoder: Path, context: str, max_length: int, expected: list[list[str]]) -> None:
    """Catches a context that loses the blank, that is not cut around it, or that goes beyond the neighbours."""
    made = expand(encoder, context=context, max_length=max_length)
    found = [texts(example)[: len(each)] for example, each in zip(made, expected, strict=True)]
    if (context, max_length) == ("around", 7):
        found[2] = [" ".join(found[2][0].split()[-3:])]
    assert found == expected
    assert all(len(sequence) <= max_length for example in made for sequence in example.sequences)


def test_windows_over_an_article(encoder: Path) -> None:
    """Catches a blank that no window shows, windows without the blank, and a blank at the edge of a window."""
    made = expand(encoder, context="article", max_length=8)
    of_blank = [[texts(example)[0] for example in made if example.details.index == blank] for blank in range(3)]
    assert of_blank == [["0 10 1 _ 2 3"], ["0 _ 1 12 2"], ["_ 2 3 4 15 5"]]
    numbers = [f"word{n}" for n in range(10)]
    article = " ".join([*numbers[:5], "_", *numbers[5:]])
    made = kind().expand(Record("f", {"article": article, "options": OPTIONS[:1]}), make(encoder, 9), False)
    assert [texts(example)[0] for example in made] == ["0 1 2 3 4 10 5", "4 10 5 6 7 8 9"]


def test_the_mean_over_windows_answers() -> None:
    """Catches the last window overwriting the others."""
    made = [Example((), None, details) for details in _blanks(0, 0, 1)]
    for example in made:
        object.__setattr__(example, "sequences", (None, None))
    record = Record("f", {"options": [["x", "y"]] * 2})
    outputs = [np.array([score], dtype=np.float32) for score in (3.0, 0.0, 0.0, 1.0, 0.0, 1.0)]
    prediction = kind().decode(record, made, outputs)
    assert prediction["answers"] == ["A", "B"]
    assert prediction["probabilities"][0][0] == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item())


def _blanks(*indices: int) -> list[Any]:
    from finetune.kinds.cloze import _Blank

    return [_Blank(index, (1, 1)) for index in indices]


def reference(model: BertForMaskedLM, before: list[int], option: list[int], after: list[int]) -> float:
    """The mean log-probability of the tokens of an option, each masked in turn."""
    total = 0.0
    for index, token in enumerate(option):
        masked = [*option[:index], 4, *option[index + 1 :]]
        logits = model(torch.tensor([[2, *before, *masked, *after, 3]])).logits[0, 1 + len(before) + index]
        total += logits.log_softmax(-1)[token].item()
    return total / len(option)


def test_zero_shot_scores_are_pseudo_log_likelihoods(encoder: Path) -> None:
    """Catches a mask on the wrong token, a sum in place of the mean, and outputs of the wrong position. The reference
    computes each masked sequence by itself with the whole output layer."""
    asked = kind(scoring="zero_shot", other_blanks="dropped")
    made = expand(encoder, scoring="zero_shot", other_blanks="dropped")
    # Three options of one token share a sequence.
    assert [len(example.sequences) for example in made] == [1, 3, 1]
    model = BertForMaskedLM.from_pretrained(encoder).eval()
    with torch.no_grad():
        model.get_output_embeddings().bias.normal_()
        batch = collate(asked, made, Padding(0, "right", 0), CPU)
        outputs = asked.forward(model, batch)
        options = [reference(model, [5, 6], option, [7, 8, 9, 10]) for option in ([17], [18, 19])]
    prediction = asked.decode(RECORD, made, list(outputs.numpy()))
    assert prediction["probabilities"][1] == pytest.approx(torch.tensor(options).softmax(0).tolist(), abs=1e-6)
    loss = asked.loss(outputs, batch, LossOptions())
    right = [prediction["probabilities"][blank][blank] for blank in range(3)]
    assert loss.sum.item() == pytest.approx(-np.log(right).sum(), abs=1e-5)


def test_masks_are_found_behind_padding(encoder: Path) -> None:
    """Catches a position counted from the padding, for tokenizers that pad on the left."""
    asked, made = kind(scoring="zero_shot"), expand(encoder, scoring="zero_shot", context="between")
    model = BertForMaskedLM.from_pretrained(encoder).eval()
    batch = collate(asked, made, Padding(0, "left", 0), CPU)
    places = [place.position for example in made for place in example.details.masked]
    with torch.no_grad():
        every_position = model(**batch.inputs).logits.log_softmax(-1)
        found = asked.forward(model, batch)
    for row, (ids, place) in enumerate(zip(batch.inputs["input_ids"].tolist(), places, strict=True)):
        column = ids.index(2) + place
        assert ids[column] == 4
        tokens = [masked.tokens for example in made for masked in example.details.masked][row]
        expected = [
            every_position[row, column, tokens[option]].item() if option in tokens else 0.0 for option in range(3)
        ]
        assert found[row].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_hook_of_the_output_layer_is_removed(encoder: Path) -> None:
    """Catches a model that computes one position only from then on, also after an error."""
    model = BertForMaskedLM.from_pretrained(encoder).eval()
    made = expand(encoder, scoring="zero_shot")
    batch = collate(kind(scoring="zero_shot"), made, Padding(0, "right", 0), CPU)
    kind(scoring="zero_shot").forward(model, batch)
    assert model(torch.tensor([[2, 5, 6, 3]])).logits.shape[1] == 4


def test_binary_scoring_weighs_every_option(encoder: Path) -> None:
    """Catches targets of right and wrong at the wrong options."""
    asked = kind(scoring="binary")
    made = expand(encoder, scoring="binary")
    batch = collate(asked, made, Padding(0, "right", 0), CPU)
    outputs = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    loss = asked.loss(outputs, batch, LossOptions())
    # Options 2 + 2 + 3; right are the first, the second and the third.
    expected = -outputs.log_softmax(-1)[range(7), [1, 0, 0, 1, 0, 0, 1]]
    assert (loss.sum / loss.weight).item() == pytest.approx(expected.mean().item())
    prediction = asked.decode(RECORD, made, list(outputs.numpy()))
    right = outputs.softmax(-1)[:, 1]
    assert prediction["probabilities"][2] == pytest.approx((right[4:] / right[4:].sum()).tolist())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"options": OPTIONS[:2]}, r"f:1: 3 blanks '_' in the article, 2 lists of options and 3 answers"),
        ({"answers": ["A", "B"]}, r"3 lists of options and 2 answers"),
        ({"answers": ["A", "C", "C"]}, r"f:1, blank 2: unknown answer 'C'; known: A, B"),
        ({"article": "word0", "options": [], "answers": []}, r"0 blanks"),
        ({"article": "word0 _ ＿ ＿ word1"}, r"1 blanks .*; it has 2 in full-width characters: write '_' in ASCII"),
    ],
)
def test_mistakes_are_named(encoder: Path, values: dict[str, Any], message: str) -> None:
    """Catches options of one blank given to the next."""
    record = Record("f:1", {**RECORD.values, **values})
    with pytest.raises(UserError, match=message):
        kind().expand(record, make(encoder), True)


def test_answers_may_have_other_names(encoder: Path) -> None:
    """Catches task.labels being ignored, and an answer that depends on rounding if options are equally probable."""
    asked = kind(labels=("1", "2", "3"))
    record = Record("f:1", {**RECORD.values, "answers": ["1", "2", "3"]})
    made = asked.expand(record, make(encoder), True)
    assert [example.target for example in made] == [0, 1, 2]
    outputs = np.array([[0], [1], [0], [1], [1], [1 + 2e-7], [0]], dtype=np.float32)
    assert asked.decode(record, made, list(outputs))["answers"] == ["2", "2", "1"]


@pytest.mark.parametrize("options", [[["word1"]], ["word1", "word2"], [["word1", " "]], "word1", None])
def test_options_are_lists_of_lists(tmp_path: Path, options: Any) -> None:
    """Catches a traceback for one flat list of options, and for null."""
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({"article": "a _ b", "options": options, "answers": ["A"]}))
    with pytest.raises(UserError, match=r"f\.jsonl:1: expected a list with two or more options for each blank in"):
        read_table(path, Config(train="f", validation="f").columns)


@pytest.fixture
def exam(encoder: Path, tmp_path: Path) -> dict[str, Any]:
    """A zero-shot run on articles of one or two blanks."""
    rows = [
        {"article": "word0 _ word1", "options": OPTIONS[:1], "answers": ["AB"[n % 2]]}
        if n % 3
        else {"article": "word0 _ word1 _ word2", "options": OPTIONS[:2], "answers": ["A", "B"]}
        for n in range(12)
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "run": {"dir": str(tmp_path / "run")},
        "task": {"name": "exam", "kind": "cloze", "scoring": "zero_shot", "test": str(tmp_path / "test.jsonl")},
        "model": {"init_from": str(encoder), "max_seq_length": 24},
        "training": {"precision": "fp32"},
    }


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_excerpts_are_short_in_any_script() -> None:
    """Catches whole articles in each row of the predictions of a Chinese exam, and spaces that it does not have."""
    chinese = ["他" * 300, "了𠮷，", f"用 PyTorch 。{'好' * 300}"]
    assert _excerpt(chinese, 0) == f"{'他' * 60}___了𠮷，_用 PyTorch 。{'好' * 45}"
    assert _excerpt(["one " * 200, "  two ", ".\n three"], 1) == f"{'one ' * 13}_ two ___. three"


def test_zero_shot_needs_no_training(exam: dict[str, Any], tmp_path: Path) -> None:
    """Catches a run that asks for a training split, trains, or has no interval; and tables that contradict it."""
    results = run(build_config(FinetuneConfig, exam, {}))
    accuracy = results["splits"]["test"]["accuracy"]
    low, high = accuracy["interval"]
    assert low <= accuracy["mean"] <= high
    seed = tmp_path / "run" / "seed-42"
    rows = read(seed / "predictions-test.csv")
    assert list(rows[0]) == ["row", "blank", "text", "options", "answers", "predicted", "probabilities"]
    assert len(rows) == 16
    assert [row["row"] for row in rows[:3]] == ["1", "1", "2"]
    assert [row["text"] for row in rows[:3]] == [
        "word0 ___ word1 _ word2",
        "word0 _ word1 ___ word2",
        "word0 ___ word1",
    ]
    right = [row["answers"] == row["predicted"] for row in rows]
    assert accuracy["mean"] == pytest.approx(np.mean(right))
    by_blank = read(seed / "accuracy_by_blank-test.csv")
    assert [row["blanks"] for row in by_blank] == ["12", "4"]
    assert len(read(seed / "accuracy_by_article-test.csv")) == 12
    assert len(read(seed / "worst-test.csv")) == 16
    assert not (seed / "epochs.csv").exists()
    assert BertForMaskedLM.from_pretrained(seed / "model")


def test_articles_have_the_numbers_of_their_predictions() -> None:
    """Catches tables that cannot be joined after a row that is skipped."""
    values = {"article": "a _", "options": [["x", "y"]], "answers": ["B"]}
    records = [Record("", values, row=number) for number in (1, 4)]
    predictions = [{"answers": [answer], "probabilities": [[0.4, 0.6]]} for answer in "AB"]
    articles = kind().breakdowns(records, predictions)["accuracy_by_article"]
    assert [(row["row"], row["accuracy"]) for row in articles] == [(1, 0.0), (4, 1.0)]
    assert [row["row"] for row in prediction_rows(kind(), records, predictions)] == [1, 4]


def test_equal_options_are_no_answer() -> None:
    """Catches a collapsed model that is right, and not reported, if all right options come first; and a calibration
    error with another accuracy."""
    record = Record("", {"article": "a _ b _", "options": [["x", "y"], ["x", "y", "z"]], "answers": ["A", "A"]})
    for second, accuracy, error in ([1 / 3, 1 / 3, 1 / 3], 0.0, (1 / 2 + 1 / 3) / 2), ([0.4, 0.3, 0.3], 0.5, 0.55):
        predictions = [{"answers": ["A", "A"], "probabilities": [[0.5, 0.5], second]}]
        assert kind().scores([record], predictions) == {"accuracy": accuracy}
        assert kind().is_collapsed([record], predictions) == (not accuracy)
        assert calibration_error(kind().classified([record], predictions)) == pytest.approx(error)


def test_blanks_are_calibrated() -> None:
    """Catches a temperature that is fitted over articles, or that mixes the blanks of one."""
    record = Record("", {"article": "a _ b _", "options": [["x", "y"], ["x", "y", "z"]], "answers": ["B", "A"]})
    prediction = {"answers": ["A", "A"], "probabilities": [[0.8, 0.2], [0.5, 0.25, 0.25]]}
    classified = kind().classified([record], [prediction])
    assert classified.targets.tolist() == [1, 0]
    assert classified.probabilities.tolist() == [[0.8, 0.2, 0.0], [0.5, 0.25, 0.25]]
    first, second = kind().calibrate(prediction, 2.0)["probabilities"]
    assert first == pytest.approx([2 / 3, 1 / 3])
    assert second == pytest.approx([2**0.5 / (2**0.5 + 2), 1 / (2**0.5 + 2), 1 / (2**0.5 + 2)])


def test_a_model_that_is_not_trained_is_scored_once(
    exam: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches equal scores of several seeds, whose deviation of 0 looks like a result; one random model; and a config
    that is said to lack seeds that it names."""
    (tmp_path / "exam.yaml").write_text(json.dumps(exam))
    overrides = {"training.seeds": "3,4"}
    finetune(tmp_path / "exam.yaml", overrides)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["seeds"], results["splits"]["test"]["accuracy"]["std"]) == ([3], None)
    shutil.copytree(tmp_path / "run" / "seed-3", tmp_path / "run" / "seed-4")  # of version 0.2.0
    finetune(tmp_path / "exam.yaml", overrides)
    assert "not one of training.seeds" not in "".join(capsys.readouterr())
    random = load_run_config(tmp_path / "exam.yaml", {**overrides, "model.weights": "random"})
    assert random.training.seeds == (3, 4)


def test_a_dry_run_says_that_nothing_is_trained(
    exam: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback where updates are counted, for a task without a training split."""
    (tmp_path / "exam.yaml").write_text(json.dumps(exam))
    finetune(tmp_path / "exam.yaml", dry_run=True)
    assert "nothing is trained" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_task_without_training_has_no_classes_to_weight(exam: dict[str, Any]) -> None:
    """Catches a traceback for the training split that it lacks."""
    exam["training"] |= {"class_weights": "balanced"}
    with pytest.raises(UserError, match=r"training\.class_weights: tasks of kind 'cloze' have no classes to weight"):
        run(build_config(FinetuneConfig, exam, {}))


def test_a_training_split_is_not_used_zero_shot(exam: dict[str, Any], tmp_path: Path) -> None:
    """Catches a run that reads, or even splits, training data that it does not need; without a split to score, a
    traceback."""
    exam["task"] |= {"train": str(tmp_path / "missing.jsonl")}
    with pytest.raises(UserError, match=r"nothing to score: task\.validation and task\.test are missing"):
        run(build_config(FinetuneConfig, {**exam, "task": {**exam["task"], "test": None}}, {}))
    assert set(run(build_config(FinetuneConfig, exam, {}))["splits"]) == {"test"}


def test_an_exam_without_answers_is_predicted(exam: dict[str, Any], tmp_path: Path) -> None:
    """Catches a zero-shot run that needs the answers."""
    path = Path(exam["task"]["test"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps({key: row[key] for key in ("article", "options")}) for row in rows))
    assert run(build_config(FinetuneConfig, exam, {}))["splits"] == {}
    rows_found = read(tmp_path / "run" / "seed-42" / "predictions-test.csv")
    assert list(rows_found[0]) == ["row", "blank", "text", "options", "predicted", "probabilities"]
    predictor = Predictor.load(tmp_path / "run" / "seed-42" / "model", precision="fp32")
    prediction = predictor.predict([{"article": rows[0]["article"], "options": rows[0]["options"]}])[0]
    assert prediction["answers"] == [row["predicted"] for row in rows_found[:2]]


def test_threads_share_a_zero_shot_model(encoder: Path) -> None:
    """Catches a hook of one thread that chooses the positions for the sequences of another."""
    asked, made = kind(scoring="zero_shot"), expand(encoder, scoring="zero_shot", context="between")
    model = BertForMaskedLM.from_pretrained(encoder).eval()
    batches = [collate(asked, [example], Padding(0, "right", 0), CPU) for example in made]
    forward = torch.inference_mode()(partial(asked.forward, model))
    expected = [forward(batch) for batch in batches]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet within a forward pass
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(forward, batches * 50))
    finally:
        sys.setswitchinterval(interval)
    for scores, right in zip(found, expected * 50, strict=True):
        torch.testing.assert_close(scores, right)


def test_a_model_without_a_masked_lm_head_is_refused(exam: dict[str, Any], encoder: Path, tmp_path: Path) -> None:
    """Catches zero-shot scores of a head with random weights."""
    model = BertForMaskedLM.from_pretrained(encoder)
    shutil.copytree(encoder, tmp_path / "headless")
    model.bert.save_pretrained(tmp_path / "headless")
    exam["model"]["init_from"] = str(tmp_path / "headless")
    with pytest.raises(UserError, match=r"headless: its weights lack cls\.predictions.*, and the task is not trained"):
        run(build_config(FinetuneConfig, exam, {}))


@pytest.mark.parametrize("article", ['he said "_ is red"', "Paris _ red", "_ is red", "the(_) red"])
def test_options_have_the_tokens_that_they_have_in_a_text(tmp_path: Path, article: str) -> None:
    """Catches a space before an option that the text does not have, which byte-level BPE gives a token of its own."""
    special = {role: f"<{role}>" for role in ("cls_token", "sep_token", "pad_token", "unk_token", "mask_token")}
    words = ["Paris", "London", "said", "red", "is", "he", "the"]
    lines = [f'{word} {word} ({word}) "{word}"' for word in words]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(9 * lines, vocab_size=400, min_frequency=1, special_tokens=[*special.values()])
    ends = [(special[role], tokenizer.token_to_id(special[role])) for role in ("sep_token", "cls_token")]
    tokenizer.post_processor = RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **special).save_pretrained(tmp_path)
    encode = make(tmp_path)
    values = {"article": article, "options": [["Paris", "London"]]}
    asked = kind(scoring="multiple_choice").expand(Record("f:1", values), encode, False)
    found = [sequence.input_ids.tolist()[1:-1] for sequence in asked[0].sequences]
    natural = [article.replace("_", option) for option in ("Paris", "London")]
    assert found == [encode.ids(text) for text in natural]


@pytest.mark.parametrize("article", ["_ red", "(_) red", "Paris _ red"])
def test_options_have_the_word_marks_that_they_have_in_a_text(article: str) -> None:
    """Catches an option of SentencePiece that is a word after a bracket, or no word at the beginning of a text."""
    specials = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>"]
    pieces = ["▁", "▁(", "(", ")", "Paris", "▁Paris", "London", "▁London", "▁red"]
    tokenizer = XLNetTokenizer(vocab=[*((token, 0.0) for token in specials), *((piece, -3.0) for piece in pieces)])
    encode = Encoder(tokenizer, 16, token_types=True)
    (asked,) = kind().expand(Record("f:1", {"article": article, "options": [["Paris", "London"]]}), encode, False)
    found = [sequence.input_ids.tolist()[:-2] for sequence in asked.sequences]  # <sep> and <cls> are at the end
    assert found == [encode.ids(article.replace("_", option)) for option in ("Paris", "London")]
