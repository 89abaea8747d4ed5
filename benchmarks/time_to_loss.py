"""Minutes until deepcloze reaches the held-out loss that the transformers `run_mlm` recipe has after some minutes.

    python -m benchmarks.time_to_loss --source FILE --held_out FILE --tokenizer DIR [--minutes 10] [--seeds 3]

All train the same model on the same text. `run_mlm` trains for `--minutes`, with default settings and with the
allocator setting that `deepcloze pretrain` gives its ranks; its clock starts with its first step. deepcloze trains with
the update rule, learning rates and real tokens per update of `run_mlm`, and with `pretrain/recipes/speedrun.yaml`, for
each seed; its clock starts with the command, so that start-up and checkpoints count. The learning rate is constant
after the warmup, so that the loss at any time equals the final loss of a run that ends then. Corpora are built before.
Peak memory is summed over all processes, shared pages counted once.

All are scored by `deepcloze evaluate`, with the same masks of 15 % and the same length, whatever they train with. A
run of deepcloze saves checkpoints at intervals: the first one whose loss is not above that of `run_mlm` counts.
`run_mlm` trains on blocks of concatenated lines (with --lines: on one line per example), deepcloze on lines, and lines
are scored.
"""

import bisect
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import fire
import yaml

from benchmarks.measuring import DEFAULT_ALLOCATOR, OUR_ALLOCATOR, PeakMemory, describe_machine, run_module, spread
from benchmarks.pretraining_runs import MODELS, Config, RunSettings, build_corpus, pretrain
from benchmarks.run_mlm_peer import LimitedPeerSettings
from experiment.config.recipes import find_recipe
from experiment.formatting import print_table
from experiment.run_files.checkpoints import complete_checkpoints
from pretrain.optimizer_config import OptimizerConfig

_LENGTH = 128  # longest sequence, in tokens: the default of `deepcloze evaluate` for a folder without a run
_ALL = 1_000_000  # checkpoints to keep
_PEERS = {
    "default": ("default settings", DEFAULT_ALLOCATOR),
    "ours": ("with our allocator setting", OUR_ALLOCATOR),
}
_RUNS = {"deepcloze, settings of run_mlm": False, "deepcloze, speedrun.yaml": True}  # whether with the recipe


@dataclass(frozen=True)
class Budget:
    """Time limits and devices of the runs."""

    minutes: float  # of run_mlm
    limit: float  # minutes of a run of deepcloze
    checkpoint_seconds: float
    warmup: int  # steps, unless the recipe sets them
    ranks: int
    threads: int


class Saved(NamedTuple):
    """A checkpoint."""

    folder: Path
    minutes: float  # from the command to the end of its writing


class Peer(NamedTuple):
    """The result of run_mlm with some settings."""

    loss: float
    bytes: int  # peak memory


class Run(NamedTuple):
    """The result of a run of deepcloze."""

    minutes: dict[str, float | None]  # to the loss of run_mlm, by its settings; None: not reached
    bytes: int  # peak memory


def time_to_loss(
    source: str,
    held_out: str,
    tokenizer: str,
    *,
    minutes: float = 10.0,
    limit: float | None = None,
    checkpoint_seconds: float = 5.0,
    lines: bool = False,
    precision: str = "bf16",
    model: str = "small",
    update_tokens: int = 4096,
    warmup: int = 100,
    ranks: int = 1,
    seeds: int = 1,
    peer: str | None = None,
) -> None:
    """Train all and print a table.

    Args:
        source: text file, one document per line
        held_out: text file to evaluate on
        tokenizer: Hugging Face folder, or one with a vocab.txt
        minutes: for which run_mlm is trained
        limit: minutes for which deepcloze is trained; default: half of `minutes`
        checkpoint_seconds: between checkpoints of deepcloze
        lines: one line per example for run_mlm, as its --line_by_line; otherwise blocks
        precision: bf16 or fp32
        model: small (4 layers x 256) or base (12 x 768)
        update_tokens: real tokens of an update, about; speedrun.yaml has a number of its own
        warmup: steps of linear warmup; speedrun.yaml has a number of its own
        ranks: of deepcloze, which share the cores
        seeds: how often deepcloze runs, each time with another seed
        peer: settings of run_mlm, "default" or "ours" (with our allocator's); default: both, one after the other
    """
    threads = len(os.sched_getaffinity(0))
    budget = Budget(minutes, limit or minutes / 2, checkpoint_seconds, warmup, ranks, threads)
    shape = "one line per example" if lines else f"blocks of {_LENGTH}"
    about = f"{model} model, {precision}, {threads} threads, {update_tokens:,} tokens per update, {shape}"
    about += f"; deepcloze: {ranks} ranks" if ranks > 1 else ""
    peers: dict[str, Peer] = {}
    runs: dict[str, list[Run]] = {name: [] for name in _RUNS}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            work = Path(scratch)
            corpus = build_corpus(source, tokenizer, work / "corpus")
            settings = RunSettings(corpus, MODELS[model], precision, _LENGTH, update_tokens)
            held_out_corpus = build_corpus(held_out, tokenizer, work / "held_out")
            score = functools.cache(functools.partial(_score, corpus=held_out_corpus))
            peer_settings = _peer_settings(source, tokenizer, lines, settings, budget)
            for name, allocator in _PEERS.values() if peer is None else [_PEERS[peer]]:
                peers[name] = _peer(peer_settings, name, allocator, score, work)
            for seed in range(1, seeds + 1):
                for name, with_recipe in _RUNS.items():
                    config = _recipe_config(settings) if with_recipe else _plain_config(settings, budget)
                    runs[name].append(_run(config, seed, budget, peers, score, work / f"run-{seed}-{with_recipe}"))
    finally:  # a run may fail after hours of others
        if peers:
            _print(peers, runs, seeds, minutes, f"{Path(source).name}, {about}; median (min – max)")


def _peer_settings(
    source: str, tokenizer: str, lines: bool, settings: RunSettings, budget: Budget
) -> LimitedPeerSettings:
    """run_mlm with deepcloze's update rule; the folder is still missing."""
    rule = OptimizerConfig()
    return LimitedPeerSettings(
        **settings.peer(source, tokenizer, lines, budget.threads),
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


def _peer(
    settings: LimitedPeerSettings, name: str, allocator: Mapping[str, str], score: Callable[[Path], float], work: Path
) -> Peer:
    folder = work / name.replace(" ", "-")
    with PeakMemory() as peak:
        own = asdict(replace(settings, folder=str(folder)))
        done = run_module("benchmarks.run_mlm_peer", own, settings.threads, allocator)
    print(f"run_mlm, {name}: {done['updates']:,} updates", file=sys.stderr)
    return Peer(score(folder), peak.bytes)


def _plain_config(settings: RunSettings, budget: Budget) -> Config:
    """Return the update rule, learning rates and batch size of run_mlm."""
    return settings.config(schedule={"name": "constant", "warmup_steps": budget.warmup})


def _recipe_config(settings: RunSettings) -> Config:
    """speedrun.yaml with the model, corpus and precision of the others."""
    recipe: Config = yaml.safe_load(find_recipe("speedrun").path.read_text(encoding="utf-8"))
    recipe["model"]["config"] |= settings.model
    recipe["corpus"] = {"train": str(settings.corpus)}
    recipe["engine"]["ds_config"] = f"{settings.precision}_zero1"
    return recipe


def _run(
    config: Config, seed: int, budget: Budget, peers: dict[str, Peer], score: Callable[[Path], float], folder: Path
) -> Run:
    config["run"]["seed"] = seed
    config["schedule"]["budget"] = f"{round(60 * budget.limit)}s"
    config["checkpoint"] = {
        "every_steps": None,
        "every_minutes": budget.checkpoint_seconds / 60,
        "keep_last": _ALL,
    }
    start = time.time()
    with PeakMemory() as peak:
        pretrain(config, folder, ranks=budget.ranks, threads=budget.threads)
    found = complete_checkpoints(folder / "checkpoints")
    saved = [Saved(path, (path.stat().st_mtime - start) / 60) for path in found]
    return Run({name: _minutes_to(peer.loss, saved, score) for name, peer in peers.items()}, peak.bytes)


def _minutes_to(loss: float, saved: Sequence[Saved], score: Callable[[Path], float]) -> float | None:
    """Of the first checkpoint whose loss is not above `loss`, found by bisection: losses fall. None: there is none."""
    number = bisect.bisect_left(saved, True, key=lambda checkpoint: score(checkpoint.folder) <= loss)
    return saved[number].minutes if number < len(saved) else None


def _score(model: Path, corpus: Path) -> float:
    """Return the held-out loss of a checkpoint or a Hugging Face folder."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = model
        if (model / "hf").is_dir():  # copied, because a checkpoint in a run is scored with the masks of the run
            folder = shutil.copytree(model / "hf", Path(scratch) / "hf")
        command = [sys.executable, "-m", "launcher", "evaluate", "--checkpoint", str(folder), "--corpus", str(corpus)]
        finished = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    (scores,) = json.loads(finished.stdout.splitlines()[-1]).values()
    print(f"{model.name}: {scores}", file=sys.stderr)
    return float(scores["loss"])


def _print(peers: dict[str, Peer], runs: dict[str, list[Run]], seeds: int, minutes: float, title: str) -> None:
    """Print what there is: a contestant has a row if it has run, and says so if it did not run with all seeds."""
    rows, compared = list[list[str]](), list[str]()
    for name, peer in peers.items():
        compared += [f"minutes to {peer.loss:.3f}: run_mlm, {name}", "faster by"]
        own = [cell for other in peers for cell in (f"{minutes:g}" if other == name else "", "")]
        rows.append([f"run_mlm, {name}", *own, f"{peer.bytes / 1e9:.2f}"])
    for name, done in runs.items():
        if not done:
            continue
        cells = [cell for peer in peers for cell in _compare([run.minutes[peer] for run in done], minutes)]
        missing = "" if len(done) == seeds else f" ({len(done)} of {seeds} seeds)"
        rows.append([name + missing, *cells, f"{max(run.bytes for run in done) / 1e9:.2f}"])
    print_table(["contestant", *compared, "peak memory, GB"], rows, title=title)
    print(describe_machine())


def _compare(reached: Sequence[float | None], minutes: float) -> tuple[str, str]:
    """Return the minutes to the loss of run_mlm after `minutes`, and the speedup."""
    found = [each for each in reached if each is not None]
    if len(found) < len(reached):
        return f"not reached in {len(reached) - len(found)} of {len(reached)} runs", ""
    return spread(found, ".2f"), spread([minutes / each for each in found], ".1f")


if __name__ == "__main__":
    fire.Fire(time_to_loss)
