"""The texts that pretraining text is decontaminated against."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from experiment.config import load_config
from experiment.decontamination import EvaluationText, texts_digests
from experiment.errors import UserError
from experiment.run_files.provenance import write_origin
from experiment.run_files.run_folder import RunFolder
from finetune.config import FinetuneConfig
from finetune.data.records import read_table
from finetune.data.splits import read_splits
from finetune.encoding.encoder import turn_joiner
from finetune.evaluation_texts import contamination_warnings, evaluation_texts, texts_of


def write(folder: Path, name: str, *lines: str) -> Path:
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return folder / name


def config(folder: Path, *splits: str, kind: str = "classification", columns: str = "{text: a, text_pair: b}") -> str:
    files = "".join(f"  {split}: {folder / split}.tsv\n" for split in splits)
    return str(
        write(
            folder,
            "task.yaml",
            f"run: {{dir: r}}\nmodel: {{init_from: m}}\ntask:\n  kind: {kind}\n  columns: {columns}\n{files}",
        )
    )


def test_texts_of_validation_and_test_with_their_rows(tmp_path: Path) -> None:
    """Catches labels among the texts, one of a pair that is left out, and a test split without labels."""
    write(tmp_path, "train.tsv", "a\tb\tlabel", "t\tu\t1")
    write(tmp_path, "validation.tsv", "a\tb\tlabel", "v one\tv two\t0")
    write(tmp_path, "test.tsv", "a\tb", "t one\tt two")
    found = evaluation_texts(config(tmp_path, "train", "validation", "test"))
    assert [(text.split, text.place.rpartition("/")[2], text.text) for text in found] == [
        ("validation", "validation.tsv:2", "v one"),
        ("validation", "validation.tsv:2", "v two"),
        ("test", "test.tsv:2", "t one"),
        ("test", "test.tsv:2", "t two"),
    ]


def test_rows_with_the_label_dash_count(tmp_path: Path) -> None:
    """Catches rows that are evaluated, as the training split has many with this label, and not decontaminated."""
    write(tmp_path, "train.tsv", "a\tb\tlabel", *(f"t\tu\t{label}" for label in "xyz-" * 3))
    write(tmp_path, "test.tsv", "a\tb\tlabel", *(f"row {number}\tu\t{label}" for number, label in enumerate("xy-" * 4)))
    write(tmp_path, "validation.tsv", "a\tb\tlabel", "v one\tu\t-", *(f"v\tu\t{label}" for label in "xyz" * 4))
    found = evaluation_texts(config(tmp_path, "train", "validation", "test"))
    assert len(found) == 2 * (13 + 12)


def test_without_a_validation_file_the_drawn_part_counts(tmp_path: Path) -> None:
    """Catches a split that fine-tuning draws from the training split and evaluates on."""
    write(tmp_path, "train.tsv", "a\tb\tlabel", *(f"text {number}\tx\t{number % 2}" for number in range(40)))
    found = evaluation_texts(config(tmp_path, "train"))
    assert {text.split for text in found} == {"validation"}
    assert len(found) == 8


def dialogue_config(folder: Path, dialogue: dict[str, object], **others: object) -> FinetuneConfig:
    task = {
        "columns": {"text": "a", "label": "label"},
        "special_tokens_in_text": True,
        "train": str(folder / "train.tsv"),
    }
    tree = {"run": {"dir": "r"}, "model": {"init_from": "m"}, "task": {**task, "dialogue": dialogue, **others}}
    return load_config(FinetuneConfig, write(folder, "task.yaml", yaml.safe_dump(tree)))


@pytest.mark.parametrize(
    ("dialogue", "others", "reads"),
    [
        ({"group": "group", "turns": 1}, {}, 1),
        ({"previous": ["group"]}, {"kind": "embedding", "columns": {"text": "a", "text_pair": "b"}}, 2),
    ],
    ids=["turns", "queries"],
)
def test_the_drawn_dialogues_are_the_ones_of_fine_tuning(
    tmp_path: Path,
    encoder: Path,
    dialogue: dict[str, object],
    others: dict[str, object],
    reads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches turns that are drawn one by one, and queries that are drawn without their previous turns, so that other
    texts than the evaluated ones leave the corpus; also a file of turns that is parsed twice."""
    turns = (f"text {number % 50}\t{number % 2}\t{number // 4}\treply" for number in range(120))
    write(tmp_path, "train.tsv", "a\tlabel\tgroup\tb", *turns)
    task = dialogue_config(tmp_path, dialogue, **others).task
    drawn = read_splits(task, turn_joiner(encoder, task))["validation"].records
    read = Mock(wraps=read_table)
    monkeypatch.setattr("finetune.evaluation_texts.read_table", read)
    found = texts_of(task)
    assert {text.place for text in found} == {record.place for record in drawn}
    assert all(text.text.count("text") <= 1 for text in found)
    assert read.call_count == reads


def test_previous_turns_in_columns_are_evaluated_too(tmp_path: Path) -> None:
    """Catches texts that the model reads, and that stay in the corpus."""
    turns = (f"text {number}\t{number % 2}\tbefore {number}" for number in range(40))
    write(tmp_path, "train.tsv", "a\tlabel\tp", *turns)
    found = [text.text.partition(" ") for text in texts_of(dialogue_config(tmp_path, {"previous": ["p"]}).task)]
    assert {number for word, _, number in found if word == "before"} == {n for word, _, n in found if word == "text"}


def test_training_rows_without_labels_are_reported(tmp_path: Path) -> None:
    """Catches a traceback of `deepcloze clean` for a misspelled column."""
    write(tmp_path, "train.tsv", "a\tb\tlabels", *(f"text {number}\tx\t0" for number in range(40)))
    with pytest.raises(UserError, match=r"train\.tsv:1: no column 'label'"):
        evaluation_texts(config(tmp_path, "train"))


def test_a_corpus_that_was_not_decontaminated_is_named(tmp_path: Path) -> None:
    """Catches a warning without a reason, as in a watch, which reads no test split, and none although the texts of the
    task have changed since, or only one of its splits is known."""
    write(tmp_path, "validation.tsv", "a\tb", "v one\tv two")
    write(tmp_path, "test.tsv", "a\tb", "t one\tt two")
    file = config(tmp_path, "validation", "test")
    task = load_config(FinetuneConfig, file).task
    assert list(contamination_warnings(task, tmp_path)) == []

    def record(*digests: str) -> None:
        known = {"run_id": "1", "ancestors": [], "decontaminated": {"books": digests}}
        write_origin(tmp_path, RunFolder(tmp_path), known, step=3)

    validation, test = texts_digests(evaluation_texts(file)).values()
    assert texts_digests([EvaluationText("test", "", text) for text in ("t one", "t two")]) == {"test": test}
    record(validation)
    assert len(list(contamination_warnings(task, tmp_path))) == 1
    record(validation, test)
    assert list(contamination_warnings(task, tmp_path)) == []
    assert list(contamination_warnings(task.model_copy(update={"test": None}), tmp_path)) == []
    write(tmp_path, "test.tsv", "a\tb", "t one\tt three")
    (line,) = contamination_warnings(task, tmp_path)
    assert line.startswith("the model was pretrained on books, which is not known to be decontaminated")


def test_the_blanks_of_a_cloze_exam_are_filled(tmp_path: Path) -> None:
    """Catches blanks that no text matches, so that pretraining text keeps the answers."""
    exam = {"article": "She drove _ to the _ station.", "options": [["slowly", "quickly"], ["police", "gas"]]}
    for split, rows in (("validation", {**exam, "answers": ["B", "A"]}), ("test", exam)):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(rows) + "\n")
    files = "".join(f"  {split}: {tmp_path / split}.jsonl\n" for split in ("validation", "test"))
    path = write(tmp_path, "cloze.yaml", f"run: {{dir: r}}\nmodel: {{init_from: m}}\ntask:\n  kind: cloze\n{files}")
    found = [text.text for text in evaluation_texts(str(path))]
    assert found == ["She drove quickly to the police station.", "She drove ", " to the ", " station."]


def test_each_choice_is_a_text_and_words_are_one(tmp_path: Path) -> None:
    """Catches choices without spaces, as in Chinese, that are taken for the words of one text, which no line has, and
    numbers and Latin words with spaces between their characters."""
    choices = {"question": "谁写了红楼梦？", "choices": ["曹雪芹", "吴承恩"], "label": "0"}
    cases = [("multiple_choice", choices, ["曹雪芹", "吴承恩", "谁写了红楼梦？"])]
    for words, text in (
        (["New York", "is", "large"], "New York is large"),
        ([*"MKTAY"], "M K T A Y"),
        ([*"특히 영동"], "특히 영동"),
        ([*"2003年加入ABB", "❤️", "……"], "2003年加入ABB❤️……"),
    ):
        cases.append(("token_classification", {"tokens": words, "tags": ["O"] * len(words)}, [text]))
    for kind, row, expected in cases:
        (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
        task = f"{{kind: {kind}, test: {tmp_path}/test.jsonl, format: jsonl}}"
        path = write(tmp_path, "task.yaml", f"{{run: {{dir: r}}, model: {{init_from: m}}, task: {task}}}")
        assert [text.text for text in evaluation_texts(str(path))] == expected


def test_negatives_are_evaluated_too_where_a_split_has_them(tmp_path: Path) -> None:
    """Catches negatives that stay in the corpus, and a traceback for a split without their column."""
    write(tmp_path, "validation.tsv", "a\tb", "v one\tv two")
    write(tmp_path, "test.tsv", "a\tb\tn", 't one\tt two\t["n one", "n two"]')
    columns = "{text: a, text_pair: b, negative: n}"
    found = evaluation_texts(config(tmp_path, "validation", "test", kind="embedding", columns=columns))
    assert [text.text for text in found] == ["v one", "v two", "t one", "t two", "n one", "n two"]


def test_a_task_without_evaluation_texts(tmp_path: Path) -> None:
    write(tmp_path, "test.tsv", "a\tb\tlabel", " \t \t1")
    with pytest.raises(UserError, match=r"^it has no validation or test texts"):
        evaluation_texts(config(tmp_path, "test"))
