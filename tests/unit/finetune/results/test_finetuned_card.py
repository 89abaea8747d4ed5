import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiment.files import parse_json
from finetune.run import finetune
from launcher.cli import main


def read(run: Path, seed: int) -> str:
    return (run / f"seed-{seed}" / "model" / "README.md").read_text(encoding="utf-8")


def record_of(run: Path, seed: int) -> dict[str, Any]:
    return dict(parse_json((run / f"seed-{seed}" / "COMPLETE").read_text(encoding="utf-8")))


def test_the_card_has_the_results_of_its_seed(trained_run: Path) -> None:
    """Catches the scores of another seed or split, and a mean that is missing or of other seeds."""
    card, record = read(trained_run, 2), record_of(trained_run, 2)
    results = yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"]
    assert [result["dataset"]["split"] for result in results] == ["validation", "test"]
    for result in results:
        scores = record["scores"][result["dataset"]["split"]]
        assert {metric["name"]: metric["value"] for metric in result["metrics"]} == pytest.approx(scores, abs=1e-6)
    values = [record_of(trained_run, seed)["scores"]["test"]["macro_f1"] for seed in (1, 2)]
    assert "All 2 seeds of the run (1, 2):" in card
    mean = f"| test | macro_f1 | {statistics.mean(values):.4f} | {statistics.stdev(values):.4f} |"
    assert mean in card
    for label, scores in record["label_scores"]["test"].items():
        assert f"| {label} | {scores['precision']:.4f} |" in card


def test_the_card_says_what_the_model_was_trained_on(trained_run: Path, encoder: Path) -> None:
    """Catches a card without data, settings or encoder, or with the folders of the user."""
    card, data = read(trained_run, 1), record_of(trained_run, 1)["settings"]["data"]
    for split, rows in {"train": 80, "validation": 20, "test": 20}.items():
        assert f"| {split} | {split}.tsv | {rows} | {data[split]} | yes |" in card
    assert f"fine-tuned with deepcloze from {encoder.name}, with seed 1." in card
    assert "| training.lr | 0.03 |" in card
    assert "| labels | high, low |" in card
    assert "| text | text |" in card
    assert "# license: " in card
    for folder in (trained_run, encoder):
        assert str(folder.parent) not in card
    assert "<!--" not in card


def test_a_finished_card_is_not_overwritten(trained_run: Path, tmp_path: Path) -> None:
    """Catches a run of more seeds, or the same again, that replaces a card that its user has edited."""
    shutil.copytree(trained_run, tmp_path / "run")
    edited = tmp_path / "run" / "seed-1" / "model" / "README.md"
    edited.write_text("Mine.")
    before = read(tmp_path / "run", 2)
    overrides = {"run.dir": str(tmp_path / "run"), "training.seeds": "[1,2,3]"}
    finetune(trained_run.parent / "toy.yaml", overrides)
    assert edited.read_text() == "Mine."
    assert read(tmp_path / "run", 2) == before
    assert "All 3 seeds of the run (1, 2, 3):" in read(tmp_path / "run", 3)


def test_words_of_a_user_stay_when_the_mean_is_added(trained_run: Path, tmp_path: Path) -> None:
    """Catches a card that is rendered again at the end of a run."""
    finetune(trained_run.parent / "toy.yaml", {"run.dir": str(tmp_path / "run"), "training.seeds": "[1]"})
    first = tmp_path / "run" / "seed-1" / "model" / "README.md"
    assert "seeds of the run" not in first.read_text()
    first.write_text(first.read_text().replace("# license: apache-2.0", "license: mit"))
    finetune(trained_run.parent / "toy.yaml", {"run.dir": str(tmp_path / "run"), "training.seeds": "[1,2]"})
    assert "license: mit" in first.read_text()
    assert "All 2 seeds of the run (1, 2):" in first.read_text()


def test_a_card_without_scores_has_no_table_of_them(trained_run: Path, tmp_path: Path) -> None:
    """Catches a section of results without a row, also of the mean, for a run that has no split to score; a file that
    was trained on and is not named; and settings that are left out, or had no effect."""
    flags = {"task.test": "null", "training.fit_on": "train+validation", "model.config": "{hidden_dropout_prob: 0.25}"}
    flags |= {"training.steps": "3", "training.warmup_steps": "1"}
    finetune(trained_run.parent / "toy.yaml", {"run.dir": str(tmp_path / "run"), **flags})
    card = read(tmp_path / "run", 1)
    assert "| train | train.tsv + validation.tsv | 100 |" in card
    names = {"model.pooling", "model.config.hidden_dropout_prob", "training.steps", "training.warmup_steps"}
    for name in (*names, "training.epochs", "training.warmup_ratio"):
        assert (f"| {name} | " in card.replace("\\", "")) == (name in names), name
    assert "| metric |" not in card
    assert re.findall(r"(?m)^## .*", card)[:2] == ["## Usage", "## Data"]
    assert "<!--" not in card


@pytest.mark.parametrize("columns", ["text", "text, scene, who"])
def test_the_commands_in_the_card_run(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    """Catches a command with a flag that does not exist, or rows that `predict` does not accept, as of a dialogue
    without its group; and a fingerprint that is said to be of the texts alone."""
    run = trained_run
    if columns != "text":
        run, data = tmp_path / "run", tmp_path / "train.tsv"
        header, *rows = (trained_run.parent / "train.tsv").read_text().splitlines()
        data.write_text(f"{header}\tscene\twho\n" + "".join(f"{row}\t{at // 2}\tA\n" for at, row in enumerate(rows)))
        dialogue = {"task.dialogue": "{group: scene, speaker: who}", "task.special_tokens_in_text": "true"}
        files = {"task.train": str(data), "task.validation": "null", "task.test": "null"}
        flags = {"run.dir": str(run), "training.seeds": "[1]", "training.epochs": "1"}
        finetune(trained_run.parent / "toy.yaml", {**flags, **files, **dialogue})
    shutil.copytree(run / "seed-1" / "model", tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    card = Path("README.md").read_text(encoding="utf-8")
    assert f"The input of `predict` has the columns {columns}:\n" in card
    assert ("in the columns below, with the previous turns of each text" in card) == (columns != "text")
    (commands,) = re.findall(r"```bash\n(.*?)```", card, re.DOTALL)
    predict, serve = commands.splitlines()
    Path("rows.csv").write_text(f"{columns.replace(' ', '')}\nword1 word2{',1' * columns.count(',')}\n")
    assert main(predict.split()[1:]) == 0
    assert "predicted" in Path("predictions.csv").read_text()
    assert main([*serve.split()[1:], "--help"]) == 0
