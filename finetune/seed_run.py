"""Train one model per seed. A finished seed is a folder RUN/seed-N that is written aside and renamed."""

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiment.errors import UserError, require_damage
from experiment.files import created_parents, parse_record, removed_on_error, write_json
from experiment.progress import print_warning, terminal
from experiment.run_files.provenance import read_provenance, write_origin
from experiment.run_files.run_folder import RunFolder
from finetune.config import changed_settings
from finetune.encoding.encoder import load_task_tokenizer
from finetune.model import build_model, fit_output_range, save_model
from finetune.prediction.saved_task import SavedTask, write_saved_task
from finetune.resolve import ResolvedRun
from finetune.results.finetuned_card import write_seed_card
from finetune.results.predictions import prediction_rows, write_rows, write_worst_rows
from finetune.results.seed_summary import SeedRecord
from finetune.results.tables import print_epochs
from finetune.scores.calibration import measure_calibration
from finetune.scores.metrics import confusion_matrix
from finetune.training.fit import Epoch, Fitted, Log, StateFile, evaluate_untrained, fit

_COMPLETE = "COMPLETE"  # written last into a seed's folder
_EVALUATIONS = "evaluations"  # folder of the models of all evaluations
_CHECKSUMS = ("data.", "encoder.")
_CONFUSION_LABELS = 1000  # whose counts are kept: files of more would have tens of megabytes


def read_finished_seeds(
    folder: RunFolder, settings: Mapping[str, Any], not_compared: tuple[str, ...] = ()
) -> dict[int, SeedRecord]:
    """Return the finished seeds in a run folder. not_compared: prefixes of the keys of settings that are left out.

    Raises UserError for a folder of a run with other settings, and for files that are damaged or cannot be read.
    """
    records = {}
    for seed, path in folder.finished_seeds.items():
        try:
            record = parse_record(SeedRecord, path.read_bytes())
        except (OSError, ValueError) as error:
            require_damage(error, f"{path} cannot be read")
            raise UserError(f"{path} is damaged: remove {path.parent} to train this seed again") from None
        changed = changed_settings(settings, record.settings)
        if compared := [key for key in changed if not key.startswith(not_compared)]:
            differences = describe_differences({key: changed[key] for key in compared})
            raise UserError(
                f"run.dir: {path.parent} was trained with other settings: {differences}; choose another run.dir"
            )
        records[seed] = record
    return records


def describe_differences(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Return settings that differ: keys of the config with the value before and now, then files by name."""
    keys = sorted(changed, key=lambda key: key.startswith(_CHECKSUMS))
    return ", ".join(
        key if key.startswith(_CHECKSUMS) else "{} (was {!r}, is {!r})".format(key, *changed[key]) for key in keys
    )


def state_file(seed: int, run: ResolvedRun) -> StateFile:
    """Return the state from which an interrupted training with this seed resumes."""
    return StateFile(_working_folder(seed, run.folder) / "state.pt", run.settings)


def remove_state(seed: int, folder: RunFolder) -> None:
    """Remove what a finished seed does not need any more. If it cannot be removed now, the next command tries again."""
    shutil.rmtree(_working_folder(seed, folder), ignore_errors=True)


def is_finished(seed: int, run: ResolvedRun) -> bool:
    return (run.folder.seed_folder(seed) / _COMPLETE).exists()


def train_seed(seed: int, run: ResolvedRun, log: Log) -> SeedRecord:
    """Build, train and save one model in RUN/seed-N."""
    torch.manual_seed(seed)  # for the new head; `fit` seeds again
    built = build_model(run.model)
    model = built.model
    # Saved with the model: the one that tokenized has other truncation settings. Retention may delete its folder later.
    tokenizer = load_task_tokenizer(run.model.folder, run.task.kind.config, fine_tunes=True)
    if run.task.kind.config.is_trained:
        if (found := run.task.kind.target_range(run.task.splits["train"].table)) is not None:
            fit_output_range(built, *found)
        state = state_file(seed, run)
        evaluations = _working_folder(seed, run.folder) / _EVALUATIONS
        if run.keep != "all" or not state.steps:
            shutil.rmtree(evaluations, ignore_errors=True)

        def keep(steps: int) -> None:
            if run.keep == "all":
                _write_model(evaluations / f"step-{steps:08d}", model, tokenizer, run)

        fitted = fit(model, run.task, run.training, seed, log, state, keep)
    else:
        fitted = evaluate_untrained(model, run.task, run.training)
    record = _make_record(fitted, run)
    print_seed(seed, record, run)
    output = _working_folder(seed, run.folder) / "output"
    final = run.folder.seed_folder(seed)
    for leftover in (output, final):
        shutil.rmtree(leftover, ignore_errors=True)
    with created_parents(output), removed_on_error(output):
        output.mkdir()
        _write_seed(output, seed, model, tokenizer, fitted, record, run)
        with suppress(FileNotFoundError):
            (output.parent / _EVALUATIONS).rename(output / _EVALUATIONS)
        output.rename(final)
        remove_state(seed, run.folder)
    return record


def print_seed(seed: int, record: SeedRecord, run: ResolvedRun) -> None:
    """Print the epochs of a finished seed, and advice if it has collapsed."""
    if record.epochs:
        print_epochs(terminal(), f"seed {seed}", record.epochs, record.best_epoch)
    if record.collapsed:
        advice = "; usual values of training.lr are in docs/finetuning.md" if record.epochs else ""
        if record.epochs and (steps := record.epochs[-1]["steps"]) < run.steps:
            advice += f", and training.patience stopped it at step {steps:,} of {run.steps:,}"
        splits = ", ".join(record.collapsed)
        print_warning(f"seed {seed} has collapsed: it predicts the same for every row of {splits}{advice}")


def _working_folder(seed: int, folder: RunFolder) -> Path:
    """Return the folder of a seed until it is finished."""
    return folder.path / f".seed-{seed}"


def _write_seed(
    folder: Path,
    seed: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fitted: Fitted,
    record: SeedRecord,
    run: ResolvedRun,
) -> None:
    """Write the content of RUN/seed-N to `folder`, which will be renamed to it."""
    if run.keep != "none":
        _write_model(folder / "model", model, tokenizer, run, record.temperature)
        if provenance := read_provenance(run.folder):
            final = RunFolder(run.folder.seed_folder(seed))
            write_origin(folder / "model", final, provenance, fitted.best.steps if fitted.best else 0)
            write_seed_card(seed, run, record, provenance, folder / "model")
    if record.epochs:
        write_rows(folder / "epochs.csv", record.epochs)
    for split, evaluation in fitted.evaluations.items():
        kind, table = run.task.kind, run.task.splits[split].table
        write_rows(folder / f"predictions-{split}.csv", prediction_rows(kind, table.records, evaluation.predictions))
        write_rows(folder / f"predictions-{split}.jsonl", evaluation.predictions)
        if split in record.scores:
            write_worst_rows(folder / f"worst-{split}.csv", kind, table.records, evaluation.predictions)
            for name, rows in kind.breakdowns(table.records, evaluation.predictions).items():
                write_rows(folder / f"{name}-{split}.csv", rows)
    write_json(folder / _COMPLETE, asdict(record))


def _write_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run: ResolvedRun,
    temperature: float | None = None,
) -> None:
    save_model(model, tokenizer, run.task.kind.config.special_tokens_in_text, folder)
    for name, content in run.task.kind.library_files(model, run.max_seq_length).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, content)
    task = SavedTask(
        kind=run.task.kind,
        max_seq_length=run.max_seq_length,
        padded=run.task.padding.length is not None,
        temperature=temperature,
    )
    write_saved_task(folder, task)


def _make_record(fitted: Fitted, run: ResolvedRun) -> SeedRecord:
    kind = run.task.kind
    labelled = {
        split: (run.task.splits[split].table.records, evaluation.predictions)
        for split, evaluation in fitted.evaluations.items()
        if evaluation.scores
    }
    counted = labelled if len(kind.labels) <= _CONFUSION_LABELS else {}
    temperature, calibration = measure_calibration({split: kind.classified(*rows) for split, rows in labelled.items()})
    return SeedRecord(
        settings=run.settings,
        best_epoch=fitted.best.epoch if fitted.best else 0,
        epochs=[_epoch_row(epoch, kind.config.metric) for epoch in fitted.epochs],
        scores={split: fitted.evaluations[split].scores for split in labelled},
        intervals={split: dict(kind.intervals(*rows)) for split, rows in labelled.items()},
        confusion={
            split: confusion_matrix(*pairs, len(kind.labels)).tolist()
            for split, rows in counted.items()
            if (pairs := kind.label_pairs(*rows)) is not None
        },
        label_scores={split: scores for split, rows in labelled.items() if (scores := kind.label_scores(*rows))},
        collapsed=[split for split, rows in labelled.items() if kind.is_collapsed(*rows)],
        temperature=temperature,
        calibration=calibration,
    )


def _epoch_row(epoch: Epoch, metric: str) -> dict[str, float]:
    row = asdict(epoch)
    scores, train_scores = row.pop("scores"), row.pop("train_scores")
    if epoch.validation_loss is None:
        del row["validation_loss"]
    return {**row, **scores, **({f"train_{metric}": train_scores[metric]} if metric in train_scores else {})}
