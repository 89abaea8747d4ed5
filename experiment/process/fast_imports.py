"""Quick imports of large libraries."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from experiment.process.signals import await_delayed_signal


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import torch and transformers in three quarters of the time, by collecting no garbage in the block.

    The imports make a million objects that stay. Blocks may be nested. A stop signal during the imports is handled at
    their end.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # all objects are now in the oldest generation, which is rarely collected
        gc.enable()
    await_delayed_signal()


@contextmanager
def command_imports() -> Iterator[None]:
    """`fast_imports` and `import_transformers_without_scipy`, in the process of a command."""
    with fast_imports():
        import_transformers_without_scipy()
        yield


def import_transformers_without_scipy() -> None:
    """Keep transformers from importing scipy for its object detection losses and, in 5.17, scikit-learn for assisted
    generation: an eighth of the time of all imports. For processes of commands; call before importing its models."""
    import transformers.utils

    transformers.utils.is_scipy_available = transformers.utils.is_sklearn_available = lambda: False
