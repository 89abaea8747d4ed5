"""Models and tokenizers by the names that users give: a path, the URL of a checkpoint, or a name on the Hub.

Configs record `record_model(name)`; code that computes with a model reads `local_model(name)`. Both accept names that
the other returns.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from experiment.downloads import local_folder
from experiment.errors import UserError, notify, warn_once
from experiment.models.hub import download_model, resolve_commit
from experiment.models.hub_names import HubName, meant_name
from experiment.run_files.checkpoints import (
    checkpoint_candidates,
    checkpoint_step,
    find_model_folder,
    is_checkpoint_name,
    mention_best,
    mention_newer,
    names_model_folder,
)
from experiment.run_files.goodput import read_attempt_times
from experiment.run_files.mirror import local_checkpoint
from experiment.run_files.run_folder import RunFolder
from experiment.run_files.run_life import read_life
from experiment.storage import is_url

_UNFINISHED = ("running", "stopped", "failed", "killed")
# Files that may be in the folder of a tokenizer.
_WEIGHTS = (".bin", ".h5", ".msgpack", ".onnx", ".pt", ".safetensors")


def record_model(name: str, earlier: str | None = None) -> str:
    """Return the name to record in a config: the absolute path of a Hugging Face folder, or NAME@COMMIT of a model of
    the Hub.

    earlier: the name that the run recorded when it began, if it did. It is returned, without a look at the model, for
    the same folder, checkpoint or run, and for the same name of the Hub without a revision. Raises UserError if there
    is no such model.
    """
    _check_form(name)
    hub = HubName.of_model(name)
    if earlier is not None:
        if hub is not None and hub.revision is None and hub.may_mean(earlier):
            return earlier
        if names_model_folder(Path(name), Path(earlier)):
            mention_newer(Path(name), Path(earlier))
            return earlier
    return str(find_model_folder(local_model(name)).absolute() if hub is None else resolve_commit(hub))


def mention_state(name: str, model: str) -> None:
    """Notify if `name` is a run that has not finished, and inform if it has a better checkpoint than the newest one, as
    which `record_model` has returned `model`."""
    folder = RunFolder(Path(name))
    if not folder.checkpoints.is_dir() or not is_checkpoint_name(Path(model).parent.name):
        return
    mention_best(folder.path, Path(model))
    step = checkpoint_step(Path(model).parent)
    with suppress(OSError):
        times, state = read_attempt_times(folder), read_life(folder).state
        total = times[-1].total_steps if times else None
        if state in _UNFINISHED and (total is None or step < total):
            of_total = "" if total is None else f" of {total:,}"
            notify(f"{name}: this run has not finished ({state}): its newest checkpoint is step {step:,}{of_total}")


def local_model(
    name: str,
    on_progress: Callable[[], None] = lambda: None,
    *,
    weights: bool = True,
    modules: bool = False,
    onnx: bool = False,
    card: bool = False,
) -> Path:
    """Return the path that a name stands for: a folder, a checkpoint or a run. A model of object storage or of the Hub
    is copied to the user's cache folder first; for the other parameters see `download_model`. Raises UserError."""
    _check_form(name)
    if is_url(name):
        return local_checkpoint(name)
    if HubName.parse(name) is not None and (Path(name) / "config.json").is_file():
        warn_once(f"{name}: using this folder, not a model of this name on the Hugging Face Hub")
    hub = HubName.of_model(name)
    if hub is None:
        return Path(name)
    return download_model(hub, on_progress, weights=weights, modules=modules, onnx=onnx, card=card)


def local_tokenizer(name: str) -> Path:
    """Like `local_model`, for a tokenizer: the folder of the model of a checkpoint or run, or a folder that is copied
    without model weights."""
    _check_form(name)
    if is_url(name):
        return local_folder(name, _WEIGHTS)
    path = local_model(name, weights=False)
    return find_model_folder(path) if checkpoint_candidates(path) else path


def _check_form(name: str) -> None:
    if (meant := meant_name(name)) is not None:
        raise UserError(f"{name}: did you mean '{meant}', the name of the model?")
