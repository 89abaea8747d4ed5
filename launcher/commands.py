"""The `deepcloze` commands. Each imports its code when it is called, so that `--help` stays fast."""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiment.config import load_config
from experiment.config.recipes import find_config
from experiment.errors import UserError, inform, user_errors_in
from experiment.files import PACKAGES
from experiment.process.fast_imports import command_imports, fast_imports
from finetune.options import ExportOptions, PredictOptions, ServeOptions
from launcher.command_line import Command, terminal_width
from launcher.options import (
    CleanOptions,
    CompareOptions,
    CompletionOptions,
    ConfigOptions,
    EvaluateOptions,
    FinetuneOptions,
    LogsOptions,
    PlanOptions,
    PreflightOptions,
    PretrainOptions,
    RecipesOptions,
    ReportOptions,
    StatusOptions,
    SweepOptions,
    ValidateOptions,
    WatchOptions,
)
from pretrain.corpus.options import CorpusOptions, PythonDocsOptions, TokenizerOptions

if TYPE_CHECKING:
    from experiment.decontamination import EvaluationText


def python_docs(options: PythonDocsOptions) -> None:
    """Write the documentation of Python and the installed packages as JSON Lines.

    Each line has the fields `text`, `package` and `document`: real text for a first run, without a network.

    Example:
        deepcloze python_docs --output docs.jsonl
    """
    from pretrain.corpus.python_docs import write_python_docs

    write_python_docs(options.output, options.packages, options.files_per_package)


def clean(options: CleanOptions) -> None:
    """Clean raw documents: repair, filter, deduplicate, decontaminate.

    Reads the sources of a config, applies its steps in order, and writes the documents that are left as .jsonl.zst, for
    `deepcloze corpus`, with counts and examples by rule in clean.json and report.html. The same input gives the same
    bytes with any number of workers and machines. Run the same command again to resume. Needs
    `pip install 'deepcloze[clean]'`. See docs/cleaning.md.

    Example:
        deepcloze clean --config clean.yaml
    """
    from pretrain.cleaning.config import CleanConfig

    config = load_config(CleanConfig, options.config, options.overrides)  # before the imports, which take seconds
    from pretrain.cleaning.run import clean as run_cleaning

    run_cleaning(config, _evaluation_texts, options.workers, options.engine, options.ray_address)


def tokenizer(options: TokenizerOptions) -> None:
    """Train a tokenizer on raw text, or add tokens to one.

    The output is a Hugging Face tokenizer folder, for `deepcloze corpus` and transformers. To train, give --source and
    --vocab_size. To add tokens to a model's tokenizer, give --extend and --added: each new word becomes one token at
    the end of the vocabulary, and existing ids do not change. Name the result in model.added_tokens to pretrain with
    it.

    Example:
        deepcloze tokenizer --source 'books/*.txt' --output tokenizer --vocab_size 30000 --lowercase
    """
    if options.extend is not None and options.added is not None:
        from pretrain.corpus.added_tokens import extend_tokenizer

        extend_tokenizer(options.extend, options.added, options.output)
    else:
        from pretrain.corpus.train_tokenizer import train_tokenizer

        train_tokenizer(options)


def corpus(options: CorpusOptions) -> None:
    """Build a tokenized corpus from raw text, verify corpora, or look at one.

    To build, give --source, --tokenizer and --output. The corpus is sharded Arrow; `datasets.load_from_disk` opens it
    too. The same input gives the same bytes with any number of workers and machines. Run the same command again to
    resume an interrupted build. With --engine ray or slurm, several machines work on it. To verify, give --verify: all
    shards are read and compared with their checksums, and the tokenizer with its fingerprint. Training and evaluation
    read the shards once on each machine. To look at a corpus before training, give --inspect.

    Example:
        deepcloze corpus --source 'books/*.txt' --tokenizer tokenizer --output corpora/books --holdout 1000
    """
    if options.verify is not None:
        from pretrain.corpus.verification import verify_command

        verify_command(options.verify)
    elif options.inspect is not None:
        from pretrain.inspection.command import inspect_corpus

        inspect_corpus(options.inspect, options.output, options.seed)
    elif options.engine == "slurm":
        from pretrain.corpus.job_array import build_share

        build_share(options)
    else:
        from pretrain.corpus.build import build_corpus

        build_corpus(options)


def plan(options: PlanOptions) -> None:
    """Plan a pretraining run: memory, communication, steps, time and cost.

    Prints parameters, FLOPs per token, the memory of a device by part at each ZeRO stage, communication per step, exact
    steps and tokens, and time, energy and cost at a stated utilization and bandwidth; whether it fits; and warnings
    about poor settings. Takes no device, and seconds even for thousands of GPUs. See docs/planning.md.

    Example:
        deepcloze plan --config my-run.yaml --hostfile hosts --device H100 --memory_gib 80
    """
    from launcher.plan_command import print_run_plan

    print_run_plan(options)


def preflight(options: PreflightOptions) -> None:
    """Check whether hosts can carry out a pretraining run.

    Compares Python, packages, code and files of all hosts with this machine's, checks ssh, run folder, disk, devices,
    clocks and network, and times an all-reduce. Prints a row for each host, and a fix for each failure; exits with 2 if
    a host fails. `deepcloze pretrain` does so before it starts ranks on other hosts.

    Example:
        deepcloze preflight --hostfile hosts --config my-run.yaml
    """
    from launcher.launch import preflight_command

    preflight_command(options)


def pretrain(options: PretrainOptions) -> None:
    """Pretrain an encoder, one process per GPU.

    Checks the config and its files, and other hosts as `deepcloze preflight`, then starts the ranks with DeepSpeed and
    waits for them. Run the same command again to resume from the last checkpoint. Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2 or
    a file RUN/STOP make the run save a checkpoint and exit with code 75.

    Example:
        deepcloze pretrain --config my-run.yaml --num_gpus 2
    """
    if sys.stderr.isatty() and not options.dry_run:
        inform(f"reading {options.config}")  # imports take seconds
    if options.detach and not options.dry_run:
        from launcher.detach import launch_detached

        launch_detached(options)
    else:
        from experiment.run_files.goodput import process_start
        from launcher.launch import launch_pretraining

        launch_pretraining(options, process_start())


def evaluate(options: EvaluateOptions) -> None:
    """Measure held-out loss, perplexity and masked-token accuracy.

    The run's seed, masking and maximum sequence length fix the masks; a Hugging Face folder has the defaults. Scores of
    two models are comparable if these are the same: see --masks_of.

    Example:
        deepcloze evaluate --checkpoint runs/mine --corpus corpora/books-heldout
    """
    from launcher.hosts.machine import launch_machine

    launch_machine()  # otherwise DeepSpeed, if anything imports it, would print to stdout that it found no GPU
    with command_imports():
        from pretrain.evaluate import evaluate_command

    evaluate_command(options.checkpoint, options.corpus, options.json_output, options.masks_of)


def export(options: ExportOptions) -> None:
    """Write a model as a Hugging Face folder, or as ONNX.

    By default, copies the Hugging Face folder of a checkpoint, or of a fine-tuned model. With --format onnx, the
    outputs of ONNX Runtime and PyTorch are compared on texts of random tokens, and sizes and differences are
    printed; if differences in fp32 exceed 1e-4, nothing is written. `deepcloze predict` and `serve` run the folder.
    Needs `pip install 'deepcloze[onnx]'`. To measure the effect of --int8, run `deepcloze predict --score` with both
    folders. See docs/exporting.md.

    Example:
        deepcloze export --checkpoint runs/sst2 --output sst2-int8 --format onnx --int8
    """
    with fast_imports():
        from finetune.export.command import export_command

    export_command(options)


def finetune(options: FinetuneOptions) -> None:
    """Fine-tune an encoder on one task, with one or more seeds.

    Writes results.json, predictions, a confusion matrix and curves to the run folder.

    Example:
        deepcloze finetune --config my-task.yaml --model.init_from=runs/mine
    """
    from finetune.config import FinetuneConfig

    load_config(FinetuneConfig, options.config, options.overrides)  # before the imports, which take seconds
    with command_imports():
        from finetune.run import finetune as run_finetuning

    run_finetuning(options.config, options.overrides, options.dry_run)


def predict(options: PredictOptions) -> None:
    """Predict with a fine-tuned model for the rows of a file.

    Writes a row for each row of the input, in its order: number, texts, prediction, probabilities. The columns of the
    input are named as in training, labels are not needed; --columns.text=NAME and the like name others. The file is
    read twice, first to check it; files larger than the memory are fine, except .json and dialogues. See
    docs/prediction.md.

    Example:
        deepcloze predict --model runs/sst2 --input reviews.csv --output labels.csv --columns.text=review
    """
    with command_imports():
        from finetune.prediction.predict import predict_command

    predict_command(options)


def serve(options: ServeOptions) -> None:
    """Answer requests over HTTP with a fine-tuned model, or fill masks with a pretrained one.

    Texts of all requests are computed together in batches. POST /v1/predict, /v1/fill-mask and /v1/embed take JSON;
    open / in a browser to try the model, and /docs for all routes. Only this machine can reach it unless --host says
    otherwise. SIGTERM and Ctrl-C finish the requests that were accepted, SIGHUP reloads the model. Needs
    `pip install 'deepcloze[serve]'`. See docs/serving.md.

    Example:
        deepcloze serve --model runs/sst2 --port 8000
    """
    try:
        with command_imports():
            from finetune.serve.server import serve_command
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in PACKAGES:
            raise
        raise UserError(f"{error.name} is not installed; run: pip install 'deepcloze[serve]'") from None

    serve_command(options)


def sweep(options: SweepOptions) -> None:
    """Run a pretraining or fine-tuning config at every point of a grid.

    Checks every point before the first run starts, then runs them one after another, each in its own folder. A failed
    run does not stop the others. Run the same command again to resume: finished runs are skipped. The results, best
    first, are printed and written to sweep.csv, sweep.json and sweep.png.

    Example:
        deepcloze sweep --config my-run.yaml --grid "optimizer.lr=1e-4,5e-4 optimizer.weight_decay=0.01,0.1"
    """
    with command_imports():
        from launcher.run_sets.sweep import plan_sweep, run_sweep

    plan = plan_sweep(options)
    if options.dry_run:
        plan.runs.print_commands()
    else:
        run_sweep(plan)


def compare(options: CompareOptions) -> None:
    """Compare initializations: rows × tasks × seeds.

    Fine-tunes each row of FILE on each of its tasks with each seed, after pretraining on other text for rows that
    ask for one, and prints test scores with the significance of their differences. Run the same command again to
    resume: each cell runs once. Writes compare.json, .csv, .md, .png and a report. See docs/comparing.md.

    Example:
        deepcloze compare encoders.yaml
    """
    with command_imports():
        from launcher.run_sets.compare import run_comparison
        from launcher.run_sets.compare_plan import plan_comparison

    plan = plan_comparison(options)
    if options.dry_run:
        plan.runs.print_commands()
    else:
        run_comparison(plan)


def watch(options: WatchOptions) -> None:
    """Score every new checkpoint of a running pretraining on a task.

    Fine-tunes each complete checkpoint once, oldest first, and logs its scores on validation by step, as
    downstream/TASK/METRIC, to the metrics and trackers of the run. Ends when the run is done. Run the same command
    again to resume. See docs/watching.md.

    Example:
        deepcloze watch runs/mine --task my-task.yaml --probe
    """
    from launcher.run_sets.watch import watch_run

    watch_run(options)


def status(options: StatusOptions) -> None:
    """Show how runs are doing: pretraining, fine-tuning, sweeps and comparisons.

    Whether a run is alive, or how it ended; step, loss, speed, time left, last checkpoint, bad batches, goodput and
    attempts, or seeds and score: a list for one run, a table for several. Reads their folders only. Takes five seconds
    if a run is on another machine. See docs/tracking.md.

    Example:
        deepcloze status runs/*
    """
    from launcher.status import print_status

    print_status(options.runs, as_json=options.json_output)


def logs(options: LogsOptions) -> None:
    """Show the output of a run.

    See docs/tracking.md for which file that is.

    Example:
        deepcloze logs runs/mine --follow
    """
    from launcher.logs import print_logs

    print_logs(options)


def report(options: ReportOptions) -> None:
    """Write the HTML report of a run, a sweep, a comparison or several runs: curves and tables.

    With --follow, serve the page on this machine instead, and keep it current while runs train. See docs/tracking.md.

    Example:
        deepcloze report runs/mine runs/bert-base --output=runs/report
    """
    if options.follow:
        from experiment.results.report.page_server import follow_runs

        follow_runs(options.runs, options.port)
    else:
        from launcher.report import report_runs

        print(report_runs(options.runs, options.output))


def config(options: ConfigOptions) -> None:
    """Explain the keys of a config: meaning, type and default; or write a config, or a JSON Schema for editors.

    Editors that read the `yaml-language-server` line, which --new and `deepcloze recipes cp` write, complete and check
    the keys of a config. See docs/editors.md.

    Example:
        deepcloze config pretrain optimizer.lr
    """
    from experiment.config.json_schema import json_schema
    from experiment.config.reference import as_text, config_reference, find_keys
    from launcher.configs import CONFIGS
    from launcher.new_config import write_new_config

    config_type = CONFIGS[options.kind]
    if options.schema_:
        print(json.dumps(json_schema(config_type), indent=2))
        return
    if options.new is not None:
        write_new_config(options.new, options.kind)
        return
    sections = find_keys(config_type, options.key) if options.key else config_reference(config_type)
    print("\n\n".join(as_text(section, terminal_width()) for section in sections))


def recipes(options: RecipesOptions) -> None:
    """List, print or copy the configs that come with deepcloze.

    There are published pretraining recipes, and tasks in the format of their original files. Each is complete but for
    its data and, in fine-tuning, its model: give --model.init_from. --config takes their names too.

    Example:
        deepcloze recipes cp roberta-base roberta.yaml
    """
    from launcher.new_config import recipes_command

    recipes_command(options)


def validate(options: ValidateOptions) -> None:
    """Check a pretraining, fine-tuning, comparison or cleaning config, and its files. Starts nothing.

    Example:
        deepcloze validate my-run.yaml
    """
    from launcher.configs import command_of

    file, overrides = options.config, options.overrides
    command = command_of(file)
    if command == "clean":
        from pretrain.cleaning.config import CleanConfig
        from pretrain.cleaning.run import check as check_cleaning

        check_cleaning(load_config(CleanConfig, file, overrides), _evaluation_texts)
    elif command == "compare":
        with command_imports():
            from launcher.run_sets.compare_plan import plan_comparison

        plan_comparison(CompareOptions(file=file, overrides=overrides))
    elif command == "finetune":
        from finetune.config import FinetuneConfig

        load_config(FinetuneConfig, file, overrides)  # before the imports, which take seconds
        with command_imports():
            from finetune.run import check

        check(file, overrides)
    else:
        from launcher.run_sets.validation import check_pretraining

        check_pretraining(file, overrides)
    print(f"{file}: valid, for deepcloze {command}")


def completion(options: CompletionOptions) -> None:
    """Print a script with which a shell completes commands, flags and config keys.

    The first line of the script says where to put it.

    Example:
        deepcloze completion bash
    """
    from launcher.completion import completion_script

    print(completion_script(options.shell, COMMANDS), end="")


def _evaluation_texts(task: str) -> "Sequence[EvaluationText]":
    """Return the texts that a cleaning decontaminates against: of the validation and test splits of a fine-tuning
    config, named by its path or as a recipe."""
    with fast_imports():
        from finetune.evaluation_texts import evaluation_texts

    with user_errors_in(f"decontaminate.against: {task}"):
        return evaluation_texts(find_config(task, "finetune"))


COMMANDS: dict[str, Command] = {
    command.__name__: command
    for command in (
        python_docs,
        clean,
        tokenizer,
        corpus,
        config,
        recipes,
        validate,
        plan,
        preflight,
        pretrain,
        evaluate,
        export,
        finetune,
        predict,
        serve,
        sweep,
        compare,
        watch,
        status,
        logs,
        report,
        completion,
    )
}
