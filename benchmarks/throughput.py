r"""Real tokens per second of deepcloze and of the transformers `run_mlm` recipe.

    python -m benchmarks.throughput --source FILE --tokenizer DIR [--lines] [--precision bf16] [--model base] \
        [--update_tokens 32768] [--ranks 2]

Both train the same model on the same text with the same precision, number of threads and real tokens per update, each
in its own process; the peer accumulates microbatches of 32 examples. They alternate, so that a slow minute of the
machine affects both. Whole training steps are timed, data work included, after some untimed first steps; padding is not
counted. Peak memory is summed over all processes, shared pages counted once.

The peer is transformers' Trainer with DataCollatorForLanguageModeling, fed as `run_mlm` feeds it: the text concatenated
and split into blocks, or with --lines one line per example, padded to the longest of its batch. It is measured twice:
with default settings, and with the allocator setting that `deepcloze pretrain` gives its ranks, because that setting
helps it as well. On a CPU, `benchmarks.matrix_products` gives the speed of the matrix products alone.
"""

import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import fire
import torch

from benchmarks.matrix_products import ProductSettings
from benchmarks.measuring import DEFAULT_ALLOCATOR, OUR_ALLOCATOR, PeakMemory, describe_machine, run_module, spread
from benchmarks.pretraining_runs import MODELS, ROWS, Config, RunSettings, build_corpus, pretrain, tokens_per_second
from benchmarks.run_mlm_peer import PeerSettings
from experiment.formatting import print_table
from experiment.models.tokenizer import load_tokenizer

_MATRIX_PRODUCTS = "matrix products alone"


class Measured(NamedTuple):
    tokens_per_second: float
    memory: int  # peak bytes of all processes


Rounds = dict[str, list[Measured]]
"""Of each contestant."""


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
    if not 0 < warm < steps:
        sys.exit(f"throughput: expected --warm from 1 to less than --steps, {steps}, found {warm}")
    threads = threads or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        corpus = build_corpus(source, tokenizer, work / "corpus")
        settings = RunSettings(corpus, MODELS[model], precision, length, update_tokens)
        recipe = settings.peer(source, tokenizer, lines, threads)
        peer = PeerSettings(**recipe, updates=steps, warmup_updates=warm)
        measured = _measure(peer, settings.timed_config(steps), work, rounds, ranks)
    shape = "one line per example" if lines else f"blocks of {length}"
    about = f"{model} model, {precision}, {threads} threads, {update_tokens:,} tokens per update, {shape}"
    about += f"; deepcloze: {ranks} ranks" if ranks > 1 else ""
    _print(measured, f"{Path(source).name}, {about}")


def _measure(peer: PeerSettings, config: Config, work: Path, rounds: int, ranks: int) -> Rounds:
    contestants: dict[str, Callable[[int], float]] = {
        "run_mlm, default settings": lambda number: _run_peer(peer, DEFAULT_ALLOCATOR),
        "run_mlm, with our allocator setting": lambda number: _run_peer(peer, OUR_ALLOCATOR),
        "deepcloze": lambda number: _run_deepcloze(config, work / f"run-{number}", peer, ranks),
    }
    if not torch.cuda.is_available():
        contestants[_MATRIX_PRODUCTS] = lambda number: _run_products(peer)
    measured: Rounds = {name: [] for name in contestants}
    for number in range(rounds):
        for name, run in contestants.items():
            with PeakMemory() as memory:
                rate = run(number)
            measured[name].append(Measured(rate, memory.bytes))
            print(f"round {number + 1} of {rounds}: {name}: {rate:,.0f} tokens/s", file=sys.stderr)
    return measured


def _run_deepcloze(config: Config, folder: Path, peer: PeerSettings, ranks: int) -> float:
    pretrain(config, folder, ranks=ranks, threads=peer.threads)
    return tokens_per_second(folder, peer.warmup_updates)


def _run_peer(peer: PeerSettings, environment: dict[str, str]) -> float:
    return float(run_module("benchmarks.run_mlm_peer", asdict(peer), peer.threads, environment)["tokens_per_second"])


def _run_products(peer: PeerSettings) -> float:
    settings = ProductSettings(
        layers=peer.model["num_hidden_layers"],
        hidden=peer.model["hidden_size"],
        intermediate=peer.model["intermediate_size"],
        vocabulary=len(load_tokenizer(Path(peer.tokenizer))),
        tokens=ROWS * peer.length,
        precision=peer.precision,
        threads=peer.threads,
    )
    return float(
        run_module("benchmarks.matrix_products", asdict(settings), peer.threads, OUR_ALLOCATOR)["tokens_per_second"]
    )


def _print(measured: Rounds, title: str) -> None:
    rows = []
    ours = [run.tokens_per_second for run in measured["deepcloze"]]
    for name, runs in measured.items():
        theirs = [run.tokens_per_second for run in runs]
        ratio = statistics.median(own / other for own, other in zip(ours, theirs, strict=True))
        memory = f"{max(run.memory for run in runs) / 1e9:.2f}"
        rows.append([name, spread(theirs, ",.0f"), "" if name == "deepcloze" else f"{ratio:.2f} x", memory])
    columns = ("contestant", "tokens/s: median (min – max)", "deepcloze is faster by", "peak memory, GB")
    print_table(columns, rows, title=title)
    print(describe_machine())


if __name__ == "__main__":
    fire.Fire(throughput)
