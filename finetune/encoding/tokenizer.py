"""The tokenizer of a model, as a task needs it."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from experiment.tokenizer import load_any_tokenizer
from finetune.data.records import TurnJoiner
from finetune.data.task_config import TaskConfig


def load_task_tokenizer(folder: Path, task: TaskConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises UserError if it lacks a special token that the task needs."""
    needed = ["pad_token"] if task.dialogue is None else ["pad_token", "sep_token"]
    tokenizer = load_any_tokenizer(folder, needed)
    if task.dialogue is not None:
        tokenizer.truncation_side = "left"  # keep the text itself rather than the turns before it
    return tokenizer


def turn_joiner(folder: Path, task: TaskConfig) -> TurnJoiner | None:
    """Joins the turns of dialogues for the model in a folder, if the task has any."""
    if task.dialogue is None:
        return None
    return TurnJoiner(task.dialogue, load_task_tokenizer(folder, task).sep_token)
