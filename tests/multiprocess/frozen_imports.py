"""A process of tests collects no garbage among the million objects that the imports of libraries make."""

import gc
from types import SimpleNamespace


def freeze_imports() -> None:
    """Freeze all objects for good. `fast_imports` would unfreeze them: the next collection would then take a second,
    and copy the memory that a forked process shares."""
    from experiment.process import fast_imports

    gc.freeze()
    fast_imports.gc = SimpleNamespace(**{**vars(gc), "freeze": lambda: None, "unfreeze": lambda: None})
