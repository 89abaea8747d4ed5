"""The `deepcloze` commands: dispatch only. Each imports what it runs when it runs, so that help answers at once."""

import shutil
import sys
from collections.abc import Sequence

import fire

from experiment.errors import StoppedError, UserError
from launcher.arguments import Command, Overrides, arrange, command, help_text, wants_help

ABOUT = (
    "deepcloze takes raw text to a pretrained encoder (a masked language model, trained with DeepSpeed) to measured "
    "downstream tasks. The commands stand in the order in which they are used."
)


@command
def python_docs(*, output: str) -> None:
    """Write the documentation of Python and the installed packages as JSON lines.

    Each line has the fields `text`, `package` and `document`. It is real text for a first run, and needs no network.

    Args:
        output (FILE): the .jsonl file to write

    Example:
        deepcloze python_docs --output docs.jsonl
    """
    from pretrain.corpus.python_docs.collect import write_python_docs

    write_python_docs(output)


@command
def tokenizer(
    *,
    output: str,
    source: str | None = None,
    vocab_size: int | None = None,
    kind: str = "wordpiece",
    lowercase: bool = False,
    extend: str | None = None,
    added: str | None = None,
    document: str = "line",
    document_start: str | None = None,
    column: str = "text",
    sep: str | None = None,
    quoting: str | None = None,
    header: str | None = None,
) -> None:
    """Train a tokenizer on raw text, or add words to one.

    The result is a Hugging Face tokenizer folder, which `deepcloze corpus` and transformers open. Training one takes
    --source and --vocab_size. With --extend and --added, the tokenizer of a model gets new words of one token each,
    behind the old ones, whose ids stay; model.added_tokens of a pretraining then names the result.

    Args:
        output (DIR): the tokenizer folder to write
        source (PATH[,PATH…]): files, folders and globs of text, as for `deepcloze corpus`
        vocab_size (N): entries of the vocabulary, special tokens included
        kind (KIND): wordpiece (as BERT) or bpe (byte-level, as RoBERTa)
        lowercase: treat upper and lower case alike
        extend (DIR): the folder of a tokenizer to add words to, instead
        added (FILE): the words, one a line; for WordPiece also continuations such as ##itis
        document (UNIT): what a document is in plain text: line, blank_line or file
        document_start (REGEX): a document begins at each line that matches, instead
        column (NAME): the text column of .jsonl, .csv, .tsv and .parquet files
        sep (CHARACTER): between the columns of CSV files, as in pandas; by default a comma, in .tsv a tab
        quoting (N): of CSV files, as in pandas: 0 where quotes enclose a field (the default), 3 where they are text
        header (ROW): of CSV files: infer where the first row names the columns (the default), none where no row does

    Example:
        deepcloze tokenizer --source docs.jsonl --output tokenizer --vocab_size 8000 --lowercase
    """
    if extend is not None and added is not None and source is None and vocab_size is None:
        from pretrain.corpus.added_tokens import extend_tokenizer

        extend_tokenizer(extend, added, output)
        return
    if source is None or vocab_size is None or extend is not None or added is not None:
        raise UserError(
            "tokenizer: expected --source and --vocab_size to train one, or --extend and --added to add words to one"
        )
    from pretrain.corpus.tokenizer import train_tokenizer

    train_tokenizer(
        source=source,
        output=output,
        vocab_size=vocab_size,
        kind=kind,
        lowercase=lowercase,
        document=document,
        document_start=document_start,
        column=column,
        sep=sep,
        quoting=quoting,
        header=header,
    )


@command
def corpus(
    *,
    source: str,
    tokenizer: str,
    output: str,
    document: str = "line",
    document_start: str | None = None,
    column: str = "text",
    workers: int | None = None,
    seed: int = 42,
    limit: int | None = None,
    holdout: int | None = None,
    sep: str | None = None,
    quoting: str | None = None,
    header: str | None = None,
    segmenter: str | None = None,
) -> None:
    """Build a tokenized corpus from raw text.

    The corpus is sharded Arrow, which `datasets.load_from_disk` opens too. The same input gives the same bytes, with
    any number of workers; a build that was killed goes on where it was when it is started again.

    Args:
        source (PATH[,PATH…]): files, folders and globs of .txt, .jsonl, .csv, .tsv or .parquet, also as .gz or .zst;
            members of an archive as a.zip::*.txt; hub:NAME[:SPLIT]; or python-docs
        tokenizer (DIR): a Hugging Face tokenizer folder, or one with just a vocab.txt
        output (DIR): the corpus folder to write
        document (UNIT): what a document is in plain text: line, blank_line or file
        document_start (REGEX): a document begins at each line that matches, instead
        column (NAME): the text column of .jsonl, .csv, .tsv and .parquet files
        workers (N): processes that tokenize; by default one per core
        seed (N): of the draws of --holdout and --limit
        limit (N): keep only so many documents, drawn at random
        holdout (N): put so many documents, drawn at random, into the corpus DIR-heldout instead
        sep (CHARACTER): between the columns of CSV files, as in pandas; by default a comma, in .tsv a tab
        quoting (N): of CSV files, as in pandas: 0 where quotes enclose a field (the default), 3 where they are text
        header (ROW): of CSV files: infer where the first row names the columns (the default), none where no row does
        segmenter (NAME): jieba finds the words of Chinese text, for whole-word and span masking; pip install jieba

    Example:
        deepcloze corpus --source 'wiki/*.txt.gz' --tokenizer tokenizer --output corpora/wiki --holdout 1000
    """
    from pretrain.corpus.build import build_corpus

    build_corpus(
        source=source,
        tokenizer=tokenizer,
        output=output,
        document=document,
        document_start=document_start,
        column=column,
        workers=workers,
        seed=seed,
        limit=limit,
        holdout=holdout,
        sep=sep,
        quoting=quoting,
        header=header,
        segmenter=segmenter,
    )


@command
def pretrain(
    *,
    config: str,
    hostfile: str | None = None,
    num_gpus: int | None = None,
    include: str | None = None,
    exclude: str | None = None,
    oversubscribe: bool = False,
    dry_run: bool = False,
    overrides: Overrides,
) -> None:
    """Pretrain an encoder, one process per GPU.

    Checks everything before a device is taken, starts the ranks with DeepSpeed and waits for them. Started again, the
    run goes on from its last checkpoint. Ctrl-C, SIGTERM or a file RUN/STOP make it save and end with exit code 75.

    Args:
        config (FILE): the run as YAML; pretrain/recipes has whole ones
        hostfile (FILE): the machines to run on, lines of `NAME slots=N`; by default this one
        num_gpus (N): ranks on each machine; by default all GPUs, or 1 on a CPU, where a rank is a process
        include (FILTER): GPUs to use, as HOST[:SLOT,…][@HOST…], such as localhost:0,2; on a CPU they only count
        exclude (FILTER): GPUs not to use
        oversubscribe: allow more ranks than CPU cores
        dry_run: print the resolved config, the added environment and the command, and start nothing
        overrides: any key of the config file, such as --optimizer.lr=1e-4

    Example:
        deepcloze pretrain --config my-run.yaml --num_gpus 2 --schedule.steps=1000
    """
    from launcher.launch import launch_pretraining

    launch_pretraining(
        config,
        overrides,
        hostfile=hostfile,
        num_gpus=num_gpus,
        include=include,
        exclude=exclude,
        oversubscribe=oversubscribe,
        dry_run=dry_run,
    )


@command
def evaluate(*, checkpoint: str, corpus: str, json: bool = False) -> None:
    """Measure held-out loss, perplexity and masked-token accuracy.

    The masks are fixed by a seed, so that the figures of two checkpoints compare.

    Args:
        checkpoint (DIR): a checkpoint of a run, or any Hugging Face folder with a masked-LM head
        corpus (DIR[,DIR…]): folders made by `deepcloze corpus` with the model's tokenizer
        json: print one object on stdout, {corpus: {loss, perplexity, accuracy, masked_tokens}}

    Example:
        deepcloze evaluate --checkpoint runs/first/checkpoints/step-00001000 --corpus corpora/wiki-heldout
    """
    from pretrain.evaluate import evaluate_command

    evaluate_command(checkpoint, corpus, json=json)


@command
def export(*, checkpoint: str, output: str) -> None:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        checkpoint (DIR): a checkpoint of a run
        output (DIR): the folder to write: safetensors of the fp32 weights, config and tokenizer

    Example:
        deepcloze export --checkpoint runs/first/checkpoints/step-00001000 --output my-encoder
    """
    from pretrain.export import export as export_checkpoint

    export_checkpoint(checkpoint, output)


@command
def finetune(*, config: str, overrides: Overrides) -> None:
    """Fine-tune an encoder on one task, over one or more seeds.

    Writes results.json, predictions, a confusion matrix and curves to the run folder.

    Args:
        config (FILE): the task as YAML; finetune/recipes has whole ones
        overrides: any key of the config file, such as --training.lr=3e-5

    Example:
        deepcloze finetune --config my-task.yaml --model.init_from=my-encoder --training.seeds=1,2,3
    """
    from finetune.run import finetune as run_finetuning

    run_finetuning(config, overrides)


@command
def sweep(
    *,
    config: str,
    grid: str,
    output: str | None = None,
    metric: str | None = None,
    hostfile: str | None = None,
    num_gpus: int | None = None,
    include: str | None = None,
    exclude: str | None = None,
    oversubscribe: bool = False,
    dry_run: bool = False,
    overrides: Overrides,
) -> None:
    """Run a pretraining or fine-tuning config at every point of a grid.

    Every point is checked before the first one starts; then they run one after the other, each in a folder of its own.
    Started again, finished runs are passed over and interrupted ones go on; one that fails does not end the others. At
    the end there is one table, best first, and one plot, also as sweep.csv, sweep.json and sweep.png.

    Args:
        config (FILE): the run as YAML, of either kind
        grid (GRID): values of any config keys, as 'KEY=VALUE,VALUE KEY=VALUE,VALUE', lists in brackets
        output (DIR): where the runs and the results go; by default the config's run.dir with -sweep behind it
        metric (NAME): what is compared; by default the last eval/NAME/loss of the first corpus, or the task's metric
        hostfile (FILE): as for `deepcloze pretrain`
        num_gpus (N): as for `deepcloze pretrain`
        include (FILTER): as for `deepcloze pretrain`
        exclude (FILTER): as for `deepcloze pretrain`
        oversubscribe: as for `deepcloze pretrain`
        dry_run: check every point, print its command, and start nothing
        overrides: any key of the config file, the same for all runs, such as --schedule.steps=500

    Example:
        deepcloze sweep --config my-run.yaml --grid "optimizer.lr=1e-4,5e-4 schedule.epochs=1,2"
    """
    from launcher.sweep import launch_sweep

    launch_sweep(
        config,
        overrides,
        grid,
        output=output,
        metric=metric,
        dry_run=dry_run,
        hostfile=hostfile,
        num_gpus=num_gpus,
        include=include,
        exclude=exclude,
        oversubscribe=oversubscribe,
    )


@command
def report(run: str) -> None:
    """Draw the curves and tables of a run.

    Args:
        run (RUN): the run folder; the report goes to RUN/report

    Example:
        deepcloze report runs/first
    """
    from experiment.results.report import write_report

    print(write_report(run))


COMMANDS: dict[str, Command] = {
    function.__name__: function
    for function in (python_docs, tokenizer, corpus, pretrain, evaluate, export, finetune, sweep, report)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name) and return the exit code: 0, 2, 75 or 130."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if wants_help(argv):
            print(help_text(argv, COMMANDS, ABOUT, width=min(100, shutil.get_terminal_size().columns)))
        else:
            fire.Fire(COMMANDS, command=arrange(argv, COMMANDS), name="deepcloze")
    except UserError as error:
        return _fail(str(error), 2)
    except StoppedError as stopped:
        return _fail(str(stopped) or "stopped; start it again to go on", 75)
    except KeyboardInterrupt:
        return _fail("interrupted", 75 if argv[0] == "pretrain" else 130)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"deepcloze: {message}", file=sys.stderr)
    return code
