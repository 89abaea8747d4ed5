"""Seconds from Enter to the first output of a command and to its end, for small work.

    python -m benchmarks.command_times [--rounds 5]

Fine-tunes on 600 sentences for one epoch, predicts ten rows, evaluates 100 documents, and runs commands that only look.
Beside them, Python and the libraries that the commands import. Rounds alternate; the first is not
counted, after which the files are in the system's cache.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire
from rich.console import Console
from rich.table import Table

from benchmarks.busy_machine import Inputs, write_inputs
from benchmarks.measuring import deepcloze, describe_machine, spread
from experiment.process.own_process import module_command, own_environment

_IMPORTS = ("pass", "import numpy", "import torch", "import torch, transformers")


def command_times(rounds: int = 5) -> None:
    """Measure and print a table.

    Args:
        rounds: how often each command runs
    """
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="deepcloze-commands-") as scratch:
        commands = _commands(write_inputs(Path(scratch)))
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


def _commands(inputs: Inputs) -> dict[str, list[str]]:
    """Arguments, in which OUTPUT is a new path."""
    lines = inputs.rows.read_text().splitlines()
    few, ten = (inputs.folder / name for name in ("600.csv", "10.csv"))
    few.write_text("\n".join(lines[:601]))
    ten.write_text("\n".join(lines[:11]))
    text, corpus = inputs.folder / "few.txt", inputs.folder / "few"
    text.write_text("\n".join((inputs.folder / "text.txt").read_text().splitlines()[:100]))
    tokenizer = str(inputs.folder / "tokenizer")
    deepcloze("corpus", "--source", str(text), "--tokenizer", tokenizer, "--output", str(corpus))
    once = ["--training.steps=null", "--training.epochs=1", "--training.evaluate_every=epoch", "--run.dir=OUTPUT"]
    deepcloze_argv = module_command("launcher")
    own = {
        "finetune, 600 sentences": ["finetune", "--config", str(inputs.task), f"--task.train={few}", *once],
        "predict, 10 rows": [
            "predict",
            "--model",
            str(inputs.finetuned),
            "--input",
            str(ten),
            "--output",
            "OUTPUT.csv",
        ],
        "evaluate, 100 documents": ["evaluate", "--checkpoint", str(inputs.pretrained), "--corpus", str(corpus)],
        "--help": ["--help"],
        "pretrain --help": ["pretrain", "--help"],
        "status": ["status", str(inputs.pretrained)],
        "validate": ["validate", str(inputs.pretrained / "config.yaml")],
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
