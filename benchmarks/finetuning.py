"""Examples per CPU-second of `deepcloze finetune` and of transformers' Trainer.

    python -m benchmarks.finetuning --config FILE [--precision fp32] [--steps 60] [--rounds 3]

`--config` is a config of a classification task on single texts or pairs. All train the same model on the same examples
for the same number of updates, with AdamW, linear warmup and decay, each in its own process, on one thread. They
alternate, so that a slow minute of the machine affects all. CPU time of the training alone is counted: no loading, no
evaluation. The Trainer is measured with `train_sampling_strategy="group_by_length"` and dynamic padding, and with all
sequences padded to `model.max_seq_length`. All keep freed memory, as `deepcloze finetune` does. The accuracy is on the
validation split.
"""

import statistics
import tempfile
import time
from typing import Any

import torch

from benchmarks.measuring import describe_machine, run_module, run_or_measure
from experiment.formatting import print_table
from experiment.process.hardware import keep_freed_memory
from finetune.device import MicrobatchSize
from finetune.encoding.examples import Split
from finetune.inference import evaluate
from finetune.model import build_model
from finetune.resolve import ResolvedRun, load_run_config, resolve
from finetune.scores.metrics import classification_scores
from finetune.training.fit import fit

DEEPCLOZE, GROUPED, PADDED = "deepcloze finetune", "Trainer, group_by_length", "Trainer, padded to max_seq_length"


def finetuning(config: str, *, precision: str = "fp32", steps: int = 60, rounds: int = 3) -> None:
    """Measure all and print a table."""
    results: dict[str, list[dict[str, float]]] = {DEEPCLOZE: [], GROUPED: [], PADDED: []}
    for seed in range(1, rounds + 1):
        for name, found in results.items():
            settings = {"name": name, "config": config, "precision": precision, "steps": steps, "seed": seed}
            found.append(run_module("benchmarks.finetuning", settings))
    ours = [found["rate"] for found in results[DEEPCLOZE]]
    rows = []
    for name, found in results.items():
        rates, scores = ([run[key] for run in found] for key in ("rate", "accuracy"))
        ratio = statistics.median(our / other for our, other in zip(ours, rates, strict=True))
        rows.append([name, f"{statistics.median(rates):.1f}", f"{ratio:.2f} x", f"{statistics.fmean(scores):.4f}"])
    columns = ("", "examples per CPU-second", "deepcloze is faster by", "accuracy")
    print_table(columns, rows, title=f"{precision}, {steps} updates, {rounds} rounds")
    print(describe_machine())


def measure(name: str, config: str, precision: str, steps: int, seed: int) -> dict[str, float]:
    """Train one contestant in this process."""
    overrides = {"training.precision": precision, "training.steps": str(steps), "training.evaluate_every": str(steps)}
    keep_freed_memory()
    torch.set_num_threads(1)  # threads that wait for each other would count
    run = resolve(load_run_config(config, overrides))
    measured = _measure_deepcloze if name == DEEPCLOZE else _measure_trainer
    torch.manual_seed(seed)
    seconds, accuracy = measured(run, seed, name == GROUPED)
    return {"rate": steps * run.training.batch_size / seconds, "accuracy": accuracy}


def _measure_deepcloze(run: ResolvedRun, seed: int, _: bool) -> tuple[float, float]:
    model, validation = build_model(run.model).model, run.task.splits["validation"]
    start = time.process_time()
    fitted = fit(model, run.task, run.training, seed, lambda *_: None)
    assert fitted.best is not None
    trained = time.process_time()
    evaluate(model, run.task, validation, MicrobatchSize(run.training.batch_size * 4))
    evaluation = time.process_time() - trained  # `fit` has evaluated once
    return trained - start - evaluation, fitted.best.scores["accuracy"]


def _measure_trainer(run: ResolvedRun, seed: int, grouped: bool) -> tuple[float, float]:
    from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

    training = run.training
    padding: dict[str, Any] = {"padding": True}
    if not grouped:
        padding = {"padding": "max_length", "max_length": run.max_seq_length}
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size * 4,
        learning_rate=training.lr,
        weight_decay=training.weight_decay,
        warmup_steps=round(training.warmup_ratio * (training.steps or 0)),
        max_steps=training.steps or -1,
        train_sampling_strategy="group_by_length" if grouped else "random",
        bf16=run.task.device.precision == "bf16",
        seed=seed,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=run.task.device.torch_device.type == "cpu",
    )
    tokenizer = AutoTokenizer.from_pretrained(run.model.folder, trust_remote_code=False)
    trainer = Trainer(
        build_model(run.model).model,
        arguments,
        data_collator=DataCollatorWithPadding(tokenizer, **padding),
        train_dataset=_rows(run.task.splits["train"]),
    )
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    found = trainer.predict(_rows(run.task.splits["validation"]))
    return seconds, classification_scores(found.label_ids, found.predictions.argmax(-1))["accuracy"]


def _rows(split: Split) -> list[dict[str, Any]]:
    """Return a split as the Trainer takes it."""
    rows = []
    for example in split.examples:
        (tokens,) = example.sequences
        row = {"input_ids": tokens.input_ids.tolist(), "labels": example.target}
        if tokens.token_type_ids is not None:
            row["token_type_ids"] = tokens.token_type_ids.tolist()
        rows.append(row)
    return rows


if __name__ == "__main__":
    run_or_measure(finetuning, measure)
