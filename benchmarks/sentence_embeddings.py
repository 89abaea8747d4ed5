"""Scores of embeddings that `deepcloze finetune` and sentence-transformers have trained.

    python -m benchmarks.sentence_embeddings --config=FILE [--section.key=value …]

`--config` is a config of kind `embedding` with scored pairs. Both train the same encoder once per seed, with CoSENT,
AdamW, linear warmup and decay, the same batch size and number of updates. They draw batches and dropout differently.
sentence-transformers computes and scores its vectors itself. Of deepcloze, the best epoch counts, of
sentence-transformers the last one: use one epoch.
"""

import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import CoSENTLoss

from benchmarks.measuring import describe_machine
from experiment.formatting import print_table
from finetune.config import FinetuneConfig
from finetune.data.records import Table as Rows
from finetune.data.splits import read_splits
from finetune.resolve import load_run_config
from finetune.run import run
from finetune.scores.metrics import summarize

SPLITS = ("validation", "test")


def main(arguments: Sequence[str]) -> None:
    """Train both and print a table. arguments: as on the command line."""
    overrides = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    config = load_run_config(overrides.pop("config"), overrides)
    tables = read_splits(config.task, joiner=None)
    found = [train_peer(config, tables, seed) for seed in config.training.seeds]
    ours = run(config)["splits"]
    scores = {
        "sentence-transformers": [summarize([scores[split] for scores in found]) for split in SPLITS],
        "deepcloze finetune": [ours[split]["spearman"] for split in SPLITS],
    }
    rows = (
        [name, *(f"{each['mean']:.4f} ± {each['std']:.4f}: {_list(each['values'])}" for each in by_split)]
        for name, by_split in scores.items()
    )
    print_table(["Spearman, mean ± std", *SPLITS], rows, title=config.task.name)
    print(describe_machine())


def _list(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def train_peer(config: FinetuneConfig, tables: dict[str, Rows], seed: int) -> dict[str, float]:
    """Return the scores of sentence-transformers by split."""
    training = config.training
    model = SentenceTransformer(config.model.init_from, device="cpu")
    model.max_seq_length = config.model.max_seq_length
    arguments = SentenceTransformerTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.lr,
        weight_decay=training.weight_decay,
        num_train_epochs=training.epochs,
        max_steps=training.steps or -1,
        warmup_steps=training.warmup_ratio,
        seed=seed,
        bf16=training.precision == "bf16",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    loss = CoSENTLoss(model, scale=20.0)
    SentenceTransformerTrainer(
        model, arguments, train_dataset=Dataset.from_dict(_columns(tables["train"])), loss=loss
    ).train()
    return {split: _score(model, _columns(tables[split])) for split in SPLITS}


def _columns(table: Rows) -> dict[str, list[Any]]:
    return {role: [record.values[role] for record in table.records] for role in ("text", "text_pair", "score")}


def _score(model: SentenceTransformer, columns: dict[str, list[Any]]) -> float:
    evaluator = EmbeddingSimilarityEvaluator(columns["text"], columns["text_pair"], columns["score"])
    return float(evaluator(model)["spearman_cosine"])


if __name__ == "__main__":
    main(sys.argv[1:])
