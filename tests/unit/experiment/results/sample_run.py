"""A run folder with everything that a report shows, without training anything."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_json
from safetensors.numpy import save_file

from experiment.files import write_json, write_text
from experiment.results.charts import Charts, ChartsData
from experiment.run_files.checkpoints import mark_complete, write_best
from experiment.run_files.fillings import CheckpointFillings, FilledSentence, MaskedSentence, add_fillings
from experiment.run_files.provenance import write_provenance
from experiment.run_files.run_folder import RunFolder, open_run_folder

MARKUP = "<script>document.title='broken'</script>"
SENTENCES = (
    MaskedSentence("the default value is ", "none", ", which disables the cache."),
    MaskedSentence("returns a new ", "array", " with the same shape and type as a given one."),
    MaskedSentence("raises an error if the file does not ", "exist", "."),
    MaskedSentence(f"{MARKUP} is ", "text", "."),
)
_CONFIG = """run:
  dir: {dir}
  seed: 42
optimizer:
  name: adamw
  lr: {lr}
schedule:
  name: wsd
  steps: {steps}
  stages:
  - steps: {stage}
    max_seq_length: 128
  - steps: null
    max_seq_length: 512
    sequences: 64
"""


def data_of(charts: Charts) -> Any:
    """What a page has of them, as `page.js` describes."""
    return json.loads(to_json(ChartsData(charts).changes()))


def make_run(path: Path, steps: int = 1000, lr: float = 5e-4, seed: int = 1) -> RunFolder:
    """A run of `steps` steps that was restarted twice, had a bad batch and evaluated on two corpora."""
    folder = open_run_folder(path)
    write_text(folder.config, _CONFIG.format(dir=path, lr=lr, steps=steps, stage=steps // 2))
    write_text(folder.metrics, "".join(f"{json.dumps(event)}\n" for event in _events(steps, lr, seed)))
    write_text(folder.goodput, "\n".join(json.dumps(line) for line in _attempts(steps)))
    write_json(folder.logs / "outcome.json", {"outcome": "done", "message": "", "cause": None})
    bad = folder.bad_batch(steps * 7 // 20)
    write_json(bad / "fault.json", {"step": steps * 7 // 20, "what": f"step {steps * 7 // 20}: the loss is nan"})
    hardware = {"gpus": ["NVIDIA H100"] * 8, "cores": 128, "cpu": "Fast CPU"}
    git = {"commit": "0123456789abcdef", "dirty": True}
    versions = {"deepcloze": "0.2.0", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"}
    for hour in (9, 12, 18):
        attempt = {"date": f"2026-11-20T{hour:02}:20:30+00:00", "host": "node-1", "world_size": 8, "git": git}
        step = {9: 0, 12: steps * 7 // 25, 18: steps * 4 // 5}[hour]
        write_provenance(folder, {**attempt, "step": step, "hardware": hardware, "versions": versions})
    _write_checkpoint(folder, steps)
    for step in (steps // 4, steps // 2, steps):
        add_fillings(folder, _fillings(step, step / steps))
    return folder


def _events(steps: int, lr: float, seed: int) -> list[dict[str, Any]]:
    draw, events = random.Random(seed), []
    every = max(1, steps // 5000)
    for step in range(every, steps + 1, every):
        share, noise = step / steps, draw.gauss(0, 0.05)
        loss = 2.2 + 7.5 * math.exp(-9 * share) + 0.8 * (1 - share) + 150 * abs(lr - 4e-4) + noise
        rate = lr * min(1.0, share / 0.05, (1 - share) / 0.25 + 0.01)
        norm = math.exp(draw.gauss(0, 0.3)) * (30 if draw.random() < 0.002 else 1)
        speed = (410_000 if share < 0.5 else 365_000) * (1 + draw.gauss(0, 0.02))
        event = {"step": step, "tokens": step * 32_768, "loss": loss, "lr": rate, "grad_norm": norm}
        events.append(event | {"tokens_per_second": speed, "data_wait": abs(draw.gauss(0, 0.01)), "memory": 41 * 2**30})
        if step % max(1, steps // 20) < every:
            events.append(
                {"step": step, "tokens": step * 32_768} | _scores("wikipedia", loss) | _scores("books", loss + 0.3)
            )
    return events


def _scores(corpus: str, loss: float) -> dict[str, float]:
    scores = {"loss": loss, "perplexity": math.exp(loss), "accuracy": 1 / (1 + math.exp(loss - 3))}
    return {f"eval/{corpus}/{name}": value for name, value in scores.items()}


def _attempts(steps: int) -> list[dict[str, Any]]:
    """Lines of three attempts."""
    lines = []
    for number, (first, last) in enumerate(((0, 0.3), (0.28, 0.8), (0.8, 1.0))):
        start = 1_795_166_430.0 + 20_000 * number
        for step, time in ((int(first * steps), 200.0), (int(last * steps), 16_000.0)):
            seconds = {"useful": time - 170, "evaluating": 80.0, "starting": 60.0, "checkpointing": 30.0}
            line = {"start": start, "time": start + time, "step": step, "reached": step, "total_steps": steps}
            lines.append({**line, "activity": "training", "seconds": seconds})
    return lines


def _write_checkpoint(folder: RunFolder, step: int) -> None:
    checkpoint = folder.checkpoints / f"step-{step:08d}"
    (checkpoint / "hf").mkdir(parents=True)
    save_file({"weight": np.zeros((1000, 64), dtype=np.float32)}, checkpoint / "hf" / "model.safetensors")
    corpora = {"train": [{"name": "wikipedia", "tokens": 20_000_000, "weight": 1.0}]}
    state = {"precision": "bf16", "corpora": corpora, "tokens_per_epoch": {"wikipedia": 20_500_000.0}}
    write_json(checkpoint / "state.json", state)
    mark_complete(checkpoint)
    write_best(folder.checkpoints, step)


def _fillings(step: int, share: float) -> CheckpointFillings:
    others = ("<b>the</b>", "value", "set", "model")
    filled = []
    for sentence in SENTENCES:
        top = [(token, round((1 - share) / (rank + 2), 4)) for rank, token in enumerate(others)]
        top.insert(0 if share > 0.4 else 2, (sentence.answer, 0.1 + 0.7 * share))
        filled.append(FilledSentence(sentence, tuple(top)))
    return CheckpointFillings(step, str(step), tuple(filled))
