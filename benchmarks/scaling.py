"""Tokens per second of one rank with all threads, and of several ranks that share them.

    python -m benchmarks.scaling --source FILE --tokenizer DIR [--ranks 2] [--updates 4096,16384,32768]

Both train the same model on the same text with the same real tokens per update and the same threads in total. They
alternate, so that a slow minute of the machine affects both. Whole training steps are timed, data work included, after
some untimed first steps. The share of communication comes from a profile of three of the untimed steps on rank 0: the
time in which it reduced gradients or waited for others; sending new weights is not included. Profiling slows that rank
down, so it waits less than usual. Peak memory is summed over all processes, shared pages counted once.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import fire

from benchmarks.measuring import PeakMemory, describe_machine, spread
from benchmarks.pretraining_runs import MODELS, Config, RunSettings, build_corpus, pretrain, tokens_per_second
from experiment.formatting import print_table
from pretrain.training.profiler import PROFILED, SKIPPED

_UNTIMED = SKIPPED + PROFILED + 1


class Measured(NamedTuple):
    tokens_per_second: float
    communication: float  # fraction of a step
    memory: int  # peak bytes of all processes


Rounds = list[tuple[Measured, Measured]]
"""Of one rank, and of several ranks."""


def scaling(
    source: str,
    tokenizer: str,
    *,
    ranks: int = 0,
    updates: Sequence[int] | int = (4096, 16384, 32768),
    precision: str = "bf16",
    model: str = "small",
    length: int = 128,
    steps: int = 12,
    rounds: int = 3,
) -> None:
    """Measure both and print a table.

    Args:
        source: text file, one document per line
        tokenizer: Hugging Face folder, or one with a vocab.txt
        ranks: number of ranks to compare with one; 0: one per core
        updates: real tokens of an update, about; comma-separated
        precision: bf16 or fp32
        model: small (4 layers x 256) or base (12 x 768)
        length: longest sequence, in tokens
        steps: timed steps per run
        rounds: how often each number of ranks runs
    """
    threads = len(os.sched_getaffinity(0))
    ranks = ranks or threads
    sizes = [updates] if isinstance(updates, int) else list(updates)
    measured: dict[int, Rounds] = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        corpus = build_corpus(source, tokenizer, work / "corpus")
        for number in range(rounds):
            for size in sizes:
                settings = RunSettings(corpus, MODELS[model], precision, length, size)
                config = settings.timed_config(_UNTIMED + steps, profile=True)
                folder = work / f"{size}-{number}"
                one, several = (_run(config, folder / str(count), count, threads) for count in (1, ranks))
                measured[size].append((one, several))
                print(f"round {number + 1} of {rounds}: {size:,} tokens: {one}, {several}", file=sys.stderr)
    _print(measured, ranks, threads, f"{Path(source).name}, {model} model, {precision}")


def _run(config: Config, folder: Path, ranks: int, threads: int) -> Measured:
    folder.parent.mkdir(exist_ok=True)
    with PeakMemory() as memory:
        pretrain(config, folder, ranks=ranks, threads=threads)
    profile = json.loads((folder / "profile" / "profile.json").read_text(encoding="utf-8"))
    communication = (profile["phases"]["reduce gradients"] + profile["phases"]["wait for ranks"]) / profile["step"]
    return Measured(tokens_per_second(folder, _UNTIMED), communication, memory.bytes)


def _print(measured: dict[int, Rounds], ranks: int, threads: int, title: str) -> None:
    rates = f"tokens/s: 1 rank x {threads} threads", f"{ranks} ranks x {max(1, threads // ranks)}"
    rows = []
    for size, rounds in measured.items():
        one, several = zip(*rounds, strict=True)
        rows.append(
            [
                f"{size:,}",
                *(spread([run.tokens_per_second for run in runs], ",.0f") for runs in (one, several)),
                spread([several.tokens_per_second / one.tokens_per_second for one, several in rounds], ".2f"),
                spread([run.communication for run in several], ".1%"),
                " / ".join(f"{max(run.memory for run in runs) / 1e9:.2f}" for runs in (one, several)),
            ]
        )
    columns = ("tokens per update", *rates, "ratio", "communication", "peak memory, GB")
    print_table(columns, rows, labels=0, title=f"{title}; median (min – max)")
    print(describe_machine())


if __name__ == "__main__":
    fire.Fire(scaling)
