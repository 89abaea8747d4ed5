"""The transformers `run_mlm` recipe: Trainer and DataCollatorForLanguageModeling on plain text.

Runs in a process of its own and prints one JSON object: `benchmarks.throughput` measures tokens per second,
`benchmarks.time_to_loss` trains for some minutes and saves the model. The recipe does the same as `run_mlm` by default,
except for downloading: tokenize, concatenate and split into blocks (or one line per example), mask 15 % in the
collator, compute the full head, step AdamW. Prefetching is off, as in `run_mlm`.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from experiment.models.tokenizer import load_tokenizer

BATCH = 32  # examples of a microbatch
_MOST_STEPS = 10**9  # the time limit comes first
_KEYS = ("input_ids", "attention_mask", "special_tokens_mask")


@dataclass(frozen=True)
class Recipe:
    """Model, data and batches of the peer."""

    source: str  # text file, one document per line
    tokenizer: str
    model: dict[str, int]  # fields of the BERT config
    lines: bool  # one line per example; otherwise blocks
    precision: str
    length: int  # longest example, in tokens
    threads: int
    accumulated: int  # microbatches of an update


@dataclass(frozen=True)
class PeerSettings(Recipe):
    """A run that is timed."""

    updates: int
    warmup_updates: int  # the first updates, not timed


@dataclass(frozen=True)
class LimitedPeerSettings(Recipe):
    """A run that trains for a time and is saved."""

    seconds: float
    folder: str  # to save the model and its tokenizer in
    arguments: dict[str, Any]  # of TrainingArguments: the update rule and its learning rates


class _Timer(TrainerCallback):  # type: ignore[misc]
    """Records when the untimed updates end, and when the last update ends."""

    def __init__(self, warmup_updates: int) -> None:
        self.warmup_updates = warmup_updates
        self.started = self.ended = 0.0

    def on_step_end(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
        self.ended = time.perf_counter()
        if state.global_step == self.warmup_updates:
            self.started = self.ended


class _TimeLimit(TrainerCallback):  # type: ignore[misc]
    """Ends training after the first step that ends after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    def on_step_end(self, _arguments: Any, _state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = time.perf_counter() >= self._end


class _CountingCollator:
    """Counts the real tokens of each microbatch."""

    def __init__(self, collator: DataCollatorForLanguageModeling) -> None:
        self.collator = collator
        self.tokens: list[int] = []

    def __call__(self, examples: list[Any]) -> Any:
        batch = self.collator(examples)
        self.tokens.append(int(batch["attention_mask"].sum()))
        return batch


def run(settings: PeerSettings) -> float:
    """Train and return the tokens per second of the timed updates."""
    tokenizer = load_tokenizer(Path(settings.tokenizer))
    examples = tokenize(settings, tokenizer)
    while len(examples) < BATCH * settings.accumulated * settings.updates:
        examples = examples + examples
    collator = _CountingCollator(mask(tokenizer))
    timer = _Timer(settings.warmup_updates)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(settings, tokenizer, examples, output_dir=scratch, max_steps=settings.updates)
        trainer.data_collator = collator
        trainer.add_callback(timer)
        trainer.train()
    first, last = (number * settings.accumulated for number in (settings.warmup_updates, settings.updates))
    return sum(collator.tokens[first:last]) / (timer.ended - timer.started)  # accelerate collates one more ahead


def run_for_minutes(settings: LimitedPeerSettings) -> int:
    """Train, save, and return the number of updates. The time starts with the first step, after tokenization."""
    tokenizer = load_tokenizer(Path(settings.tokenizer))
    examples = tokenize(settings, tokenizer)
    trainer = build_trainer(
        settings, tokenizer, examples, output_dir=settings.folder, max_steps=_MOST_STEPS, **settings.arguments
    )
    trainer.add_callback(_TimeLimit(settings.seconds))
    trainer.train()
    trainer.save_model(settings.folder)
    tokenizer.save_pretrained(settings.folder)
    return int(trainer.state.global_step)


def build_trainer(recipe: Recipe, tokenizer: Any, examples: list[dict[str, list[int]]], **arguments: Any) -> Trainer:
    """Return a Trainer for the recipe. `arguments`: further TrainingArguments."""
    torch.set_num_threads(recipe.threads)
    set_seed(42)
    config = AutoConfig.for_model("bert", vocab_size=len(tokenizer), **recipe.model)
    return Trainer(
        model=AutoModelForMaskedLM.from_config(config, trust_remote_code=False),
        args=TrainingArguments(
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=recipe.accumulated,
            bf16=recipe.precision == "bf16",
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=examples,
        data_collator=mask(tokenizer),
    )


def mask(tokenizer: Any) -> DataCollatorForLanguageModeling:
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)


def tokenize(recipe: Recipe, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Return the examples of one epoch."""
    text = Path(recipe.source).read_text(encoding="utf-8").splitlines()
    encoded = tokenizer(
        [line for line in text if line and not line.isspace()],
        return_special_tokens_mask=True,
        truncation=recipe.lines,
        max_length=recipe.length if recipe.lines else None,
    )
    return _lines(encoded) if recipe.lines else _blocks(encoded, recipe.length)


def _lines(encoded: Any) -> list[dict[str, list[int]]]:
    return [dict(zip(_KEYS, row, strict=True)) for row in zip(*(encoded[key] for key in _KEYS), strict=True)]


def _blocks(encoded: Any, length: int) -> list[dict[str, list[int]]]:
    joined = {key: list(chain.from_iterable(encoded[key])) for key in _KEYS}
    whole = len(joined["input_ids"]) // length * length
    return [{key: row[start : start + length] for key, row in joined.items()} for start in range(0, whole, length)]


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if "seconds" in given:
        printed: dict[str, float] = {"updates": run_for_minutes(LimitedPeerSettings(**given))}
    else:
        printed = {"tokens_per_second": run(PeerSettings(**given))}
    print(json.dumps(printed), flush=True)
