"""Minutes until deepcloze reaches the held-out loss that the transformers `run_mlm` recipe has after some minutes.

    python -m benchmarks.time_to_loss --source FILE --held_out FILE --tokenizer DIR [--minutes 10] [--rounds 3]

Both train the same model on the same text with the same real tokens per update, update rule and learning rates. The
rate is constant after the warmup, so that the loss at any time equals the final loss of a run that ends then. The
recipe is trained with default settings, and with the allocator setting that `deepcloze pretrain` gives its ranks. Its
clock starts with its first step. The clock of deepcloze starts with the command, so that start-up and checkpoints
count. deepcloze runs without compiled layers, with a cold compile cache, and with a warm one. They alternate. Corpora
are built before. Peak memory is summed over all processes, shared pages counted once.

Both sides are scored by `deepcloze evaluate`, with the same masks. A run of deepcloze saves checkpoints at intervals:
the first one whose loss is not above the recipe's counts. `run_mlm` trains on blocks of concatenated lines (with
--lines: on one line per example), deepcloze on lines, and lines are scored.
"""

import bisect
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import fire
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import DEFAULT_ALLOCATOR, OUR_ALLOCATOR, PeakMemory, describe_machine, run_module, spread
from benchmarks.pretraining_runs import MODELS, RunSettings, build_corpus, mean_length, pretrain
from benchmarks.run_mlm_peer import BATCH, LimitedPeerSettings
from experiment.checkpoints import complete_checkpoints
from pretrain.optimizer_config import OptimizerConfig

_LENGTH = 128  # longest sequence, in tokens: the default of `deepcloze evaluate` for a folder without a run
_ALL = 1_000_000  # checkpoints to keep
_PEERS = {"default settings": DEFAULT_ALLOCATOR, "with our allocator setting": OUR_ALLOCATOR}
_RUNS = {  # whether layers are compiled, and the cache folder
    "deepcloze": (False, "cache"),
    "deepcloze, compiled, cold cache": (True, "cache-of-compiled"),
    "deepcloze, compiled, warm cache": (True, "cache-of-compiled"),
}


@dataclass(frozen=True)
class Budget:
    """Time limits and devices of the runs."""

    minutes: float  # of the recipe
    limit: float  # minutes of a run of deepcloze
    checkpoint_seconds: float
    warmup: int  # steps
    ranks: int
    threads: int


class Saved(NamedTuple):
    """A checkpoint."""

    folder: Path
    minutes: float  # from the command to the end of its writing


class Round(NamedTuple):
    losses: dict[str, float]  # of the recipe, by its settings
    minutes: dict[str, dict[str, float | None]]  # of each run of deepcloze to each of these losses; None: not reached
    memory: dict[str, int]  # peak bytes of each contestant


def time_to_loss(
    source: str,
    held_out: str,
    tokenizer: str,
    *,
    minutes: float = 10.0,
    limit: float | None = None,
    checkpoint_seconds: float = 10.0,
    lines: bool = False,
    precision: str = "bf16",
    model: str = "small",
    update_tokens: int = 4096,
    warmup: int = 100,
    ranks: int = 1,
    rounds: int = 1,
) -> None:
    """Train both and print a table.

    Args:
        source: text file, one document per line
        held_out: text file to evaluate on
        tokenizer: Hugging Face folder, or one with a vocab.txt
        minutes: for which the recipe is trained
        limit: minutes for which deepcloze is trained; default: half of `minutes`
        checkpoint_seconds: between checkpoints of deepcloze
        lines: one line per example for the recipe, as run_mlm's --line_by_line; otherwise blocks
        precision: bf16 or fp32
        model: small (4 layers x 256) or base (12 x 768)
        update_tokens: real tokens of an update, about
        warmup: steps of linear warmup
        ranks: of deepcloze, which share the cores
        rounds: how often each contestant runs
    """
    threads = len(os.sched_getaffinity(0))
    budget = Budget(minutes, limit or minutes / 2, checkpoint_seconds, warmup, ranks, threads)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        corpus = build_corpus(source, tokenizer, work / "corpus")
        settings = RunSettings(corpus, MODELS[model], precision, _LENGTH, update_tokens)
        score = functools.cache(functools.partial(_score, corpus=build_corpus(held_out, tokenizer, work / "held_out")))
        peer = _peer(source, tokenizer, lines, settings, budget)
        done = [_round(peer, settings, budget, score, work / f"round-{number}") for number in range(rounds)]
    shape = "one line per example" if lines else f"blocks of {_LENGTH}"
    about = f"{model} model, {precision}, {threads} threads, {update_tokens:,} tokens per update, {shape}"
    about += f"; deepcloze: {ranks} ranks" if ranks > 1 else ""
    _print(done, minutes, f"{Path(source).name}, {about}; median (min – max)")


def _peer(source: str, tokenizer: str, lines: bool, settings: RunSettings, budget: Budget) -> LimitedPeerSettings:
    """The recipe with deepcloze's update rule; the folder is still missing."""
    rule = OptimizerConfig()
    example = mean_length(settings.corpus, _LENGTH) if lines else _LENGTH
    return LimitedPeerSettings(
        source=source,
        tokenizer=tokenizer,
        model=settings.model,
        lines=lines,
        precision=settings.precision,
        length=_LENGTH,
        threads=budget.threads,
        accumulated=max(1, round(settings.update_tokens / (BATCH * example))),
        seconds=60 * budget.minutes,
        folder="",
        arguments={
            "learning_rate": rule.lr,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": budget.warmup,
            "adam_beta1": rule.betas[0],
            "adam_beta2": rule.betas[1],
            "adam_epsilon": rule.eps,
            "weight_decay": rule.weight_decay,
            "max_grad_norm": rule.grad_clip,
        },
    )


def _round(
    peer: LimitedPeerSettings, settings: RunSettings, budget: Budget, score: Callable[[Path], float], work: Path
) -> Round:
    """Train each contestant once. `work`: a new folder, so that compile caches are cold at first."""
    work.mkdir()
    losses: dict[str, float] = {}
    minutes: dict[str, dict[str, float | None]] = {}
    memory: dict[str, int] = {}
    for name in _PEERS:
        with PeakMemory() as peak:
            folder = _train_peer(peer, name, work)
        losses[name], memory[name] = score(folder), peak.bytes
    for name, choice in _RUNS.items():
        with PeakMemory() as peak:
            saved = _train(settings, budget, work, *choice)
        minutes[name] = {recipe: _minutes_to(loss, saved, score) for recipe, loss in losses.items()}
        memory[name] = peak.bytes
    return Round(losses, minutes, memory)


def _train_peer(peer: LimitedPeerSettings, name: str, work: Path) -> Path:
    """The Hugging Face folder of the trained model."""
    settings = replace(peer, folder=str(work / name.replace(" ", "-")))
    done = run_module("benchmarks.run_mlm_peer", asdict(settings), peer.threads, _PEERS[name])
    print(f"run_mlm, {name}: {done['updates']:,} updates", file=sys.stderr)
    return Path(settings.folder)


def _train(settings: RunSettings, budget: Budget, work: Path, compiled: bool, cache: str) -> list[Saved]:
    """The checkpoints of a run of deepcloze, oldest first."""
    folder = work / f"{cache}-{time.monotonic_ns()}"
    config = settings.config(
        schedule={"name": "constant", "warmup_steps": budget.warmup, "budget": f"{round(60 * budget.limit)}s"},
        checkpoint={"every_minutes": budget.checkpoint_seconds / 60, "keep_last": _ALL},
        engine={"compile": compiled},
    )
    start = time.time()
    environment = {"XDG_CACHE_HOME": str(work / cache)}
    pretrain(config, folder, ranks=budget.ranks, threads=budget.threads, environment=environment)
    found = complete_checkpoints(folder / "checkpoints")
    return [Saved(path, (path.stat().st_mtime - start) / 60) for path in found]


def _minutes_to(loss: float, saved: Sequence[Saved], score: Callable[[Path], float]) -> float | None:
    """Of the first checkpoint whose loss is not above `loss`, found by bisection: losses fall. None: there is none."""
    number = bisect.bisect_left(saved, True, key=lambda checkpoint: score(checkpoint.folder) <= loss)
    return saved[number].minutes if number < len(saved) else None


def _score(model: Path, corpus: Path) -> float:
    """The held-out loss of a checkpoint or a Hugging Face folder."""
    command = [sys.executable, "-m", "launcher", "evaluate", "--checkpoint", str(model), "--corpus", str(corpus)]
    finished = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    (scores,) = json.loads(finished.stdout.splitlines()[-1]).values()
    print(f"{model.name}: {scores}", file=sys.stderr)
    return float(scores["loss"])


def _print(rounds: Sequence[Round], minutes: float, title: str) -> None:
    table = Table("contestant", title=title)
    for peer in _PEERS:
        loss = spread([done.losses[peer] for done in rounds], ".3f")
        table.add_column(f"minutes to {loss}: run_mlm, {peer}")
        table.add_column("faster by")
    table.add_column("peak memory, GB")
    for name in _PEERS:
        own = [cell for peer in _PEERS for cell in (f"{minutes:g}" if peer == name else "", "")]
        table.add_row(f"run_mlm, {name}", *own, _peak(rounds, name))
    for name in _RUNS:
        cells = [cell for peer in _PEERS for cell in _compare([done.minutes[name][peer] for done in rounds], minutes)]
        table.add_row(name, *cells, _peak(rounds, name))
    Console(width=150).print(table)
    print(describe_machine())


def _compare(reached: Sequence[float | None], minutes: float) -> tuple[str, str]:
    """The minutes to the loss of the recipe after `minutes`, and the speedup."""
    found = [each for each in reached if each is not None]
    if len(found) < len(reached):
        return f"not reached in {len(reached) - len(found)} of {len(reached)} rounds", ""
    return spread(found, ".2f"), spread([minutes / each for each in found], ".1f")


def _peak(rounds: Sequence[Round], name: str) -> str:
    return f"{max(done.memory[name] for done in rounds) / 1e9:.2f}"


if __name__ == "__main__":
    fire.Fire(time_to_loss)
