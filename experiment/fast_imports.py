"""Quick imports of large libraries."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import torch and transformers in three quarters of the time, by collecting no garbage in the block.

    The imports make a million objects that stay. Blocks may be nested.
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


def import_transformers_without_scipy() -> None:
    """For a process of a command: transformers imports scipy for its losses of object detection, and 5.17 scikit-learn
    for assisted generation, which takes an eighth of the time of all imports. Call before its models are imported."""
    import transformers.utils

    transformers.utils.is_scipy_available = transformers.utils.is_sklearn_available = lambda: False
