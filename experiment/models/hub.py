"""Models and data sets of the Hugging Face Hub: from names to commits and to folders of huggingface_hub's cache.

A name is resolved to a commit once, and everything is read from that commit, so that a push to the Hub between two
files, or between two starts of a run, changes nothing. Only files of known formats are downloaded: never pickles, and
never code. Functions raise UserError with one line: for missing or restricted repositories and files, without a
network, and for a full disk. They retry transient errors.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

from experiment.errors import UserError, describe_disk_error, first_line, inform
from experiment.models.hub_names import HubName
from experiment.progress import without_bars
from experiment.storage import retry

T = TypeVar("T")

Kind = Literal["model", "dataset"]

TOKENIZER_FILES = (
    *("*tokens*.json", "*tokenizer*.json", "vocab*.json", "vocab*.txt", "merges.txt", "*.model"),
    *("bpe.codes", "dict.txt", "entity_vocab.json", "word_shape.json", "word_pronunciation.json"),
)
"""Patterns of the files of all tokenizers in transformers."""

_CONFIG_AND_TOKENIZER = ("*.json", "*.txt", *TOKENIZER_FILES)
_CARD = ("README.md", "LICENSE*")
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
_ONNX = ("model.onnx", "model.onnx.data")  # as `deepcloze export` names them
_MODULE_WEIGHTS = "[0-9]*_*/model.safetensors"  # of sentence-transformers, such as 2_Dense
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def resolve_commit(name: HubName, kind: Kind = "model") -> HubName:
    """Return the name with the commit that its revision is now; if the Hub cannot be reached, the one that is
    cached."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import logging

    if name.is_commit:
        return name

    def resolve() -> HubName:
        found = HfApi().resolve_revision(name.repository, revision=name.revision, repo_type=kind)
        return HubName(name.repository, found.resolved)

    level = logging.get_verbosity()
    if constants.is_offline_mode():
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # not to warn that the Hub cannot be reached
    try:
        return call_hub(name, kind, resolve)
    finally:
        logging.set_verbosity(level)


def download_model(
    name: HubName,
    on_progress: Callable[[], None] = lambda: None,
    *,
    weights: bool = True,
    modules: bool = False,
    onnx: bool = False,
    card: bool = False,
) -> Path:
    """Return the folder with a model's config and tokenizer, and its weights in safetensors.

    Cached files are not downloaded again; waits for another process that downloads the same. Shows a progress bar
    on a terminal.

    Args:
        on_progress: called when something has been received.
        weights: whether to download them.
        modules: whether to download those of sentence-transformers, such as 1_Pooling, too.
        onnx: whether a model without safetensors may be one that `deepcloze export` wrote as ONNX.
        card: whether to download its card and license too.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    pinned = resolve_commit(name)

    def fetch(weights: Sequence[str]) -> Path:
        try:
            return _snapshot(pinned, weights, modules, tqdm_class=_bar(on_progress))
        except Exception:  # before 2.2, huggingface_hub does not look for what is cached of a commit
            with suppress(LocalEntryNotFoundError):
                return _snapshot(pinned, weights, modules, local_files_only=True)
            raise

    def download(weights: Sequence[str]) -> Path:
        if (folder := _cached(pinned, weights, modules)) is not None:
            return folder
        if not constants.is_offline_mode():
            inform(f"downloading {pinned} from the Hugging Face Hub")
        folder = call_hub(name, "model", lambda: fetch(weights))
        # Without the list of a commit's files, `snapshot_download` returns what other programs have cached of it.
        if modules and not (folder / "1_Pooling").is_dir() and _cached(pinned, weights, modules) is None:
            raise UserError(
                f"{name}: cannot tell whether it has modules of sentence-transformers, such as a pooling: the list of "
                f"its files is not in {constants.HF_HUB_CACHE}; get it with `{_download_command(pinned)}`"
            )
        return folder

    folder = download((*(_WEIGHTS if weights else ()), *(_CARD if card else ())))
    if onnx and not _has_any(folder, _WEIGHTS):
        folder = download(_ONNX)
    if not any(folder.glob("*.json")) and not (folder / "vocab.txt").is_file():
        raise UserError(
            f"{name}: there is neither a config.json nor a tokenizer of transformers on the Hugging Face Hub"
        )
    if weights and not _has_any(folder, (*_WEIGHTS, *(_ONNX if onnx else ()))):
        raise UserError(
            f"{name}: there are no weights in safetensors (model.safetensors) on the Hugging Face Hub; others, such as "
            f"pytorch_model.bin, are not read: a pickle may run code. If you trust it, run `"
            f"{_download_command(name)} --local-dir FOLDER` and name FOLDER; or name a pull request with "
            f"safetensors, if there is one: {name.repository}@refs/pr/N"
        )
    return folder


def _has_any(folder: Path, patterns: Sequence[str]) -> bool:
    return any(path for pattern in patterns for path in folder.glob(pattern))


def _cached(name: HubName, weights: Sequence[str], modules: bool) -> Path | None:
    """Return the folder, if all its files are known to be there. Does not access the network."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    try:
        get_cached_repo_tree(name.repository, revision=name.revision)
        return _snapshot(name, weights, modules, local_files_only=True)
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
        return None


def _snapshot(name: HubName, weights: Sequence[str], modules: bool, **options: Any) -> Path:
    """weights: patterns of their names; none without weights."""
    from huggingface_hub import snapshot_download

    folder: str = snapshot_download(
        name.repository,
        revision=name.revision,
        allow_patterns=[*_CONFIG_AND_TOKENIZER, *weights, *([_MODULE_WEIGHTS] if weights else [])],
        ignore_patterns=["[!0-9]*/*" if modules else "*/*"],  # other formats; folders of modules begin with digits
        **options,
    )
    return Path(folder)


def _bar(on_progress: Callable[[], None]) -> type[Any]:
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> Any:
            on_progress()
            return super().update(n)

    return Bar


def call_hub(name: HubName, kind: Kind, function: Callable[[], T]) -> T:
    """Call `function`, which uses the Hub, again after transient errors. Raises UserError."""
    from huggingface_hub import utils
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError

    def call() -> T:
        try:
            return function()
        except OfflineModeIsEnabled as error:  # raised directly by huggingface_hub 1.31 to 2.0
            raise _unreachable(name, kind, error) from None
        except (LocalEntryNotFoundError, RevisionResolutionError) as error:  # nothing is cached either
            cause = error.__cause__
            if isinstance(cause, OfflineModeIsEnabled) or type(cause).__name__ in ("ConnectError", "ConnectTimeout"):
                raise _unreachable(name, kind, cause or error) from None
            raise cause or error from None

    with without_bars(utils):
        return retry(str(name), call, lambda _, error: _explain(name, kind, error))


def _unreachable(name: HubName, kind: Kind, error: BaseException) -> UserError:
    from huggingface_hub import constants

    why = f"cannot reach {constants.ENDPOINT} ({first_line(error)})"
    return UserError(
        f"{name}: no such folder, and no such {kind} in {constants.HF_HUB_CACHE}; "
        f"{'HF_HUB_OFFLINE is set' if constants.is_offline_mode() else why}: {download_elsewhere(name, kind)}"
    )


def download_elsewhere(name: HubName, kind: Kind) -> str:
    """Return advice for a machine without a network."""
    command = _download_command(name)
    if kind == "dataset":  # `datasets` does not read huggingface_hub's cache
        command += " --repo-type dataset --local-dir FOLDER` and use `hub:FOLDER:SPLIT"
    return f"download it on a machine with network, with `{command}`"


def _download_command(name: HubName) -> str:
    return f"hf download {name.repository}{'' if name.revision is None else f' --revision {name.revision}'}"


def _explain(name: HubName, kind: Kind, error: Exception) -> UserError:
    from huggingface_hub import constants, errors

    if (problem := describe_disk_error(error)) is not None:
        return UserError(f"{name}: cannot write {constants.HF_HUB_CACHE}: {problem}")
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name.repository}"
        return UserError(f"{name}: access is restricted: accept the conditions at {page}, then {LOG_IN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{name}: there is no revision '{name.revision}'")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"{name}: no such folder, and no such {kind} on the Hugging Face Hub (for a private one, {LOG_IN})"
        )
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 403:
        return UserError(f"{name}: the token does not allow this: {LOG_IN} to one that does")
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        return UserError(f"{name}: the Hugging Face Hub rejects the token: {LOG_IN} to another one")
    return UserError(f"{name}: the Hugging Face Hub: {first_line(error)}")
