"""Share of wall time spent on checkpoints: written in the background, and while training waits.

    python -m benchmarks.checkpoints --source FILE --tokenizer DIR [--every 100] [--steps 220] [--rounds 3]

The same model (30 M parameters) is trained on the same text, on one rank: without checkpoints, with one every `every`
steps, and with one every `every` steps that training waits for. They alternate, so that a slow minute of the machine
affects all. The steps after the first `WARM` and before the last are timed; every run saves a checkpoint at the last
step and waits for it. All runs must have the same losses.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import fire
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import OUR_ALLOCATOR, describe_machine, spread
from benchmarks.pretraining_runs import Config, RunSettings, build_corpus, read_steps

WARM = 20
_MODEL = {"hidden_size": 384, "num_hidden_layers": 10, "num_attention_heads": 6, "intermediate_size": 1536}
_LENGTH = 128
_RANK = "import runpy; runpy.run_module('pretrain.run', run_name='__main__')"
_WAITING_RANK = (
    "from pretrain.training.checkpointer import Checkpointer as C; save = C.save\n"
    "def wait(self, progress): save(self, progress); self.wait()\n"
    f"C.save = wait\n{_RANK}"
)


class Measured(NamedTuple):
    seconds: float  # of the timed steps
    waited: float  # for checkpoints, in these steps
    memory: float  # peak of rank 0, GB
    losses: tuple[float, ...]


def checkpoints(
    source: str,
    tokenizer: str,
    *,
    every: int = 100,
    steps: int = 220,
    rounds: int = 3,
    precision: str = "bf16",
    update_tokens: int = 4096,
) -> None:
    """Measure and print a table.

    Args:
        source: text file, one document per line
        tokenizer: Hugging Face folder, or one with a vocab.txt
        every: steps between checkpoints
        steps: of a run
        rounds: how often each kind of run is made
        precision: bf16 or fp32
        update_tokens: real tokens of an update, about
    """
    measured: dict[str, list[Measured]] = {"none": [], "in the background": [], "training waits": []}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        settings = RunSettings(
            build_corpus(source, tokenizer, work / "corpus"), _MODEL, precision, _LENGTH, update_tokens
        )
        for number in range(rounds):
            for name, runs in measured.items():
                config = settings.timed_config(steps)
                config["optimizer"] = {"lr": 1e-5}  # a run whose gradients spike would end
                config["checkpoint"]["every_steps"] = None if name == "none" else every
                runs.append(_run(config, work / f"{name.replace(' ', '-')}-{number}", name == "training waits"))
                print(f"round {number + 1} of {rounds}: {name}: {runs[-1][:3]}", file=sys.stderr)
    if len({run.losses for runs in measured.values() for run in runs}) != 1:
        raise SystemExit("the losses of the runs differ")
    _print(measured, f"{steps - 1 - WARM} steps, a checkpoint every {every}, {precision}")


def _run(config: Config, folder: Path, waits: bool) -> Measured:
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    command = [sys.executable, "-c", _WAITING_RANK if waits else _RANK, "--config", str(path), f"--run.dir={folder}"]
    subprocess.run(command, env=os.environ | OUR_ALLOCATOR | threads, stdout=sys.stderr, check=True)
    steps = read_steps(folder)
    waited = sum(step.event["checkpoint_seconds"] for step in steps[WARM:-1])
    return Measured(
        waited + sum(step.seconds for step in steps[WARM:-1]),
        waited,
        max(step.event["memory"] for step in steps) / 1e9,
        tuple(step.event["loss"] for step in steps),
    )


def _print(measured: dict[str, list[Measured]], title: str) -> None:
    table = Table("checkpoints", "seconds", "cost", "training waits, s", "peak memory, GB", title=title)
    without = measured["none"]
    for name, runs in measured.items():
        cost = [run.seconds / other.seconds - 1 for run, other in zip(runs, without, strict=True)]
        table.add_row(
            name,
            spread([run.seconds for run in runs], ".1f"),
            "" if runs is without else spread(cost, ".1%"),
            f"{statistics.median(run.waited for run in runs):.2f}",
            f"{max(run.memory for run in runs):.2f}",
        )
    Console(width=110).print(table)
    print(describe_machine())


if __name__ == "__main__":
    fire.Fire(checkpoints)
