"""Distributed pretraining of masked language models: the `deepcloze` commands as functions. See docs/python.md.

    import deepcloze

    deepcloze.build_corpus("books/*.txt", "tokenizer", "corpora/books", holdout=1000)
    run = deepcloze.pretrain("my-run.yaml", {"optimizer.lr": 1e-3}, num_gpus=2)
    scores = deepcloze.evaluate(run, ["corpora/books-heldout"])

`deepcloze:run` is the command, as is `python -m deepcloze`. All import their own packages, whatever else on Python's
path has their names.
"""

import importlib
import importlib.util
import os
import site
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from experiment.errors import StoppedError, UserError
    from finetune.prediction.predictor import Predictor
    from launcher.functions import build_corpus, compare, evaluate, finetune, pretrain, read_metrics
    from pretrain.corpus.reader import open_corpus

__all__ = [
    "Predictor",
    "StoppedError",
    "UserError",
    "build_corpus",
    "compare",
    "evaluate",
    "finetune",
    "open_corpus",
    "pretrain",
    "read_metrics",
]

_MODULES = {
    "Predictor": "finetune.prediction.predictor",
    "StoppedError": "experiment.errors",
    "UserError": "experiment.errors",
    "open_corpus": "pretrain.corpus.reader",
}
"""Modules that define public names; default: launcher.functions."""

_PACKAGES = ("launcher", "pretrain", "finetune", "experiment")
_ROOT = Path(__file__).resolve().parent
_OTHER_SYSTEM = "deepcloze needs Linux; on Windows use WSL 2"


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'deepcloze' has no attribute '{name}'")
    if sys.platform != "linux":
        raise ImportError(_OTHER_SYSTEM)
    _put_own_packages_first()
    value = getattr(importlib.import_module(_MODULES.get(name, "launcher.functions")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def run() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    if sys.platform != "linux":
        sys.exit(_OTHER_SYSTEM)
    _put_own_packages_first()
    try:
        from launcher.__main__ import run as run_launcher
    except KeyboardInterrupt:
        sys.exit(130)
    run_launcher()


def _put_own_packages_first() -> None:
    """Put our packages before others with their names on the path. Raises ImportError if one of these has been
    imported."""
    hidden = [name for name in _PACKAGES if _location(name) != _ROOT / name]
    if not hidden:
        return
    if imported := [name for name in hidden if name in sys.modules]:
        raise ImportError(f"{_location(imported[0])} hides the package '{imported[0]}' of deepcloze; rename it")
    hiding = {_location(name).parent for name in hidden}
    given = {Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(":") if entry}
    installed = {Path(folder).resolve() for folder in (*site.getsitepackages(), site.getusersitepackages())}
    if _ROOT in installed and not hiding & given:
        # First in the path, other packages there, such as backports, would hide the standard library.
        sys.path.sort(key=lambda entry: Path(entry).resolve() in hiding)
        return
    sys.path.insert(0, str(_ROOT))
    path = filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))
    os.environ["PYTHONPATH"] = ":".join(path)  # for worker processes


def _location(name: str) -> Path:
    """Return the folder, or the file, that `import name` would import."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return Path(name)
    if spec.submodule_search_locations is not None:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(str(spec.origin)).resolve()


if __name__ == "__main__":
    run()
