r"""Real tokens per second of deepcloze and of the transformers `run_mlm` recipe.

    python -m benchmarks.throughput --source FILE --tokenizer DIR [--lines] [--precision bf16] [--model base] \
        [--update_tokens 32768] [--ranks 2]

Both train the same model on the same text with the same precision, number of threads and real tokens per update, each
in its own process; the peer accumulates microbatches of 32 examples. They alternate, so that a slow minute of the
machine affects both. Whole training steps are timed, data work included, after some untimed first steps; padding is not
counted. The peer is transformers' Trainer with DataCollatorForLanguageModeling, fed as `run_mlm` feeds it: the text
concatenated and split into blocks, or with --lines one line per example, padded to the longest of its batch. It is
measured twice: with default settings, and with the allocator setting that `deepcloze pretrain` gives its ranks, because
that setting helps it as well. On a CPU,
`benchmarks.matrix_products` shows what the matrix products alone would allow.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine
from benchmarks.matrix_products import ProductSettings
from benchmarks.run_mlm_peer import BATCH, PeerSettings
from experiment.tokenizer import load_tokenizer
from launcher.ranks.environment import GLIBC_TUNABLES
from pretrain.batching.sequences import split_documents
from pretrain.corpus.reader import open_corpus

MODELS = {
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
_ROWS = 34  # of a microbatch of deepcloze: 32 would just not hold 32 rows of real tokens
_MATRIX_PRODUCTS = "matrix products alone"

Rates = dict[str, list[float]]
"""Tokens per second of each contestant, one value per round."""


def throughput(
    source: str,
    tokenizer: str,
    *,
    lines: bool = False,
    precision: str = "bf16",
    model: str = "small",
    length: int = 128,
    update_tokens: int = 4096,
    steps: int = 40,
    warm: int = 10,
    rounds: int = 3,
    threads: int = 0,
    ranks: int = 1,
) -> None:
    """Measure both and print a table.

    Args:
        source: text file, one document per line
        tokenizer: Hugging Face folder, or one with a vocab.txt
        lines: one line per example for the peer, as run_mlm's --line_by_line; otherwise blocks
        precision: bf16 or fp32
        model: small (4 layers x 256) or base (12 x 768)
        length: longest sequence, in tokens
        update_tokens: real tokens of an update, about
        steps: steps per contestant and round
        warm: the first of these steps, not timed
        rounds: how often each contestant runs
        threads: threads per contestant; 0: all cores
        ranks: of deepcloze, which share its threads
    """
    threads = threads or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        _deepcloze("corpus", "--source", source, "--tokenizer", tokenizer, "--output", str(work / "corpus"))
        mean = _mean_length(work / "corpus", length)
        peer = PeerSettings(
            source=source,
            tokenizer=tokenizer,
            model=MODELS[model],
            lines=lines,
            precision=precision,
            length=length,
            threads=threads,
            accumulated=max(1, round(update_tokens / (BATCH * (mean if lines else length)))),
            updates=steps,
            warmup_updates=warm,
        )
        rates = _measure(peer, _write_config(work, peer, round(update_tokens / mean)), work, rounds, ranks)
    shape = "one line per example" if lines else f"blocks of {length}"
    about = f"{model} model, {precision}, {threads} threads, {update_tokens:,} tokens per update, {shape}"
    about += f"; deepcloze: {ranks} ranks" if ranks > 1 else ""
    _print(rates, f"{Path(source).name}, {about}")


def _measure(peer: PeerSettings, config: Path, work: Path, rounds: int, ranks: int) -> Rates:
    contestants: dict[str, Callable[[int], float]] = {
        "run_mlm, default settings": lambda number: _run_peer(peer, {}),
        "run_mlm, with our allocator setting": lambda number: _run_peer(peer, {"GLIBC_TUNABLES": GLIBC_TUNABLES}),
        "deepcloze": lambda number: _run_deepcloze(config, work / f"run-{number}", peer, ranks),
    }
    if not torch.cuda.is_available():
        contestants[_MATRIX_PRODUCTS] = lambda number: _run_products(peer)
    rates: Rates = {name: [] for name in contestants}
    for number in range(rounds):
        for name, run in contestants.items():
            rates[name].append(run(number))
            print(f"round {number + 1} of {rounds}: {name}: {rates[name][-1]:,.0f} tokens/s", file=sys.stderr)
    return rates


def _mean_length(corpus: Path, length: int) -> float:
    """Mean number of tokens of a sequence, special tokens included."""
    documents = [shard.astype(np.int64) for shard in open_corpus(corpus).document_lengths()]
    return float(np.concatenate([split_documents(shard, length - 2) for shard in documents]).mean()) + 2


def _write_config(work: Path, peer: PeerSettings, sequences: int) -> Path:
    path = work / "run.yaml"
    config = {
        "run": {"dir": "set on the command line", "log_every": 1},
        "model": {"config": {"model_type": "bert", **peer.model}},
        "corpus": {"train": str(work / "corpus")},
        "batch": {
            "sequences": sequences,
            "max_seq_length": peer.length,
            "microbatch_tokens": _ROWS * peer.length,
        },
        "schedule": {"steps": peer.updates},
        "evaluation": {"every_steps": peer.updates},
        "checkpoint": {"every_steps": None},
        "engine": {"ds_config": f"ds_configs/{peer.precision}_zero1.json"},
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def _run_deepcloze(config: Path, folder: Path, peer: PeerSettings, ranks: int) -> float:
    """Tokens per second of the timed steps, from the run's metrics."""
    command = ("pretrain", "--config", str(config), f"--run.dir={folder}", "--num_gpus", str(ranks))
    _deepcloze(*command, threads=max(1, peer.threads // ranks))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens = seconds = 0.0
    for before, row in pairwise(rows):
        if row.get("tokens_per_second") and before["step"] >= peer.warmup_updates:
            tokens += row["tokens"] - before["tokens"]
            seconds += (row["tokens"] - before["tokens"]) / row["tokens_per_second"]
    return tokens / seconds


def _run_peer(peer: PeerSettings, environment: dict[str, str]) -> float:
    return _run_module("benchmarks.run_mlm_peer", asdict(peer), peer.threads, environment)


def _run_products(peer: PeerSettings) -> float:
    settings = ProductSettings(
        layers=peer.model["num_hidden_layers"],
        hidden=peer.model["hidden_size"],
        intermediate=peer.model["intermediate_size"],
        vocabulary=len(load_tokenizer(Path(peer.tokenizer))),
        tokens=_ROWS * peer.length,
        precision=peer.precision,
        threads=peer.threads,
    )
    return _run_module("benchmarks.matrix_products", asdict(settings), peer.threads, {"GLIBC_TUNABLES": GLIBC_TUNABLES})


def _run_module(module: str, settings: dict[str, Any], threads: int, environment: dict[str, str]) -> float:
    """Tokens per second, which a module prints."""
    command = [sys.executable, "-m", module, json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu", **environment}
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(finished.stdout.splitlines()[-1])["tokens_per_second"])


def _deepcloze(*arguments: str, threads: int | None = None) -> None:
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    subprocess.run([sys.executable, "-m", "launcher", *arguments], env=environment, stdout=sys.stderr, check=True)


def _print(rates: Rates, title: str) -> None:
    table = Table("contestant", "tokens/s: median (min – max)", "deepcloze is faster by", title=title)
    ours = rates["deepcloze"]
    for name, theirs in rates.items():
        ratio = statistics.median(own / other for own, other in zip(ours, theirs, strict=True))
        spread = f"{statistics.median(theirs):,.0f} ({min(theirs):,.0f} – {max(theirs):,.0f})"
        table.add_row(name, spread, "" if theirs is ours else f"{ratio:.2f} x")
    Console().print(table)
    print(describe_machine())


if __name__ == "__main__":
    fire.Fire(throughput)
