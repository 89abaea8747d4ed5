"""The transformers `run_mlm` recipe, trained for a time and saved.

`benchmarks.time_to_loss` runs it in a separate process. The time starts with the first step: neither imports nor
tokenization count. It prints one JSON object.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from benchmarks.run_mlm_peer import Recipe, build_trainer, tokenize
from experiment.tokenizer import load_tokenizer

_MOST_STEPS = 10**9  # the time limit comes first


@dataclass(frozen=True)
class LimitedPeerSettings(Recipe):
    """For how long it trains, and how."""

    seconds: float
    folder: str  # to save the model and its tokenizer in
    arguments: dict[str, Any]  # of TrainingArguments: the update rule and its learning rates


class _TimeLimit(TrainerCallback):  # type: ignore[misc]
    """Ends training after the first step that ends after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    def on_step_end(self, _arguments: Any, _state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = time.perf_counter() >= self._end


def run(settings: LimitedPeerSettings) -> int:
    """Train and save. Returns the number of updates."""
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


if __name__ == "__main__":
    updates = run(LimitedPeerSettings(**json.loads(sys.argv[1])))
    print(json.dumps({"updates": updates}), flush=True)
