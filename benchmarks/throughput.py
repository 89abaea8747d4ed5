"""Real tokens per second of deepcloze and of the transformers `run_mlm` recipe, side by side.

    python -m benchmarks.throughput --source FILE --tokenizer DIR [--lines] [--precision bf16] [--rounds 3]

Both train the same model on the same text with the same precision and number of threads, each in a process of its
own, in turns, so that a slow minute of the machine hits both. What is timed is whole training steps with all data
work, after the first ones; padding is not counted. The peer is transformers' Trainer with
DataCollatorForLanguageModeling, fed as `run_mlm` feeds it: the text joined and cut into blocks, or with --lines one
line an example, padded to the longest of its batch. It is measured twice: as anyone starts it, and with the allocator
setting that `deepcloze pretrain` gives its ranks, because that setting helps it as well.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import fire
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from launcher.environment import GLIBC_TUNABLES
from pretrain.batching.sequences import split_documents
from pretrain.corpus.reader import open_corpus

MODELS = {
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
_STEP_TOKENS = 4096  # token slots of a step: 32 sequences of 128


def throughput(
    source: str,
    tokenizer: str,
    *,
    lines: bool = False,
    precision: str = "bf16",
    model: str = "small",
    length: int = 128,
    steps: int = 40,
    warm: int = 10,
    rounds: int = 3,
    threads: int = 0,
) -> None:
    """Measure both and print a table.

    Args:
        source: a text file, one document a line
        tokenizer: a Hugging Face folder, or one with a vocab.txt
        lines: one line an example for the peer, as run_mlm's --line_by_line; else blocks
        precision: bf16 or fp32
        model: small (4 layers x 256) or base (12 x 768)
        length: longest sequence, in tokens
        steps: of each contestant in each turn
        warm: the first of them, not timed
        rounds: turns
        threads: of each contestant; 0: all cores
    """
    threads = threads or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        _command("corpus", "--source", source, "--tokenizer", tokenizer, "--output", str(work / "corpus"))
        peer = {
            "source": source, "tokenizer": tokenizer, "model": json.dumps(MODELS[model]), "lines": lines,
            "precision": precision, "length": length, "threads": threads, "steps": steps, "warm": warm,
        }  # fmt: skip
        config = _write_config(work, MODELS[model], precision, length, steps)
        contestants: dict[str, Callable[[int], float]] = {
            "run_mlm, as anyone starts it": lambda turn: _run_peer(peer, threads, {}),
            "run_mlm, with our allocator setting": lambda turn: _run_peer(
                peer, threads, {"GLIBC_TUNABLES": GLIBC_TUNABLES}
            ),
            "deepcloze": lambda turn: _run_deepcloze(config, work / f"run-{turn}", threads, warm),
        }
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(rounds):
            for name, run in contestants.items():
                rates[name].append(run(turn))
                print(f"turn {turn + 1} of {rounds}: {name}: {rates[name][-1]:,.0f} tokens/s", file=sys.stderr)
    shape = "one line an example" if lines else f"blocks of {length}"
    _print(rates, f"{Path(source).name}, {model} model, {precision}, {threads} threads, {shape}")


def _write_config(work: Path, model: dict[str, int], precision: str, length: int, steps: int) -> Path:
    """A run whose steps take about as many token slots as the peer's longest."""
    corpus = open_corpus(work / "corpus")
    lengths = np.concatenate(
        [split_documents(shard.astype(np.int64), length - 2) for shard in corpus.document_lengths()]
    )
    path = work / "run.yaml"
    config = {
        "run": {"dir": "set on the command line", "log_every": 5},
        "model": {"config": {"model_type": "bert", **model}},
        "corpus": {"train": str(corpus.path)},
        "batch": {
            "sequences": int(0.97 * _STEP_TOKENS / (lengths.mean() + 2)),
            "max_seq_length": length,
            "microbatch_tokens": _STEP_TOKENS,
        },
        "schedule": {"steps": steps},
        "evaluation": {"every_steps": steps},
        "checkpoint": {"every_steps": None},
        "engine": {"ds_config": f"ds_configs/{precision}_zero1.json"},
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def _run_deepcloze(config: Path, folder: Path, threads: int, warm: int) -> float:
    """Real tokens per second after the warm-up, from the run's own metrics."""
    _command("pretrain", "--config", str(config), f"--run.dir={folder}", threads=threads)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens = seconds = 0.0
    for before, row in pairwise(rows):
        if row.get("tokens_per_second") and before["step"] >= warm:
            tokens += row["tokens"] - before["tokens"]
            seconds += (row["tokens"] - before["tokens"]) / row["tokens_per_second"]
    return tokens / seconds


def _run_peer(arguments: dict[str, object], threads: int, environment: dict[str, str]) -> float:
    command = [sys.executable, "-m", "benchmarks.run_mlm_peer", json.dumps(arguments)]
    wanted = os.environ | {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"} | environment
    done = subprocess.run(command, env=wanted, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["tokens_per_second"])


def _command(*arguments: str, threads: int | None = None) -> None:
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    subprocess.run([sys.executable, "-m", "launcher", *arguments], env=environment, stdout=sys.stderr, check=True)


def _print(rates: dict[str, list[float]], what: str) -> None:
    table = Table("contestant", "tokens/s: median (min – max)", "deepcloze is faster by", title=what)
    ours = rates["deepcloze"]
    for name, theirs in rates.items():
        ratio = statistics.median(own / other for own, other in zip(ours, theirs, strict=True))
        spread = f"{statistics.median(theirs):,.0f} ({min(theirs):,.0f} – {max(theirs):,.0f})"
        table.add_row(name, spread, "" if theirs is ours else f"{ratio:.2f} x")
    Console().print(table)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed"))
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    machine = f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores"
    print(f"{date.today()}, {machine}, Python {platform.python_version()}, {versions}")


if __name__ == "__main__":
    fire.Fire(throughput)
