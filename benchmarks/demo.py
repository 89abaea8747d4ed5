"""The full pipeline on real text, in a few minutes on two CPU cores: `make demo`.

1. Read the documentation of Python and a few packages; extract a task from it (benchmarks/package_task.py).
2. Train a tokenizer, build a corpus.
3. Pretrain a small encoder for two minutes with two ranks under ZeRO (one on a machine with one core), stop the run
   halfway, resume it, evaluate it.
4. Fine-tune on the task from pretrained and from random weights, three seeds each, and compare.

Everything but the task and the comparison is a `deepcloze` command, which is printed. The demo uses the CPU even if
there are GPUs. Restarting it starts over.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.measuring import STOPPED, stop_after
from benchmarks.package_task import EXAMPLES, NAMES, make_package_task, read_package_documents, write_jsonl
from experiment.errors import UserError, readable_disk_errors
from experiment.files import REPOSITORY, read_json
from experiment.formatting import describe_duration, format_perplexity, print_table
from experiment.output_folder import lock_output
from experiment.process.cpu_cores import cpu_cores
from experiment.process.hardware import has_native_bf16
from experiment.results.charts import DotChart, DotCharts, Dots
from experiment.results.history import History
from experiment.results.page import PAGE, Block, Code, Heading, Page, Table, Text, write_page
from experiment.results.report.tasks import result_blocks
from experiment.results.report.training import training_blocks
from experiment.run_files.metrics_file import read_events
from experiment.run_files.run_folder import RunFolder

PRETRAINING, TASK = "pretrain/recipes/demo.yaml", "finetune/recipes/demo.yaml"
DEEPCLOZE = Path(sys.executable).with_name("deepcloze")
EVALUATION = "documentation"  # name of the held-out corpus in the recipe
TASK_SEED = 42
HELD_OUT_DOCUMENTS = 400
VOCABULARY = 8192
MARKER = ".demo"  # marks a folder made by the demo, which the next one may delete
FILES = 300  # read of each package: a few times what the run has time to train on
MINUTES = 2.0  # of pretraining
OTHER_MINUTES = (2, 3)  # of everything else, on two idle cores with AVX-512 and without; more than measured


class Stopwatch:
    """The time of each part of the demo."""

    def __init__(self) -> None:
        self._began: list[tuple[str, float]] = []

    def begin(self, part: str) -> None:
        """Print a heading. The part before it has ended."""
        self._began.append((part, time.monotonic()))
        Console(stderr=True).rule(part, align="left")

    def lines(self) -> Iterator[str]:
        """How long each part took, and all of them."""
        ends = [*(began for _, began in self._began[1:]), time.monotonic()]
        for (part, began), end in zip(self._began, ends, strict=True):
            yield f"{describe_duration(end - began):>8}  {part}"
        yield f"{describe_duration(ends[-1] - self._began[0][1]):>8}  in all"


def demo(output: Path, minutes: float = MINUTES) -> None:
    """Run the demo in the folder `output`. Raises UserError, or SystemExit if a command fails.

    `minutes`: of pretraining.
    """
    prepare_folder(output)
    shortest, longest = (describe_duration(60 * (minutes + others)) for others in OTHER_MINUTES)
    say(
        f"The demo prepares text, pretrains for {describe_duration(60 * minutes)}, and fine-tunes six times: about "
        f"{shortest} in all on two idle cores with AVX-512, {longest} without; longer beside other programs. "
        "It uses the CPU, also with GPUs; to repeat a command by hand: export DS_ACCELERATOR=cpu"
    )
    stopwatch = Stopwatch()

    stopwatch.begin("Text: the documentation on this machine, and a task extracted from it")
    deepcloze("python_docs", output=output / "docs.jsonl", packages=",".join(NAMES), files_per_package=FILES)
    description = write_task(output)

    stopwatch.begin("Tokenizer and corpus")
    text = output / "pretraining.jsonl"
    deepcloze("tokenizer", source=text, output=output / "tokenizer", vocab_size=VOCABULARY, lowercase=True)
    corpus, held_out = output / "corpus", output / "corpus-heldout"
    deepcloze("corpus", source=text, tokenizer=output / "tokenizer", output=corpus, holdout=HELD_OUT_DOCUMENTS)

    stopwatch.begin("Pretraining, stopped halfway and resumed")
    run = RunFolder(output / "pretraining")
    arguments: dict[str, Any] = {
        "config": PRETRAINING,
        "num_gpus": min(2, cpu_cores()),
        "run.dir": run.path,
        "corpus.train": corpus,
        f"corpus.eval.{EVALUATION}": held_out,
        "schedule.budget": f"{60 * minutes:.0f}s",
    }
    if not has_native_bf16("cpu"):
        arguments["engine.ds_config"] = "ds_configs/fp32_zero1.json"
    if stop_after(30 * minutes, command("pretrain", **arguments), run, environment()):
        say(f"stopped with exit code {STOPPED}. The same command resumes it:")
        deepcloze("pretrain", **arguments)
    else:
        say("the run has finished before it was stopped: this machine is slow or busy")

    stopwatch.begin("Evaluation on held-out text")
    scores = json.loads(deepcloze("evaluate", checkpoint=run.path, corpus=held_out, json=True))

    stopwatch.begin("Fine-tuning from random and from pretrained weights, three seeds each")
    results = finetune(output, run)

    stopwatch.begin("Report")
    table = comparison(run, scores[held_out.name], results)
    page = write_combined_page(output, run, table, results, description)
    print_table(table.columns, table.rows)
    print(f"\nreport, with the curves: {page}\n")
    print("\n".join(stopwatch.lines()))


def prepare_folder(output: Path) -> None:
    """Create or empty the folder. Raises UserError if it exists and was not made by the demo."""
    if output.exists() and not (output / MARKER).is_file():
        raise UserError(f"--output {output} exists and was not made by the demo; use another folder")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / MARKER).touch()


def write_task(output: Path) -> str:
    """Write the task and the pretraining text; return a description."""
    documents = read_package_documents(output / "docs.jsonl")
    task = make_package_task(documents, EXAMPLES, TASK_SEED)
    for split, examples in task.splits.items():
        write_jsonl(output / "task-data" / f"{split}.jsonl", examples)
    write_jsonl(output / "pretraining.jsonl", task.pretraining)
    sizes = ", ".join(f"{len(examples):,} {split}" for split, examples in task.splits.items())
    description = (
        f"The task: which of {len(NAMES)} packages is this sentence about? {sizes} sentences, balanced over packages, "
        f"one per document. Excluded: {task.repeated:,} sentences with eight consecutive words that occur in another "
        f"document too, and {task.giveaways:,} that name their package. The pretraining text is the documentation "
        f"of the same packages without the documents of validation and test: {len(task.pretraining):,} documents."
    )
    print(description)
    return description


def finetune(output: Path, run: RunFolder) -> dict[str, dict[str, Any]]:
    """Fine-tune on the task from random and from pretrained weights; return the contents of results.json.

    At the same time, with one thread each: a model as small as this keeps one core busy, not two.
    """
    files = {f"task.{split}": output / "task-data" / f"{split}.jsonl" for split in EXAMPLES}
    shared = {"config": TASK, "model.init_from": run.path, **files}
    folders = {weights: RunFolder(output / f"task-{weights}") for weights in ("random", "pretrained")}
    log, one_thread = output / "task-random.log", {**environment(), "OMP_NUM_THREADS": "1"}
    say(f"both at the same time, with one thread each; output of the first goes to {log}")
    started = []
    with log.open("wb") as file:
        for weights, shown in (("random", file), ("pretrained", None)):
            argv = command("finetune", **{"run.dir": folders[weights].path, "model.weights": weights, **shared})
            started.append(subprocess.Popen(argv, env=one_thread, stdout=shown, stderr=shown))
        for process in started:
            process.wait()
    for process in started:
        check("finetune", process.returncode)
    return {weights: read_json(folder.results) for weights, folder in folders.items()}


def comparison(run: RunFolder, scores: dict[str, float], results: dict[str, dict[str, Any]]) -> Table:
    """Random weights against pretrained ones, on held-out text and on the task."""
    before = next(event for event in read_events(run.metrics) if f"eval/{EVALUATION}/loss" in event)
    untrained = {metric: before[f"eval/{EVALUATION}/{metric}"] for metric in ("loss", "perplexity", "accuracy")}
    accuracy = {weights: of["splits"]["test"]["accuracy"] for weights, of in results.items()}
    seeds = len(accuracy["random"]["values"])
    return Table(
        ["", "random weights", "pretrained"],
        [
            ["held-out loss", f"{untrained['loss']:.3f}", f"{scores['loss']:.3f}"],
            ["held-out perplexity", *(format_perplexity(of["perplexity"]) for of in (untrained, scores))],
            ["masked-token accuracy", f"{untrained['accuracy']:.1%}", f"{scores['accuracy']:.1%}"],
            [
                f"task accuracy on test, mean ± std of {seeds} seeds",
                *(f"{accuracy[weights]['mean']:.1%} ± {accuracy[weights]['std']:.1%}" for weights in accuracy),
            ],
            ["task accuracy of a constant answer", *[f"{1 / len(NAMES):.1%}"] * 2],
        ],
    )


def write_combined_page(
    output: Path, run: RunFolder, table: Table, results: dict[str, dict[str, Any]], description: str
) -> Path:
    """One page with the comparison and the curves of all three runs."""
    directory = output / "report"
    accuracy = {f"{weights} weights": of["splits"]["test"]["accuracy"] for weights, of in results.items()}
    rows = [Dots(label, found["values"], found["mean"]) for label, found in accuracy.items()]
    chart = DotChart("Task accuracy on test, one dot per seed", rows)
    blocks: list[Block] = [table, Text(description), DotCharts("task", [chart])]
    blocks += training_blocks(History.of(run))
    for weights, of in results.items():
        folder = RunFolder(output / f"task-{weights}")
        blocks += [*result_blocks(folder, of), *training_blocks(History.of(folder), metric=of["metric"])]
    blocks += [
        Heading("Configs"),
        Code("pretraining", run.config.read_text(encoding="utf-8")),
        Code("task", RunFolder(output / "task-pretrained").config.read_text(encoding="utf-8")),
    ]
    return write_page(directory / PAGE, Page("deepcloze demo", blocks))


def command(name: str, **flags: Any) -> list[str]:
    """Print and return the command line."""
    given = [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in flags.items()]
    say(f"$ deepcloze {shlex.join([name, *given])}")
    return [str(DEEPCLOZE), name, *given]


def deepcloze(name: str, **flags: Any) -> str:
    """Run one command; return its output if it has --json. Raises SystemExit with its exit code if it fails."""
    kept = subprocess.PIPE if flags.get("json") else None
    argv = command(name, **flags)
    finished = subprocess.run(argv, env=environment(), stdout=kept, text=True, check=False)
    check(name, finished.returncode)
    if kept:
        print(finished.stdout, end="", flush=True)
    return finished.stdout or ""


def check(name: str, code: int) -> None:
    """Raises SystemExit if the command has failed."""
    if code:
        say(f"demo: deepcloze {name} failed with exit code {code}")
        raise SystemExit(code)


def environment() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for everything (runs/demo)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of pretraining ({MINUTES:g})")
    try:
        arguments = parser.parse_args(argv)
        output = arguments.output.absolute()
        os.chdir(REPOSITORY)
        output = output.relative_to(REPOSITORY) if output.is_relative_to(REPOSITORY) else output
        with readable_disk_errors(f"--output {output}: "), lock_output(output, "--output"):
            demo(output, arguments.minutes)
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
