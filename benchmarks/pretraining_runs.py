"""Runs of `deepcloze pretrain` that benchmarks start and measure."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from benchmarks.measuring import deepcloze
from experiment.run_files.metrics_file import Event, read_events
from experiment.run_files.run_folder import RunFolder
from pretrain.batching.sequences import split_documents
from pretrain.corpus.reader import open_corpus

MODELS = {
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
ROWS = 34  # of a microbatch of deepcloze: 32 would just not hold 32 rows of real tokens

Config = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class RunSettings:
    """Corpus, model, precision and batch size of a run."""

    corpus: Path
    model: dict[str, int]  # fields of the BERT config
    precision: str  # bf16 or fp32
    length: int  # longest sequence, in tokens
    update_tokens: int  # real tokens of an update, about

    def config(self, **sections: dict[str, Any]) -> Config:
        """Return the config of a run. `sections`: keys to add or replace."""
        config: Config = {
            "run": {"dir": "set on the command line"},
            "model": {"config": {"model_type": "bert", **self.model}},
            "corpus": {"train": str(self.corpus)},
            "batch": {
                "sequences": max(1, round(self.update_tokens / mean_length(self.corpus, self.length))),
                "max_seq_length": self.length,
                "microbatch_tokens": ROWS * self.length,
            },
            "checkpoint": {"every_steps": None},
            "engine": {"ds_config": f"ds_configs/{self.precision}_zero1.json"},
        }
        return config | {name: config.get(name, {}) | keys for name, keys in sections.items()}

    def timed_config(self, steps: int, **run: Any) -> Config:
        """Return the config of a run of `steps` steps that logs each of them and only evaluates at the end. `run`:
        keys."""
        return self.config(run={"log_every": 1, **run}, schedule={"steps": steps}, evaluation={"every_steps": steps})

    def peer(self, source: str, tokenizer: str, lines: bool, threads: int) -> dict[str, Any]:
        """Return the fields of the `run_mlm_peer.Recipe` with the same model, precision and update. lines: one line
        per example; otherwise blocks."""
        from benchmarks.run_mlm_peer import BATCH  # imports transformers' Trainer, which takes seconds

        example = mean_length(self.corpus, self.length) if lines else self.length
        accumulated = max(1, round(self.update_tokens / (BATCH * example)))
        shared = {"model": self.model, "precision": self.precision, "length": self.length, "threads": threads}
        return {"source": source, "tokenizer": tokenizer, "lines": lines, "accumulated": accumulated, **shared}


class Step(NamedTuple):
    """A step of a run."""

    event: Event  # its metrics
    tokens: int
    seconds: float  # without checkpoints and evaluations


def mean_length(corpus: Path, length: int) -> float:
    """Return the mean number of tokens of a sequence, special tokens included."""
    documents = [shard.astype(np.int64) for shard in open_corpus(corpus).document_lengths()]
    return float(np.concatenate([split_documents(shard, length - 2) for shard in documents]).mean()) + 2


def build_corpus(source: str, tokenizer: str, corpus: Path, *flags: str) -> Path:
    """Build a corpus unless it exists."""
    if not (corpus / "manifest.json").exists():
        deepcloze("corpus", "--source", source, "--tokenizer", tokenizer, "--output", str(corpus), *flags)
    return corpus


def pretrain(config: Config, folder: Path, *, ranks: int, threads: int) -> None:
    """Train in the run folder `folder`. `threads`: of all ranks together."""
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = ("pretrain", "--config", str(path), f"--run.dir={folder}", "--num_gpus", str(ranks))
    deepcloze(*command, threads=max(1, threads // ranks))


def read_steps(folder: Path) -> list[Step]:
    """Return the steps of a run that logged each of them."""
    events = [{"tokens": 0}, *read_events(RunFolder(folder).metrics)]
    tokens = ((event, event["tokens"] - before["tokens"]) for before, event in pairwise(events))
    return [Step(event, new, new / event["tokens_per_second"]) for event, new in tokens if "loss" in event]


def tokens_per_second(folder: Path, skipped: int) -> float:
    """Of the steps after the first `skipped` of a run that logged each step."""
    timed = read_steps(folder)[skipped:]
    return sum(step.tokens for step in timed) / sum(step.seconds for step in timed)
