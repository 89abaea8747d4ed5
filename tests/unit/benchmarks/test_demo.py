"""Parts of the demo that can be tested without running it."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

import benchmarks.demo
from benchmarks.demo import (
    EVALUATION,
    MINUTES,
    OTHER_MINUTES,
    PRETRAINING,
    TASK,
    Stopwatch,
    comparison,
    main,
    prepare_folder,
)
from documented import commands
from experiment.config import load_config
from experiment.output_folder import lock_output
from experiment.results.page import Table
from experiment.run_files.run_folder import RunFolder
from finetune.config import FinetuneConfig
from pretrain.config import PretrainConfig

REPOSITORY = Path(__file__).resolve().parents[3]


def test_a_folder_not_made_by_the_demo_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--output ~` would delete the home folder."""
    precious = tmp_path / "thesis.tex"
    precious.write_text("all of it")
    assert main(["--output", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert precious.read_text() == "all of it"


def test_the_folder_of_an_earlier_demo_is_emptied(tmp_path: Path) -> None:
    """The second demo would resume and report what the first one left."""
    output = tmp_path / "demo"
    prepare_folder(output)
    (output / "docs.jsonl").write_text("of the first demo")
    prepare_folder(output)
    assert not (output / "docs.jsonl").exists()


def test_the_folder_of_a_running_demo_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second demo would delete the text and checkpoints of the first one."""
    monkeypatch.setattr(benchmarks.demo, "demo", lambda *_: pytest.fail("it began"))
    output = tmp_path / "demo"
    with lock_output(output, "--output"):
        assert main(["--output", str(output)]) == 2
    assert f"demo: --output {output}: another process is writing it" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback."""
    (tmp_path / "file").touch()
    assert main(["--output", str(tmp_path / "file" / "demo")]) == 2
    assert capsys.readouterr().err.startswith(f"demo: --output {tmp_path / 'file' / 'demo'}: ")


def test_the_recipes_fit_the_demo() -> None:
    """The demo would not take the time that it says; metrics of another evaluation would not be found."""
    pretraining = load_config(PretrainConfig, REPOSITORY / PRETRAINING)
    task = load_config(FinetuneConfig, REPOSITORY / TASK)
    assert pretraining.schedule.budget_seconds == 60 * MINUTES
    assert list(pretraining.corpus.eval) == [EVALUATION]
    assert (task.task.columns.text, task.task.columns.label) == ("sentence", "package")


def test_the_readme_says_how_long_the_demo_takes() -> None:
    """A new user with a stopwatch would find the tour wrong."""
    shortest, longest = (MINUTES + others for others in OTHER_MINUTES)
    announced = f"about {shortest:g} minutes on two idle cores with AVX-512, about {longest:g} without"
    text = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    assert announced in text
    assert announced in (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    ((minutes, seconds),) = re.findall(r"(\d+)m(\d+)s in all", text)
    assert f"a run of {minutes}m{seconds}s" in text
    assert int(minutes) + int(seconds) / 60 <= shortest


def test_parts_of_the_demo_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts whose times do not add up to the whole."""
    clock = iter([100.0, 120.0, 180.0])
    monkeypatch.setattr(benchmarks.demo.time, "monotonic", lambda: next(clock))
    stopwatch = Stopwatch()
    stopwatch.begin("first")
    stopwatch.begin("second")
    lines = [line.split(maxsplit=1) for line in stopwatch.lines()]
    assert lines == [["20s", "first"], ["1m00s", "second"], ["1m20s", "in all"]]


def test_the_table_has_before_and_after_in_their_columns(tmp_path: Path) -> None:
    """Swapped columns would show pretraining as harmful."""
    run = RunFolder(tmp_path)
    events = [
        {
            "step": 0,
            "eval/documentation/loss": 9.0,
            "eval/documentation/perplexity": 8103.0,
            "eval/documentation/accuracy": 0.0,
        },
        {
            "step": 8,
            "eval/documentation/loss": 5.0,
            "eval/documentation/perplexity": 148.0,
            "eval/documentation/accuracy": 0.2,
        },
    ]
    run.metrics.write_text("".join(json.dumps(event) + "\n" for event in events))
    scores = {"loss": 4.0, "perplexity": 54.6, "accuracy": 0.25}
    results = {
        weights: {"splits": {"test": {"accuracy": {"values": [mean] * 3, "mean": mean, "std": 0.01}}}}
        for weights, mean in (("random", 0.3), ("pretrained", 0.4))
    }
    rows = {row[0].split(",")[0]: tuple(row[1:]) for row in comparison(run, scores, results).rows}
    assert rows["held-out loss"] == ("9.000", "4.000")
    assert rows["masked-token accuracy"] == ("0.0%", "25.0%")
    assert rows["task accuracy on test"] == ("30.0% ± 1.0%", "40.0% ± 1.0%")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[set[str]]:
    """The words of the commands that the demo runs, in a folder of its own. The commands themselves do nothing."""
    run: list[set[str]] = []

    def deepcloze(name: str, **flags: Any) -> str:
        run.append({"deepcloze", *benchmarks.demo.command(name, **flags)[1:]})
        return '{"corpus-heldout": {}}'

    def start(argv: list[str], **_: Any) -> subprocess.Popen[bytes]:
        run.append({"deepcloze", *argv[1:]})
        folder = next(Path(flag.removeprefix("--run.dir=")) for flag in argv if flag.startswith("--run.dir="))
        folder.mkdir()
        (folder / "results.json").write_text("{}", encoding="utf-8")
        return start_process(["true"])

    start_process = subprocess.Popen
    monkeypatch.setattr(benchmarks.demo, "deepcloze", deepcloze)
    monkeypatch.setattr(benchmarks.demo.subprocess, "Popen", start)
    for name in ("write_task", "stop_after", "write_combined_page"):
        monkeypatch.setattr(benchmarks.demo, name, lambda *_: True)
    monkeypatch.setattr(benchmarks.demo, "comparison", lambda *_: Table([], []))
    monkeypatch.chdir(tmp_path)
    return run


def test_the_readme_shows_the_commands_of_the_demo(run: list[set[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of the demo was changed, and the README, whose commands no other test runs, still has its old form."""
    monkeypatch.setattr(benchmarks.demo, "cpu_cores", lambda: 2)
    benchmarks.demo.demo(Path("runs/demo"))
    shown = [set(shlex.split(command.text)) for command in commands("README.md") if "runs/demo/" in command.text]
    assert shown
    for words in shown:
        assert words in run if "…" not in words else any(words - {"…"} < flags for flags in run), words


def test_the_demo_runs_on_one_core(run: list[set[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretraining would reject two ranks, after the demo has prepared the text."""
    monkeypatch.setattr(benchmarks.demo, "cpu_cores", lambda: 1)
    benchmarks.demo.demo(Path("runs/demo"))
    (pretrain,) = (words for words in run if "pretrain" in words)
    assert "--num_gpus=1" in pretrain


def test_the_demo_says_how_to_repeat_its_commands(run: list[set[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """The commands of the demo use the CPU; copied by hand, they would use the GPU or reject two ranks."""
    benchmarks.demo.demo(Path("runs/demo"))
    hint = "export DS_ACCELERATOR=cpu"
    assert hint in capsys.readouterr().err
    assert hint in (REPOSITORY / "README.md").read_text(encoding="utf-8")
