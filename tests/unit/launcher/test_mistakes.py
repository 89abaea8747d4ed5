"""What a new user gets wrong: one line on stderr says what and where, exit code 2, and no file has changed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from empty_figures import EMPTY_FIGURES
from launcher.cli import main
from launches import patched
from rank_pool import ForkServer
from small_disk import SmallDisk

ROOT = Path(__file__).parents[3]
PRETRAINING = {
    "run": {"dir": "run"},
    "model": {
        "config": {
            "model_type": "bert",
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "max_position_embeddings": 32,
        }
    },
    "corpus": {"train": "corpus"},
    "batch": {"sequences": 8, "max_seq_length": 32, "microbatch_tokens": 256},
    "schedule": {"steps": 2, "warmup_steps": 5},
    "engine": {"ds_config": "fp32_zero1"},
}
TASK = {
    "run": {"dir": "task"},
    "task": {"train": "train.csv", "validation": "test.csv", "columns": {"text": "text", "label": "label"}},
    "model": {"init_from": "run", "max_seq_length": 16},
    "training": {"seeds": [1], "epochs": 1, "precision": "fp32"},
}
COMPARISON = {"run": {"dir": "compared"}, "rows": {"ours": {"init_from": "run"}}, "tasks": ["task.yaml"]}
ROWS = "text,label\n" + "ba de fi,low\ngo lu mar,high\n" * 8


COMMANDS = (
    "tokenizer --source text.txt --output tokenizer --vocab_size 200 --lowercase",
    "tokenizer --source text.txt --output bytes --vocab_size 330 --kind bpe",
    "corpus --source text.txt --tokenizer tokenizer --output corpus --holdout 40 --workers 1",
    "corpus --source text.txt --tokenizer bytes --output other --workers 1",
    "corpus --verify corpus",
    "plan --config run.yaml",
    "pretrain --config run.yaml",
    "evaluate --checkpoint run --corpus corpus-heldout",
    "finetune --config task.yaml",
    "predict --model task --input test.csv --output labels.csv --score",
    "export --checkpoint run --output exported",
    "report run",
    "status run",
)
PRINT_EVERY_LINE = "import experiment.progress\nexperiment.progress._SECONDS_BETWEEN_LINES = 0.0\n"


class Mistake(NamedTuple):
    """A command in a folder with a corpus, a tokenizer, configs, data, a pretraining `run` and a fine-tuning `task`."""

    command: str  # as typed after `deepcloze`
    message: str  # regular expression
    files: Mapping[str, str | bytes | None] = {}  # written before; None: a folder
    keeps: str | None = None  # folder of work that the corrected command continues


COMMAND_LINE = {
    "misspelt command": Mistake("pretain --config run.yaml", r"unknown command 'pretain'; did you mean 'pretrain'\?"),
    "unknown flag": Mistake("clean --config run.yaml --decontaminate dev.csv", r"'--decontaminate'; known: --column, "),
    "input of another command": Mistake(
        "corpus --input text.txt", r"unknown flag '--input'; did you mean '--source'\?"
    ),
    "misspelt key of a cleaning": Mistake(
        "clean --config clean.yaml --outptu a", r"'--outptu'; did you mean '--output'\?"
    ),
    "output by URL": Mistake("export --checkpoint run --output s3://b/a", r"a path on a disk, found the URL s3://b/a"),
    "model by position": Mistake("serve task", r"argument 'task'; flags are written"),
    "config of a comparison": Mistake("compare --config table.yaml", r"'--config'; did you mean '--file'\?"),
    "model of a checkpoint": Mistake("evaluate --model run", r"'--model'; did you mean '--checkpoint'\?"),
    "checkpoint of a model": Mistake("serve --checkpoint run", r"'--checkpoint'; did you mean '--model'\?"),
    "no dot": Mistake("pretrain --config run.yaml --run-dir x", r"'--run-dir'; did you mean '--run.dir'\?"),
    "flag by meaning": Mistake("plan --config run.yaml --gpu A100", r"'--gpu'; did you mean '--device'\?"),
    "flag of torchrun": Mistake("pretrain --nproc-per-node 2", r"per-node'; known: .* --num_gpus, "),
    "flag of another command": Mistake("pretrain --config run.yaml --gpu 2", r"'--gpu'; did you mean '--num_gpus'\?"),
    "no section": Mistake("pretrain --config run.yaml --steps 9", r"'--steps'; did you mean '--schedule.steps'\?"),
    "mapping without quotes": Mistake(
        "pretrain --config run.yaml --model.config=model_type:bert --model.config=hidden_size:8",
        r"'model.config': expected a mapping or null, found text \(\"hidden_size:8\"\); write '{key: value}', with the",
    ),
    "out of range": Mistake("plan --config run.yaml --mfu 40", r"--mfu: expected a number > 0 and <= 1, found '40'"),
    "misspelt key": Mistake("config pretrain optimizer.lrr", r"'optimizer.lrr'; did you mean 'optimizer.lr'\?"),
    "part of the flags": Mistake("corpus --source text.txt", r"missing: --tokenizer, --output \("),
    "no size of the vocabulary": Mistake(
        "tokenizer --source text.txt --output new", r"missing: --vocab_size, which --source needs"
    ),
    "no text to train on": Mistake(
        "tokenizer --vocab_size 100 --output new", r"missing: --source, which --vocab_size needs"
    ),
    "no tokens to add": Mistake("tokenizer --extend tokenizer --output new", r"missing: --added, which --extend needs"),
    "training and adding": Mistake(
        "tokenizer --source text.txt --extend tokenizer --output new", r"expected --source and --vocab_size to train"
    ),
    "bad pattern": Mistake(
        "corpus --source text.txt --tokenizer tokenizer --output new --document_start '['",
        r"--document_start: '\[' is not a regular expression",
    ),
    "share for a count": Mistake(
        "corpus --source text.txt --tokenizer tokenizer --output new --holdout 10%",
        r"--holdout: expected a whole number > 0, found '10%'",
    ),
    "grid without values": Mistake("sweep --config run.yaml --grid optimizer.lr", r"--grid: expected .*'optimizer.lr'"),
    "unknown key in a grid": Mistake(
        "sweep --config run.yaml --grid optimizer.lrr=1,2", r"did you mean 'optimizer.lr'"
    ),
    "unknown metric": Mistake(
        "sweep --config run.yaml --grid optimizer.lr=1,2 --metric accuracy",
        r"--metric: .* not report 'accuracy'",
    ),
}
CONFIGS = {
    "missing config": Mistake("pretrain --config no.yaml", r"cannot read the config file no.yaml: No such file"),
    "misspelt recipe as config": Mistake("pretrain --config roberta-bse", r"did you mean 'roberta-base'\?"),
    "beginning of a recipe": Mistake("validate bert", r"'bert'; known: bert-base-fast, bert-base-wikipedia-like "),
    "config without suffix": Mistake("validate broken", r"did you mean 'broken.yaml'\?", {"broken.yaml": ""}),
    "folder as config": Mistake("pretrain --config corpus", r"--config: corpus is a folder; expected a YAML file"),
    "empty config": Mistake(
        "pretrain --config empty.yaml",
        r"empty.yaml: 'run', 'model', 'corpus' and 'schedule' are missing",
        {"empty.yaml": ""},
    ),
    "task to pretrain": Mistake("pretrain --config task.yaml", r"the config of a task, for `deepcloze finetune`"),
    "pretraining to finetune": Mistake("finetune --config run.yaml", r"of a pretraining run, for `deepcloze pretrain`"),
    "comparison to pretrain": Mistake("pretrain --config compare.yaml", r"a comparison, for `deepcloze compare`"),
    "task to compare": Mistake("compare task.yaml", r"the config of a task, for `deepcloze finetune`"),
    "task to plan": Mistake("plan --config task.yaml", r"the config of a task, for `deepcloze finetune`"),
    "pretraining to watch": Mistake("watch run --task run.yaml", r"of a pretraining run, for `deepcloze pretrain`"),
    "misspelt steps of a cleaning": Mistake(
        "validate clean.yaml",
        r"clean.yaml, line 3: unknown config key 'step'; did you mean 'steps'",
        {"clean.yaml": "source: a.txt\noutput: b\nstep: []\n"},
    ),
    "source without text": Mistake(
        "clean --config clean.yaml",
        r"source: it holds no documents with text",
        {"clean.yaml": "source: a.txt\noutput: clean\nsteps: []\n", "a.txt": " \n\n"},
    ),
    "source without text, validated": Mistake(
        "validate clean.yaml",
        r"source: it holds no documents with text",
        {"clean.yaml": "source: a.txt\noutput: clean\nsteps: []\n", "a.txt": " \n\n"},
    ),
    "escape sequences in a key": Mistake(
        "validate a.yaml",
        r"unknown config key 'run.\\x1b\[31mred\\x07'",
        {"a.yaml": yaml.safe_dump(PRETRAINING).replace("dir: run", 'dir: run\n  "\\e[31mred\\a": 1')},
    ),
    "escape sequences in a value": Mistake(
        "pretrain --config run.yaml --run.dir=new --run.resume=\x1b[2J", r"'run.resume': .*\\x1b\[2J'"
    ),
    "unknown key": Mistake(
        "pretrain --config run.yaml --batch.sequence=8", r"'batch.sequence'; did you mean 'batch.sequences'\?"
    ),
    "wrong type": Mistake(
        "pretrain --config run.yaml --optimizer.lr=fast", r"'optimizer.lr': expected a number, found text \(\"fast\"\)"
    ),
    "shares": Mistake("pretrain --config run.yaml --masking.mask_share=0.95", r"mask_share \+ random_share is 1.05"),
    "module to freeze": Mistake(
        "pretrain --config run.yaml --model.freeze=embeding --model.freeze_steps=2",
        r"model.freeze: .*'embeding'.*'embeddings'",
    ),
    "large seed": Mistake("pretrain --config run.yaml --run.seed=18446744073709551616", r"'run.seed': should be less"),
    "character in a path": Mistake(
        "pretrain --config a.yaml",
        r"a.yaml, line 18: 'run.dir': a path cannot contain a NUL",
        {"a.yaml": yaml.safe_dump(PRETRAINING).replace("dir: run", 'dir: "a\\0b"')},
    ),
    "empty path": Mistake("pretrain --config run.yaml --run.dir=", r"'run.dir': expected a path, found an empty text"),
    "no timeout": Mistake(
        "validate run.yaml --health.hang_seconds=10000000000",
        r"command line: 'health.hang_seconds': should be less than or equal to 1000000000, found .*10000000000",
    ),
    "batch beyond counting": Mistake(
        "pretrain --config run.yaml --batch.sequences=100000000000000000000",
        r"'batch.sequences': should be less than or equal to 1000000000, found .*100000000000000000000",
    ),
    "steps beyond counting": Mistake(
        "plan --config run.yaml --schedule.steps=100000000000000000000",
        r"'schedule.steps': should be less than or equal",
    ),
    "steps of a stage beyond counting": Mistake(
        "plan --config run.yaml --schedule.stages='[{steps: 100000000000000000000}]'",
        r"'schedule.stages.0.steps': should be less than or equal",
    ),
    "tokens beyond counting": Mistake(
        "plan --config run.yaml --schedule.steps=null --schedule.tokens=1e30",
        r"'schedule.tokens': should be less than or equal",
    ),
    "epochs beyond counting": Mistake(
        "plan --config run.yaml --schedule.steps=null --schedule.epochs=1e30",
        r"'schedule.epochs': should be less than or equal",
    ),
    "batch of a task beyond counting": Mistake(
        "finetune --config task.yaml --run.dir=new --training.batch_size=100000000000000000000",
        r"'training.batch_size': should be less than or equal",
    ),
    "no seeds": Mistake("finetune --config task.yaml --training.seeds=", r"seeds: needs one or more, each once"),
    "a seed twice": Mistake("finetune --config task.yaml --training.seeds=1,1", r"seeds: needs one or more, each once"),
    "two lengths": Mistake(
        "pretrain --config run.yaml --schedule.epochs=1", r"exactly one of .*, found 'steps' and 'epochs'"
    ),
    "duration": Mistake(
        "pretrain --config run.yaml --schedule.steps=null --schedule.budget=2hours",
        r"'2hours' is not a duration",
    ),
    "small microbatch": Mistake(
        "pretrain --config run.yaml --batch.microbatch_tokens=16", r"microbatch_tokens \(16\) must hold one sequence"
    ),
    "long sequences": Mistake(
        "pretrain --config run.yaml --batch.max_seq_length=128",
        r"length is 128, but the model has 32 positions; lower it, or raise them in model.config",
    ),
    "long sequences for a loaded model": Mistake(
        "pretrain --config run.yaml --run.dir=new --model.config=null --model.init_from=run --batch.max_seq_length=128 "
        "--batch.microbatch_tokens=128",
        r"length is 128, but the model has 32 positions; lower it, or set model.max_positions: 128 to extend the model",
    ),
    "long sequences of a task": Mistake(
        "finetune --config task.yaml --model.max_seq_length=128",
        r"length is 128, the model .* has 32 positions; lower it, or extend .* with model.max_positions",
    ),
    "missing preset": Mistake(
        "pretrain --config run.yaml --engine.ds_config=bf16_zero9",
        r"'engine.ds_config': there is no file and no preset 'bf16_zero9'; did you mean 'bf16_zero\d'\?",
    ),
    "precision of the device": Mistake(
        "pretrain --config run.yaml --engine.ds_config=fp16_zero1",
        r"cannot train in fp16; use --engine.*bf16_zero1",
    ),
    "precision of a task": Mistake("finetune --config task.yaml --training.precision=fp16", r"precision.*fp16"),
    "metric of no corpus": Mistake(
        "pretrain --config run.yaml --evaluation.best_metric=eval/held/loss",
        r"command line: 'evaluation.best_metric': no metric is called 'eval/held/loss'; corpus.eval is empty",
    ),
    "patience with no metric": Mistake(
        "pretrain --config run.yaml --evaluation.patience=2", r"'evaluation': 'patience' needs 'best_metric'"
    ),
    "unknown kind of task": Mistake(
        "finetune --config task.yaml --task.kind=classifier", r"command line: 'task.kind': .*mean 'classification'"
    ),
    "unknown metric of a task": Mistake("finetune --config task.yaml --task.metric=f1", r"'task.metric': .*f1"),
}
MACHINES = {
    "ranks beyond counting": Mistake(
        "plan --config run.yaml --num_gpus 1000000000000000000000000",
        r"--num_gpus: expected a whole number > 0 and <= 1000000",
    ),
    "memory beyond counting": Mistake(
        "plan --config run.yaml --memory_gib 1e300", r"--memory_gib: expected a number > 0 and <= 1000000"
    ),
    "too many ranks": Mistake("pretrain --config run.yaml --num_gpus 1000", r"1000 ranks .* but .*--oversubscribe"),
    "missing hostfile": Mistake("preflight --hostfile no", r"cannot read the hostfile no: No such file"),
    "bad line in a hostfile": Mistake(
        "pretrain --config run.yaml --hostfile hosts",
        r"hosts, line 2: expected 'NAME slots=N', found 'b slots: 4'",
        {"hosts": "a slots=2\nb slots: 4\n"},
    ),
}
FOLDERS = {
    "missing corpus": Mistake("pretrain --config run.yaml --corpus.train=no", r"corpus.train: .*/no .* does not exist"),
    "missing held-out corpus": Mistake("pretrain --config run.yaml --corpus.eval.held=no", r"corpus.eval.held: .*no"),
    "text as corpus": Mistake("pretrain --config run.yaml --corpus.train=text.txt", r"text.txt is not .* it is a file"),
    "corpus as source": Mistake(
        "corpus --source corpus --tokenizer tokenizer --output out",
        r"--source corpus: this is a corpus that is already built; expected its source",
    ),
    "tokenizer as corpus": Mistake("evaluate --checkpoint run --corpus tokenizer", r"tokenizer .*not a corpus"),
    "training on another tokenizer": Mistake(
        "pretrain --config run.yaml --run.dir=new --model.config=null --model.init_from=run --corpus.train=other",
        r"other was built with another tokenizer .* Rebuild the corpus with `--tokenizer",
    ),
    "evaluation on another tokenizer": Mistake(
        "pretrain --config run.yaml --run.dir=new --corpus.eval.held=other",
        r"other was built with another tokenizer",
    ),
    "resume with another corpus": Mistake(
        "pretrain --config run.yaml --corpus.train=corpus-heldout",
        r"another corpus.train: .* with the fingerprint '\w+' \(/.*/corpus\), the config says",
    ),
    "resume with another tokenizer": Mistake(
        "pretrain --config run.yaml --corpus.train=other", r"cannot be resumed with another"
    ),
    "resume with another model": Mistake(
        "pretrain --config run.yaml --model.config.hidden_size=16", r"cannot be resumed with another model.hidden_size"
    ),
    "used run folder": Mistake("pretrain --config run.yaml --run.resume=never", r"already holds a run; choose another"),
    "corpus as run folder": Mistake("pretrain --config run.yaml --run.dir=corpus", r"/corpus holds a corpus"),
    "run folder of a task": Mistake("pretrain --config run.yaml --run.dir=task", r"holds a fine-tuning run .*choose"),
    "run folder of a pretraining": Mistake("finetune --config task.yaml --run.dir=run", r"holds a pretraining run"),
    "no run to fork": Mistake(
        "pretrain --config run.yaml --run.dir=new --run.resume=no", r"'run.resume': expected auto, never, or a run"
    ),
    "model of the Hub": Mistake(
        "pretrain --config run.yaml --run.dir=new --model.config=null --model.init_from=bert-base-uncased",
        r"model.init_from: bert-base-uncased: no such folder, .*; HF_HUB_OFFLINE is set: .* `hf download bert-base-un",
    ),
    "encoder of the Hub": Mistake(
        "finetune --config task.yaml --model.init_from=google-bert/bert-base-uncased",
        r"model.init_from: .* `hf download google-bert/bert-base-uncased`",
    ),
    "tokenizer of the Hub": Mistake(
        "corpus --source text.txt --tokenizer bert-base-uncased --output new", r"`hf download bert-base-uncased"
    ),
    "fine-tuned run as model": Mistake(
        "pretrain --config run.yaml --run.dir=new --model.config=null --model.init_from=task",
        r"model.init_from: task is a run of `deepcloze finetune`: expected the model .* such as task/seed-1/model",
    ),
    "corpus as model": Mistake(
        "finetune --config task.yaml --model.init_from=corpus", r"corpus is neither a Hugging Face"
    ),
    "checkpoints as model": Mistake(
        "evaluate --checkpoint run/checkpoints --corpus corpus", r"run/checkpoints is neither a Hugging Face"
    ),
    "fine-tuned run to evaluate": Mistake(
        "evaluate --checkpoint task --corpus corpus", r"task is a run of .*: expected a model with a masked-LM head"
    ),
    "fine-tuned seed to evaluate": Mistake(
        "evaluate --checkpoint task/seed-1 --corpus corpus",
        r"task/seed-1 is a seed of a run of .*: expected a model with",
    ),
    "corpus to evaluate": Mistake("evaluate --checkpoint corpus --corpus corpus", r"corpus is neither a Hugging Face"),
    "pretraining to predict": Mistake(
        "predict --model run --input test.csv --output a.csv",
        r"run/checkpoints/step-\d+/hf is a masked language model .*, which predicts no labels: `deepcloze finetune`",
    ),
    "nothing to export": Mistake("export --checkpoint no --output new", r"no: no such folder, and no such model"),
    "export to a file": Mistake("export --checkpoint run --output text.txt", r"text.txt already exists"),
    "read-only export": Mistake("export --checkpoint run --output /proc/new", r"write /proc/new: No such file [^:]*$"),
    "read-only corpus": Mistake(
        "corpus --source text.txt --tokenizer tokenizer --output /proc/new", r"write /proc/new: No such file [^:]*$"
    ),
    "read-only report": Mistake("report run --output /proc/new", r"/proc/new: No such file"),
    "read-only recipe": Mistake("recipes cp roberta-base /proc/new.yaml", r"/proc/new.yaml: No such file"),
    "read-only config": Mistake("config pretrain --new /proc/new.yaml", r"/proc/new.yaml: No such file"),
    "read-only file": Mistake("python_docs --output /proc/new", r"--output: /proc/new: No such file"),
    "file as folder of schemas": Mistake(
        "config pretrain --new new.yaml", r"\.deepcloze: File exists", {".deepcloze": ""}
    ),
    "read-only run": Mistake("pretrain --config run.yaml --run.dir=/proc/new", r"run.dir: cannot create .* /proc/new"),
    "file as run folder": Mistake("pretrain --config run.yaml --run.dir=text.txt", r"run.dir: .*text.txt"),
    "file as folder of a comparison": Mistake(
        "compare compare.yaml --run.dir=text.txt --dry_run", r"run.dir: .*text.txt is a file; expected a folder"
    ),
    "file as folder, validated": Mistake("validate task.yaml --run.dir=text.txt", r"run.dir: .*text.txt is a file"),
    "run as cleaned documents": Mistake(
        "validate clean.yaml",
        r"output \S+/run already holds something that is not cleaned documents",
        {"clean.yaml": "source: text.txt\noutput: run\n"},
    ),
    "file below a file": Mistake("finetune --config task.yaml --run.dir=text.txt/run", r"run.dir: .*text.txt/run"),
    "no run to report": Mistake("report corpus", r"corpus has nothing to report"),
    "report to a file": Mistake("report run --output text.txt", r"--output: text.txt is a file"),
    "no run to follow": Mistake("logs corpus", r"corpus is not a run folder"),
    "folder of runs": Mistake("logs .", r" is a folder of runs: give one of run, task"),
    "log of no rank": Mistake("logs run --rank 7", r"no log of rank 7; ranks with a log: 0"),
    "no run to watch": Mistake("watch task --task task.yaml", r"task is a run of `deepcloze finetune`; expected"),
    "no corpus to verify": Mistake("corpus --verify no", r"no .*corpus"),
    "home": Mistake("evaluate --checkpoint ~/run --corpus ~/no", r"/home-of-user/run does not exist"),
    "home of a fork": Mistake("pretrain --config run.yaml --run.dir=new --run.resume=~/no", r"'/home-of-user/no'"),
    "home of a preset": Mistake("pretrain --config run.yaml --engine.ds_config=~/no.json", r"'/home-of-user/no.json'"),
    "row of no model": Mistake(
        "compare compare.yaml --rows.ours.init_from=no", r"rows.ours.init_from: no: no such folder, and no such model"
    ),
    "pretraining as comparison": Mistake(
        "compare compare.yaml --run.dir=run", r"run.dir: .*run holds a pretraining run \(checkpoints\); choose another"
    ),
    "pretraining as sweep": Mistake(
        "sweep --config run.yaml --grid optimizer.lr=1,2 --output run", r"--output: .*run holds a pretraining run"
    ),
    "task of a comparison": Mistake("compare compare.yaml --tasks=no.yaml", r"cannot read the config file no.yaml"),
    "seeds of a comparison": Mistake(
        "compare compare.yaml --seeds=one", r"'seeds.0': expected a whole number, found text"
    ),
}
TEXT = {
    "empty text for a tokenizer": Mistake(
        "tokenizer --source a.txt --output new --vocab_size 100",
        r"--source a.txt: none of its documents has text",
        {"a.txt": " \n\n"},
    ),
    "Word": Mistake(
        "corpus --source a.docx --tokenizer tokenizer --output new",
        r"--source a.docx: .docx files are not read; convert it to text, for instance with pandoc",
        {"a.docx": b"PK\x03\x04"},
    ),
    "PDF": Mistake(
        "tokenizer --source 'a*' --output new --vocab_size 100",
        r"--source a.PDF: .pdf files are not read; convert it to text, for instance with pdftotext",
        {"a.PDF": b"%PDF-1.7\n"},
    ),
    "bzip2": Mistake(
        "corpus --source a.txt.bz2 --tokenizer tokenizer --output new",
        r"--source a.txt.bz2: .bz2 files are not read; decompress it",
        {"a.txt.bz2": b"BZh9"},
    ),
    "dump of Wikipedia": Mistake(
        "corpus --source enwiki-pages.xml.bz2 --tokenizer tokenizer --output new",
        r"--source enwiki-pages.xml.bz2: .xml files are not read; read it with `deepcloze clean`",
        {"enwiki-pages.xml.bz2": b"BZh9"},
    ),
    "column of a corpus": Mistake(
        "corpus --source train.csv --column review --tokenizer tokenizer --output new", r"'review'.*--column"
    ),
    "everything held out": Mistake(
        "corpus --source text.txt --tokenizer tokenizer --output new --holdout 100000",
        r"--holdout 100000|100,000",
        keeps="new.partial",  # counts of documents, which may have taken hours
    ),
    "no tokenizer": Mistake("corpus --source text.txt --tokenizer corpus --output new", r"tokenizer: .*corpus"),
    "tiny vocabulary": Mistake("tokenizer --source text.txt --output new --vocab_size 3", r"vocab_size 3 is too small"),
    "vocabulary beyond counting": Mistake(
        "tokenizer --source text.txt --output new --vocab_size 100000000000000000000",
        r"--vocab_size: expected a whole number > 0 and <= 1000000000",
    ),
    "existing tokenizer": Mistake(
        "tokenizer --source text.txt --output tokenizer --vocab_size 100", r"tokenizer already holds something"
    ),
    "tokenizer in a new folder": Mistake(
        "tokenizer --source no.txt --output a/b --vocab_size 99", r"no.txt: no such file"
    ),
    "corpus in a new folder": Mistake(
        "corpus --source a.txt --tokenizer tokenizer --output a/b", r"a.txt:1: not UTF-8 text", {"a.txt": b"\xff"}
    ),
    "no words to add": Mistake(
        "tokenizer --extend tokenizer --added no.txt --output new", r"--added: cannot read no.txt: No such file"
    ),
    "pattern without quotes": Mistake(
        "tokenizer --source train.csv test.csv --output new --vocab_size 100",
        r"'test.csv'; .*, with quotes around a value that has spaces or \*",
    ),
    "unset variable": Mistake(
        "corpus --source text.txt --tokenizer tokenizer --output=", r"--output: expected a path, found an empty text"
    ),
    "folder as file": Mistake("python_docs --output corpus", r"--output corpus is a folder; expected a file"),
}
DATA = {
    "no data": Mistake("finetune --config task.yaml --task.train=no.csv", r"no.csv: No such file"),
    "folder as data": Mistake("finetune --config task.yaml --task.train=tokenizer", r"tokenizer"),
    "column of a task": Mistake(
        "finetune --config task.yaml --task.columns.text=sentence", r"train.csv.*'sentence'.*text, label"
    ),
    "data without a header": Mistake(
        "finetune --config task.yaml --task.train=a.csv",
        r"a.csv:1: no column '\w+'; found: ba, de, 1 .*; if the first row is data, set task.header: none and name",
        {"a.csv": '"ba, de",1\ngo,0\n'},
    ),
    "input without a header": Mistake(
        "predict --model task --input a.csv --output b.csv",
        r"a.csv:1: no column 'text'; found: .*; if the first row is data, set --header none and name columns",
        {"a.csv": '"ba, de"\ngo\n'},
    ),
    "one label": Mistake(
        "finetune --config task.yaml --task.train=a.csv",
        r"every row has the label 'low'",
        {"a.csv": "text,label\nba,low\n"},
    ),
    "unknown label": Mistake(
        "finetune --config task.yaml --task.test=a.csv", r"a.csv.*'lwo'", {"a.csv": "text,label\nba,lwo\n"}
    ),
    "no input": Mistake("predict --model task --input no.csv --output a.csv", r"no.csv: No such file"),
    "output in a new folder": Mistake("predict --model no --input test.csv --output a/b.csv", r"no: no such folder"),
    "read-only output": Mistake(
        "predict --model task --input test.csv --output /proc/a.csv", r"write /proc/a.csv: No such file"
    ),
}
MISTAKES = {**COMMAND_LINE, **CONFIGS, **MACHINES, **FOLDERS, **TEXT, **DATA}
WITH_RANKS = ("long sequences", "missing corpus", "training on another tokenizer")  # start ranks while they are checked


@pytest.fixture(scope="module")
def prepared(text_file: Path, tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> tuple[Path, str]:
    """A folder with what the commands are about, and what the commands that have made it have printed into a pipe."""
    folder = tmp_path_factory.mktemp("prepared") / "folder"
    folder.mkdir()
    shutil.copy(text_file, folder / "text.txt")
    for name, config in (("run", PRETRAINING), ("task", TASK), ("compare", COMPARISON)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    for name in ("train.csv", "test.csv"):
        (folder / name).write_text(ROWS)
    variables = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        **patched(folder.parent, PRINT_EVERY_LINE + EMPTY_FIGURES),
    }
    environment = os.environ | variables | fork_server.environment()
    printed = ""
    for command in COMMANDS:
        argv = [sys.executable, "-m", "launcher", *shlex.split(command)]
        done = subprocess.run(
            argv, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        printed += f"$ {command}\n{done.stdout.decode()}"
        assert done.returncode == 0, printed
    return folder, printed


def contents(folder: Path) -> dict[str, tuple[int, ...]]:
    """Path -> what tells whether a file was written: its inode, size and time in nanoseconds; nothing for a folder."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        written = (status.st_ino, status.st_size, status.st_mtime_ns)
        found[str(path.relative_to(folder))] = () if path.is_dir() else written
    return found


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(
    prepared: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """Catches a traceback, several lines, a message that does not name what is wrong, another exit code, and a mistake
    that costs or leaves files."""
    from deepspeed.accelerator import get_accelerator

    mistake, folder = MISTAKES[name], tmp_path / "folder"
    shutil.copytree(prepared[0], folder, symlinks=True, copy_function=os.link)  # none of the files may change
    for path, content in mistake.files.items():
        (folder / path).write_bytes(content.encode() if isinstance(content, str) else content or b"")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("HOME", "/home-of-user")
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    if name not in WITH_RANKS:
        monkeypatch.setattr("launcher.launch.held_ranks", lambda *_: nullcontext())
    before = contents(folder)
    capfd.readouterr()
    code = main(shlex.split(mistake.command))
    printed = capfd.readouterr().err
    after = contents(folder)
    if mistake.keeps is not None:
        assert after.pop(mistake.keeps) == ()
        after = {path: written for path, written in after.items() if not path.startswith(f"{mistake.keeps}/")}
    assert after == before
    *before_it, line = printed.splitlines()
    for other in before_it:  # about the data, or what takes seconds
        assert re.match(r"task: |deepcloze: checking \S+ for \d+ ranks? on this machine$", other), printed
    assert line.startswith("deepcloze: ")
    assert re.search(mistake.message, line)
    assert code == 2
    assert len(line.replace(str(folder), "/folder")) < 420  # wherever the tests have their files


def test_no_carriage_return_in_a_pipe(prepared: tuple[Path, str]) -> None:
    """Catches progress bars in the log file of a job, and long work without a line in it."""
    _, printed = prepared
    assert "\r" not in printed
    assert "\x1b" not in printed
    for line in (
        "tokenizing: 100%, 640 documents",
        "verifying corpus: 0 of 0 MB",
        "corpus-heldout: 1 of ",
        "predicting: 16 of 16 rows",
    ):
        assert f"\n{line}" in printed, printed


def test_a_warmup_that_does_not_end_is_a_warning(
    prepared: tuple[Path, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that never reaches its learning rate silently, and a warning of each rank."""
    folder, printed = prepared
    warning = "warning: schedule.warmup_steps is 5, but the run has only 2 steps\n"
    pretraining = printed.partition("$ pretrain")[2].partition("$ ")[0]
    assert pretraining.count(warning) == 1
    monkeypatch.chdir(folder)
    assert main(["validate", "run.yaml", "--optimizer.lr=5"]) == 0
    unusual = "warning: optimizer.lr is 5: usual learning rates are 1e-4 to 1e-2\n"
    assert capsys.readouterr().err == f"deepcloze: {unusual}deepcloze: {warning}"


@pytest.mark.parametrize(
    "command",
    [
        "tokenizer --source text.txt --output DISK/new --vocab_size 200",
        "corpus --source text.txt --tokenizer tokenizer --output DISK/new --workers 1",
        "predict --model task --input test.csv --output DISK/new.csv",
        "export --checkpoint run --output DISK/new",
        "export --checkpoint task --output DISK/new",
        "report run --output DISK/new",
        "recipes cp roberta-base DISK/new.yaml",
    ],
)
def test_a_full_disk_is_one_line(
    prepared: tuple[Path, str],
    small_disk: SmallDisk,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: str,
) -> None:
    """Catches a traceback, a message without the file, and half-written output."""
    monkeypatch.chdir(prepared[0])
    small_disk.fill()
    before = contents(small_disk.path)
    capfd.readouterr()
    code = main(shlex.split(command.replace("DISK", str(small_disk.path))))
    (line,) = (line for line in capfd.readouterr().err.splitlines() if not line.startswith("model: "))
    assert code == 2
    assert re.fullmatch(rf"deepcloze: .*{small_disk.path}/.*new.*: disk full.*", line)
    assert contents(small_disk.path) == before


def test_no_arguments_show_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a bare `deepcloze` that says nothing, or that something is missing."""
    assert main([]) == 0
    assert "commands:" in capsys.readouterr().out
