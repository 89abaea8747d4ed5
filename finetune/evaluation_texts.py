"""The texts that a fine-tuning config evaluates on, for decontamination of pretraining text."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from experiment.config import load_config
from experiment.decontamination import EvaluationText, decontamination_of, texts_digests
from experiment.errors import UserError
from finetune.config import FinetuneConfig
from finetune.data.columns import CONTEXT
from finetune.data.dialogue import TurnJoiner
from finetune.data.records import Table, read_table
from finetune.data.splits import split_off
from finetune.data.task_config import TaskConfig
from finetune.task_kind import find_kind


def evaluation_texts(config: str) -> list[EvaluationText]:
    """Return the texts that a config file evaluates on, see `texts_of`. Raises UserError, also if there are none."""
    task = load_config(FinetuneConfig, config, {"model.init_from": "."}).task  # recipes leave it out
    if not (found := texts_of(task)):
        raise UserError("it has no validation or test texts; expected task.validation or task.test")
    return found


def contamination_warnings(config: TaskConfig, model: Path) -> Iterator[str]:
    """Yield a line, if a corpus that the model was pretrained on is not known to be decontaminated against the task.

    model: a Hugging Face folder.
    """
    known = decontamination_of(model)
    evaluated = {*texts_digests(texts_of(config)).values()} if known else set()
    if corpora := dict.fromkeys(corpus for corpus, digests in known if not evaluated.issubset(digests)):
        yield (
            f"the model was pretrained on {', '.join(corpora)}, which is not known to be decontaminated against this "
            "task: if it holds validation or test texts, scores are too high; see docs/cleaning.md, Evaluation texts"
        )


def texts_of(config: TaskConfig) -> list[EvaluationText]:
    """Return the texts of the validation and test splits. Without a validation file, of the part of the training split
    that fine-tuning draws. Raises UserError for files that cannot be read."""
    files, labels = config.files(), config.labels or ()

    def read(split: str, separator: str | None) -> Table:
        joiner = None if config.dialogue is None else TurnJoiner(config.dialogue, separator)
        # - may be a label of the training split, so rows with it are evaluated.
        known = labels if split == "train" else (*labels, "-")
        return read_table(Path(files[split]), config.columns, config.file_format(), split == "train", joiner, known)

    is_drawn = config.validation is None and config.is_trained
    tables = {split: read(split, None) for split in files if split != "train" or is_drawn}
    if train := tables.pop("train", None):
        # The draw has to be the same: where it depends on texts, of those with previous turns, behind any separator.
        has_turns = config.dialogue is not None and config.columns.roles(CONTEXT)
        _, drawn = split_off(read("train", "[SEP]") if has_turns else train, config)
        places = {record.place for record in drawn.records}
        records = tuple(record for record in train.records if record.place in places)
        tables["validation"] = replace(drawn, records=records)
    kind = find_kind(config.kind)(config, ())
    return [
        EvaluationText(split, record.place, text)
        for split, table in tables.items()
        for record in table.records
        for text in (*record.values.get("previous", ()), *kind.evaluated_texts(record))
        if text.strip()
    ]
