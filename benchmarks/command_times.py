"""Seconds from Enter to the first output of a command and to its end, for small work.

    python -m benchmarks.command_times [--rounds 5]

Fine-tunes on 600 sentences for one epoch, predicts ten rows, evaluates 100 documents, and runs commands that only look.
Beside them, Python and the libraries that the commands import. Rounds alternate; the first is not
counted, after which the files are in the system's cache.
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import deepcloze, describe_machine, spread, write_small_run
from experiment.process.own_process import module_command, own_environment

_IMPORTS = ("pass", "import numpy", "import torch", "import torch, transformers")


def command_times(rounds: int = 5) -> None:
    """Measure and print a table.

    Args:
        rounds: how often each command runs
    """
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="deepcloze-commands-") as scratch:
        commands = _commands(Path(scratch))
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for number in range(rounds + 1):
            for name, argv in commands.items():
                measured = _time(argv, Path(scratch) / f"output-{number}")
                if number:
                    seconds[name].append(measured)
    table = Table("command", "to the first output, s", "to the end, s")
    for name, found in seconds.items():
        table.add_row(name, *(spread(column, ".2f") for column in zip(*found, strict=True)))
    Console(width=120).print(table)


def _commands(folder: Path) -> dict[str, list[str]]:
    """Write what the commands read. Returns their arguments, in which OUTPUT is a new path."""
    pretrained, finetuned, corpus = (str(folder / name) for name in ("pretrained", "finetuned", "few"))
    deepcloze("pretrain", "--config", str(write_small_run(folder)), f"--run.dir={pretrained}")
    lines = (folder / "text.txt").read_text().splitlines()
    (folder / "few.txt").write_text("\n".join(lines[:100]))
    tokenizer = str(folder / "tokenizer")
    deepcloze("corpus", "--source", str(folder / "few.txt"), "--tokenizer", tokenizer, "--output", corpus)
    draw, words = random.Random(2), " ".join(lines).split()
    rows = [f"{draw.choice('ab')},{' '.join(draw.choices(words, k=draw.randint(5, 40)))}" for _ in range(2000)]
    for number in (10, 600, 2000):
        (folder / f"{number}.csv").write_text("\n".join(["label,text", *rows[:number]]))
    task = {
        "run": {"dir": finetuned, "keep": "best"},
        "task": {"train": str(folder / "2000.csv"), "columns": {"label": "label", "text": "text"}},
        "model": {"init_from": pretrained, "max_seq_length": 64},
        "training": {"batch_size": 16, "steps": 2, "evaluate_every": 2, "seeds": [1]},
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    finetune = ["finetune", "--config", str(folder / "task.yaml")]
    deepcloze(*finetune)
    few = f"--task.train={folder / '600.csv'}"
    predict = ["predict", "--model", finetuned, "--input", str(folder / "10.csv")]
    once = ["--training.steps=null", "--training.epochs=1", "--training.evaluate_every=epoch", "--run.keep=none"]
    deepcloze_argv = module_command("launcher")
    own = {
        "finetune, 600 sentences": [*finetune, few, *once, "--run.dir=OUTPUT"],
        "predict, 10 rows": [*predict, "--output", "OUTPUT.csv"],
        "evaluate, 100 documents": ["evaluate", "--checkpoint", pretrained, "--corpus", corpus],
        "--help": ["--help"],
        "pretrain --help": ["pretrain", "--help"],
        "status": ["status", pretrained],
        "validate": ["validate", f"{pretrained}/config.yaml"],
        "completion bash": ["completion", "bash"],
    }
    python = {f"python -c '{code}'": [sys.executable, "-c", code] for code in _IMPORTS}
    return {name: [*deepcloze_argv, *arguments] for name, arguments in own.items()} | python


def _time(argv: list[str], output: Path) -> tuple[float, float]:
    """Return seconds to the first byte of output, and to the end of the process."""
    argv = [argument.replace("OUTPUT", str(output)) for argument in argv]
    environ = own_environment()
    start = time.monotonic()
    with subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout
        process.stdout.read(1)
        first = time.monotonic() - start
        rest = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)}: {rest.decode()[-500:]}")
    return first, time.monotonic() - start


if __name__ == "__main__":
    fire.Fire(command_times)
