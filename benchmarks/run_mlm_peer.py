"""The transformers `run_mlm` recipe, timed: Trainer and DataCollatorForLanguageModeling on plain text.

Run by `benchmarks.throughput` in a process of its own; prints one JSON object. What it does is what `run_mlm` does with
its defaults, less the downloading: tokenise, join and cut into blocks (or one line an example), mask 15 % in the
collator, compute the full head, step AdamW. Read-ahead is off, as there.
"""

import json
import sys
import tempfile
import time
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
)

from experiment.tokenizer import load_tokenizer


class _Watch(TrainerCallback):  # type: ignore[misc]
    """The time at the end of the warm-up and at the end of the last step."""

    def __init__(self, warm_steps: int) -> None:
        self.warm_steps = warm_steps
        self.began = self.ended = 0.0

    def on_step_end(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
        self.ended = time.perf_counter()
        if state.global_step == self.warm_steps:
            self.began = self.ended


class _Counting:
    """A collator that counts the real tokens of the batches after the warm-up."""

    def __init__(self, collator: DataCollatorForLanguageModeling, warm_steps: int) -> None:
        self.collator = collator
        self.left = warm_steps
        self.tokens = 0

    def __call__(self, examples: list[Any]) -> Any:
        batch = self.collator(examples)
        self.left -= 1
        if self.left < 0:
            self.tokens += int(batch["attention_mask"].sum())
        return batch


def run(
    source: str,
    tokenizer: str,
    model: str,
    lines: bool,
    precision: str,
    length: int,
    threads: int,
    steps: int,
    warm: int,
) -> None:
    """Train `steps` steps of 32 examples and print {"tokens_per_second": …} of those after the first `warm`."""
    torch.set_num_threads(threads)
    opened = load_tokenizer(Path(tokenizer))
    text = [line for line in Path(source).read_text(encoding="utf-8").splitlines() if line and not line.isspace()]
    encoded = opened(text, return_special_tokens_mask=True, truncation=lines, max_length=length if lines else None)
    examples = _lines(encoded) if lines else _blocks(encoded, length)
    while len(examples) < 32 * steps:
        examples = examples + examples
    config = AutoConfig.for_model("bert", vocab_size=len(opened), **json.loads(model))
    watch = _Watch(warm)
    collator = _Counting(DataCollatorForLanguageModeling(opened, mlm_probability=0.15), warm)
    with tempfile.TemporaryDirectory() as scratch:
        Trainer(
            model=AutoModelForMaskedLM.from_config(config),
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=steps,
                per_device_train_batch_size=32,
                bf16=precision == "bf16",
                use_cpu=not torch.cuda.is_available(),
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=examples,
            data_collator=collator,
            callbacks=[watch],
        ).train()
    print(json.dumps({"tokens_per_second": collator.tokens / (watch.ended - watch.began)}), flush=True)


def _lines(encoded: Any) -> list[dict[str, list[int]]]:
    keys = ("input_ids", "attention_mask", "special_tokens_mask")
    return [dict(zip(keys, row, strict=True)) for row in zip(*(encoded[key] for key in keys), strict=True)]


def _blocks(encoded: Any, length: int) -> list[dict[str, list[int]]]:
    joined = {
        key: list(chain.from_iterable(encoded[key])) for key in ("input_ids", "attention_mask", "special_tokens_mask")
    }
    whole = len(joined["input_ids"]) // length * length
    return [{key: row[start : start + length] for key, row in joined.items()} for start in range(0, whole, length)]


if __name__ == "__main__":
    run(**json.loads(sys.argv[1]))
