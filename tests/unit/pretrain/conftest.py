"""One thread: more only slow down models this small. And a folder that cannot be removed."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def undeletable() -> Callable[[str], AbstractContextManager[None]]:
    """Refuse to remove folders whose names have this end, as NFS does, which keeps deleted files that are open."""

    @contextmanager
    def call(end: str) -> Iterator[None]:
        real = os.rmdir

        def refuse(path: Any, **options: Any) -> None:
            if str(path).endswith(end):
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
            real(path, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "rmdir", refuse)
            yield

    return call
