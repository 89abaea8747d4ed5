"""A real pretraining of two minutes, stopped and resumed: a step of `benchmarks.gpu_session`.

    python -m benchmarks.gpu_pretraining [--seconds 120]

The text is the source code of Python's standard library, which every machine has and which is read in a second. On a
GPU the model has 12 layers of 768 hidden units; on a CPU it is the demo's. Prints what the run logged, and
fails if the run does not stop, resume where it stopped, or learn.
"""

import argparse
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.gpu_results import print_figures
from benchmarks.measuring import deepcloze, stop_after
from experiment.run_files.metrics_file import Event, read_events
from experiment.run_files.run_folder import RunFolder

_RECIPE = Path("pretrain/recipes/demo.yaml")
_OTHERS = {"site-packages", "dist-packages", "test", "tests", "lib2to3", "idlelib"}
_MODEL = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 1152}
_BATCH = {"sequences": 512, "microbatch_tokens": 32_768}


def pretrain(folder: Path, seconds: int) -> dict[str, Any]:
    """Figures of the run. Raises SystemExit or CalledProcessError if it does not do what it should."""
    text, tokenizer, corpus = (folder / name for name in ("text.txt", "tokenizer", "corpus"))
    _write_text(text)
    source = (f"--source={text}", "--document=blank_line")
    deepcloze("tokenizer", *source, f"--output={tokenizer}", "--vocab_size=8192")
    deepcloze("corpus", *source, f"--tokenizer={tokenizer}", f"--output={corpus}", "--holdout=400")
    run, config = RunFolder(folder / "run"), folder / "run.yaml"
    config.write_text(yaml.safe_dump(_config(run.path, corpus, seconds)), encoding="utf-8")
    command = [sys.executable, "-m", "launcher", "pretrain", f"--config={config}", "--num_gpus=1"]
    # Compiling, before the first step is logged, is a part of the budget.
    if not stop_after(seconds / 4, command, run):
        raise SystemExit("the run has finished before it was stopped")
    stopped = _steps(run)[-1]
    subprocess.run(command, check=True)
    return _figures(run, stopped)


def _write_text(path: Path) -> None:
    """Blocks of code, separated by blank lines."""
    library = Path(sysconfig.get_paths()["stdlib"])
    with path.open("w", encoding="utf-8") as output:
        for file in sorted(library.rglob("*.py")):
            if not _OTHERS & {*file.relative_to(library).parts}:
                output.write(file.read_text(encoding="utf-8", errors="replace") + "\n\n")


def _config(run: Path, corpus: Path, seconds: int) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(_RECIPE.read_text(encoding="utf-8"))
    if torch.cuda.is_available():
        config["model"]["config"] |= _MODEL
        config["batch"] |= _BATCH
        config["optimizer"] |= {"lr": 5e-4, "muon": {"lr": 5e-4}}
    return config | {
        "run": {"dir": str(run), "log_every": 1},
        "corpus": {"train": str(corpus), "eval": {"library": f"{corpus}-heldout"}},
        "schedule": {"warmup_steps": 50, "budget": f"{seconds}s"},
        "evaluation": {"every_steps": 1000},
    }


def _steps(run: RunFolder) -> list[Event]:
    return [event for event in read_events(run.metrics) if "loss" in event]


def _figures(run: RunFolder, stopped: Event) -> dict[str, Any]:
    steps = _steps(run)
    resumed = [event for event in steps if event["step"] > stopped["step"]]
    if [event["step"] for event in steps] != list(range(1, len(steps) + 1)) or not resumed:
        raise SystemExit(f"steps are missing or repeated after step {stopped['step']}")
    losses = {"first": steps[0], "before the stop": stopped, "after it": resumed[0], "last": steps[-1]}
    if len(steps) > 100 and steps[-1]["loss"] > steps[0]["loss"] - 0.5:
        raise SystemExit(f"the loss only fell from {steps[0]['loss']:.3f} to {steps[-1]['loss']:.3f}")
    held_out = [event for event in read_events(run.metrics) if "eval/library/loss" in event]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "steps": len(steps),
        "tokens": steps[-1]["tokens"],
        **{f"loss, {name}": event["loss"] for name, event in losses.items()},
        "held-out loss, first": held_out[0]["eval/library/loss"],
        "held-out loss, last": held_out[-1]["eval/library/loss"],
        "tokens/s, median": statistics.median(event["tokens_per_second"] for event in steps),
        "MFU, median": statistics.median(event.get("mfu") or 0.0 for event in steps) or None,  # None: unknown peak
        "peak memory": max(event["memory"] for event in steps),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_pretraining", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=120, help="of training (120)")
    with tempfile.TemporaryDirectory(prefix="deepcloze-pretraining-") as temporary:
        print_figures(pretrain(Path(temporary), parser.parse_args().seconds))
