"""The limit of open files of this process."""

import contextlib
import resource


def raise_limit_of_open_files() -> None:
    """Raise the soft limit, often 1024, to the hard limit: corpora, connections and hosts take file descriptors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some systems allow less than their hard limit says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
