"""The commands as functions of the module `deepcloze`, for scripts and notebooks.

They take the arguments of the commands, print the same progress, and return results. Each raises UserError for bad
input, StoppedError for work that was stopped and that the same call resumes, and RuntimeError if a run failed.
"""

import gc
import json
import os
import reprlib
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from experiment import progress
from experiment.config import Section, build_config, load_config
from experiment.config.field_types import expand_home
from experiment.config.yaml_dialect import write_yaml
from experiment.errors import UserError, warn_once
from experiment.files import read_json, write_text
from experiment.process.fast_imports import fast_imports
from experiment.process.hardware import return_freed_memory
from experiment.process.own_process import restore_devices
from experiment.process.signals import HANDLED_SIGNALS, handle_stop_signals, interrupt
from experiment.run_files.metrics_file import Event, read_events
from experiment.run_files.run_folder import RunFolder
from launcher.options import CompareOptions, FinetuneOptions, PretrainOptions
from pretrain.config import PretrainConfig
from pretrain.corpus.options import CorpusOptions

if TYPE_CHECKING:
    from pretrain.corpus.reader import Corpus
    from pretrain.evaluate import Scores

Config = str | Path | Mapping[str, Any]
"""A YAML file, the name of a recipe, or the content of a file."""

Overrides = Mapping[str, Any]
"""Dotted config key -> value. Text is read as on the command line."""

OptionsT = TypeVar("OptionsT", bound=Section)

_NOT_FOR_FUNCTIONS = {"detach", "dry_run", "inspect", "verify"}  # flags with which there is no result


def build_corpus(
    source: str | Path | Sequence[str | Path],
    tokenizer: str | Path,
    output: str | Path,
    *,
    holdout: int | None = None,
    limit: int | None = None,
    workers: int | None = None,
    quiet: bool = False,
    **flags: Any,
) -> "Corpus":
    """Build a tokenized corpus from raw text, as `deepcloze corpus`, and open it.

    Args:
        source: files, folders, globs and URLs of text.
        tokenizer: a Hugging Face tokenizer folder.
        output: the corpus folder to write. If it holds the same corpus already, that is kept.
        holdout: put this many documents, drawn at random, into the corpus OUTPUT-heldout instead.
        limit: keep only this many documents, drawn at random.
        workers: number of processes; default: one per core.
        quiet: print results and warnings only.
        flags: any other flag of `deepcloze corpus`, such as `document="blank_line"`.

    Example:
        corpus = deepcloze.build_corpus("books/*.txt", "tokenizer", "corpora/books", holdout=1000)
        print(corpus.documents, corpus.tokens)
    """
    flags |= {"source": source, "tokenizer": tokenizer, "output": output}
    flags |= {"holdout": holdout, "limit": limit, "workers": workers}
    options = _options(CorpusOptions, "build_corpus", flags)
    if options.engine == "slurm":
        raise UserError("build_corpus: 'engine': expected 'local' or 'ray'; tasks of SLURM run `deepcloze corpus`")
    from pretrain.corpus import build, reader

    with _as_a_command(quiet):
        build.build_corpus(options)
    return reader.open_corpus(output)


def pretrain(
    config: Config,
    overrides: Overrides | None = None,
    *,
    num_gpus: int | None = None,
    hostfile: str | Path | None = None,
    quiet: bool = False,
    **flags: Any,
) -> Path:
    """Pretrain an encoder, one process per GPU, as `deepcloze pretrain`. Returns the run folder.

    The same call resumes from the last checkpoint. An interrupt makes the run save a checkpoint and raises
    StoppedError.

    Args:
        config: a YAML file, the name of a recipe, or the content of a file as a mapping.
        overrides: such as `{"optimizer.lr": 1e-4}`.
        num_gpus: ranks per machine; default: one per GPU, or 1 on a CPU.
        hostfile: machines to run on, one `NAME slots=N` per line.
        quiet: print warnings and errors only.
        flags: any other flag of `deepcloze pretrain`, such as `max_restarts=3`.

    Example:
        run = deepcloze.pretrain("my-run.yaml", {"optimizer.lr": 1e-3}, num_gpus=2)
    """
    from launcher.launch import launch_pretraining

    with _as_a_command(quiet), _config_file(config, PretrainConfig, overrides) as file:
        flags |= {"config": file, "overrides": _as_text(overrides), "num_gpus": num_gpus, "hostfile": hostfile}
        options = _options(PretrainOptions, "pretrain", flags)
        # Before the launch: the file may be edited, or the working directory changed, while the run trains.
        folder = Path(load_config(PretrainConfig, options.config, options.overrides).run.dir).absolute()
        launch_pretraining(options)
        return folder


def evaluate(
    checkpoint: str | Path,
    corpora: Sequence[str | Path],
    *,
    masks_of: str | Path | None = None,
    quiet: bool = False,
) -> dict[str, "Scores"]:
    """Measure held-out loss, perplexity and masked-token accuracy, as `deepcloze evaluate`.

    The run's seed, masking and maximum sequence length fix the masks; a Hugging Face folder has the defaults. Scores of
    two models are comparable if these are the same.

    Args:
        checkpoint: a checkpoint, a run (its newest checkpoint), or a Hugging Face folder with a masked-LM head.
        corpora: folders that were built with the model's tokenizer.
        masks_of: a run or checkpoint whose masks and sequence length to use instead.
        quiet: print warnings and errors only.

    Example:
        scores = deepcloze.evaluate("runs/mine", ["corpora/books-heldout"])
        print(scores["books-heldout"].loss)
    """
    if not isinstance(checkpoint, str | Path):
        raise UserError(f"evaluate: 'checkpoint': expected a folder or the name of a model, found {checkpoint!r}")
    if isinstance(corpora, str | Path):
        raise UserError(f"evaluate: 'corpora': expected a list of folders, found one: [{str(corpora)!r}]")
    from launcher.hosts.machine import launch_machine

    with _call(quiet):
        launch_machine()
        with fast_imports():
            from pretrain.evaluate import evaluate as evaluate_corpora

        with _own_torch_state():
            masks_of = None if masks_of is None else expand_home(str(masks_of))
            folders = [expand_home(str(corpus)) for corpus in corpora]
            return evaluate_corpora(expand_home(str(checkpoint)), folders, masks_of)


def finetune(config: Config, overrides: Overrides | None = None, *, quiet: bool = False) -> dict[str, Any]:
    """Fine-tune an encoder on one task, with one or more seeds, as `deepcloze finetune`.

    Returns the content of RUN/results.json, see docs/finetuning.md. The same call trains the seeds that are missing.

    Args:
        config: a YAML file, the name of a recipe, or the content of a file as a mapping.
        overrides: such as `{"model.init_from": "runs/mine", "training.seeds": [1, 2, 3]}`.
        quiet: print results, warnings and errors only.

    Example:
        results = deepcloze.finetune("my-task.yaml", {"model.init_from": run})
        print(results["splits"]["test"]["accuracy"]["mean"])
    """
    from finetune.config import FinetuneConfig

    with _as_a_command(quiet), _config_file(config, FinetuneConfig, overrides) as file, handle_stop_signals(interrupt):
        flags = {"config": file, "overrides": _as_text(overrides)}
        options = _options(FinetuneOptions, "finetune", flags)
        load_config(FinetuneConfig, options.config, options.overrides)  # before the imports, which take seconds
        with fast_imports():
            from finetune.resolve import load_run_config
            from finetune.run import run

        try:
            with _own_torch_state():
                return run(load_run_config(options.config, options.overrides))
        finally:
            return_freed_memory()


def compare(config: Config, overrides: Overrides | None = None, *, quiet: bool = False, **flags: Any) -> dict[str, Any]:
    """Compare initializations over tasks and seeds, as `deepcloze compare`.

    Returns the content of DIR/compare.json, see docs/comparing.md: row -> task -> scores. The same call runs the cells
    that are missing.

    Args:
        config: a YAML file, or its content as a mapping; the tasks in it are files or names of recipes.
        overrides: such as `{"seeds": [1, 2]}`.
        quiet: print results, warnings and errors only.
        flags: any flag of `deepcloze compare`.

    Example:
        scores = deepcloze.compare("encoders.yaml")
        print(scores["BERT"]["sst2"]["mean"])
    """
    with fast_imports():
        from launcher.run_sets.compare import run_comparison
        from launcher.run_sets.compare_config import CompareConfig
        from launcher.run_sets.compare_plan import plan_comparison

    with _as_a_command(quiet), _config_file(config, CompareConfig, overrides) as file, handle_stop_signals(interrupt):
        flags |= {"file": file, "overrides": _as_text(overrides)}
        options = _options(CompareOptions, "compare", flags)
        with _own_torch_state():
            plan = plan_comparison(options)
        run_comparison(plan)
        scores: dict[str, Any] = read_json(plan.runs.folder.path / "compare.json")
        return scores


def read_metrics(run: str | Path) -> list[Event]:
    """Return the events that a run has logged, in the order of training: a mapping with `step`, `loss` and others for
    each.

    The run may be active. See docs/tracking.md for the metrics.

    Example:
        losses = {event["step"]: event["loss"] for event in deepcloze.read_metrics("runs/mine") if "loss" in event}
    """
    if not (path := RunFolder(Path(expand_home(str(run)))).metrics).is_file():
        raise UserError(f"read_metrics: {path} does not exist; expected the folder of a run that has started")
    return read_events(path)


def _options(options_type: type[OptionsT], function: str, values: Mapping[str, Any]) -> OptionsT:
    """Return the options of a command. Raises UserError."""
    if others := _NOT_FOR_FUNCTIONS & values.keys():
        raise UserError(f"{function}: '{min(others)}': only the command has this flag")
    try:
        return build_config(options_type, _as_plain(values, function), origin=function)
    except UserError as error:
        raise UserError(str(error).replace("unknown config key", "unknown argument")) from None


def _as_plain(value: Any, place: str) -> Any:
    """Return paths as text, tuples as lists, numbers and arrays of NumPy and PyTorch as Python's. Raises UserError for
    others, with their place."""
    if value is None or isinstance(value, str | int | float):
        return json.loads(json.dumps(value))  # of subclasses, such as numpy.float64, the plain value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _as_plain(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    plain = value.tolist() if hasattr(value, "tolist") else value
    if type(plain) is type(value):
        kind = type(value).__name__
        raise UserError(
            f"{place}: expected numbers, text, paths, lists and mappings, found {kind}: {reprlib.repr(value)}"
        )
    return plain


def _as_text(overrides: Overrides | None) -> dict[str, str]:
    """Return overrides as on a command line. Raises UserError."""
    if not isinstance(overrides, Mapping | None):
        raise UserError(f"'overrides': expected a mapping, such as {{'optimizer.lr': 1e-4}}, found {overrides!r}")
    plain = _as_plain(overrides or {}, "overrides")
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in plain.items()}


@contextmanager
def _config_file(config: Config, config_type: type[Section], overrides: Overrides | None) -> Iterator[str]:
    """The file of a config; a temporary one for a mapping. Raises UserError for a mapping that is not valid."""
    if isinstance(config, str | Path):
        yield str(config)
        return
    if not isinstance(config, Mapping):
        raise UserError(f"'config': expected a file, the name of a recipe or a mapping, found {config!r}")
    tree, text = _as_plain(config, "config"), _as_text(overrides)
    build_config(config_type, tree, text)
    run = text.get("run.dir") or (tree.get("run") or {}).get("dir") or "config"
    with tempfile.TemporaryDirectory(prefix="deepcloze-") as folder:
        file = Path(folder, f"{Path(run).name}.yaml")  # a task without a name is called like its file
        write_text(file, write_yaml(tree))
        yield str(file)


_TORCH_STATE = threading.RLock()


@contextmanager
def _own_torch_state() -> Iterator[None]:
    """Keep the random state of the caller's process, compute gradients if the caller does not, and free the memory of
    GPUs for other processes, such as ranks. One thread at a time."""
    import torch

    with _TORCH_STATE:
        was_initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        devices = range(torch.cuda.device_count()) if was_initialized else ()
        try:
            with torch.random.fork_rng(devices), torch.inference_mode(mode=False), torch.enable_grad():
                yield
        finally:
            if not was_initialized:  # GPUs have had no state to keep, only the seed of the last torch.manual_seed
                torch.cuda.manual_seed_all(torch.initial_seed())
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                gc.collect()
                torch.cuda.empty_cache()


@contextmanager
def _as_a_command(quiet: bool) -> Iterator[None]:
    """A `_call` that raises RuntimeError or UserError in place of the end of the process, and restores the handlers of
    signals. Messages about flags are about `overrides`."""
    if threading.current_thread() is not threading.main_thread():
        raise UserError("call deepcloze in the main thread, which gets the signals that stop a run")
    handlers = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    try:
        with _call(quiet):
            yield
    except UserError as error:
        if not (message := str(error)).startswith("command line: "):
            raise
        raise UserError(f"overrides: {message.removeprefix('command line: ')}") from None
    except SystemExit as ending:
        if ending.code == 2:
            raise UserError("the run was rejected, for the reason that is printed above") from None
        raise RuntimeError(str(ending.code).removeprefix("deepcloze: ")) from None
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # otherwise it is not Python's
                signal.signal(number, handler)


@contextmanager
def _call(quiet: bool) -> Iterator[None]:
    """Print results, warnings and errors only if `quiet`, and restore the variables that choose devices."""
    warn_once.cache_clear()  # once in each command
    try:
        with progress.quiet() if quiet else nullcontext():
            yield
    finally:
        restore_devices()
