import errno
import os
import shutil

import pytest

from experiment.disk_errors import describe_disk_error, disk_errors_as
from experiment.errors import UserError

RUST = Exception("Error while serializing: I/O error: No space left on device (os error 28)")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/a/config.yaml")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FULL, "/runs/a/config.yaml: disk full"),
        (OSError(errno.ENOSPC, "of write(2), which knows no name"), "disk full"),
        (OSError(errno.EDQUOT, "", "/home/x"), "/home/x: disk full (quota exceeded)"),
        (PermissionError(errno.EACCES, "", "/runs/a"), "/runs/a: Permission denied"),
        (OSError(errno.EROFS, "", "/runs/a"), "/runs/a: Read-only file system"),
        (RUST, "disk full"),
        (shutil.Error([("a", "b", str(FULL))]), "disk full"),
        (FileNotFoundError(errno.ENOENT, "", "/runs/a"), None),
        (BrokenPipeError(errno.EPIPE, ""), None),
        (OSError("no such model"), None),
        (UserError(f"the tokenizer fails on line 7: {RUST}"), None),
        (KeyError(28), None),
    ],
)
def test_errors_of_the_disk_are_described(error: Exception, expected: str | None) -> None:
    """Catches a traceback for a full disk, and a bug that is reported as one."""
    assert describe_disk_error(error) == expected


def test_other_errors_pass() -> None:
    """Catches a bug that is hidden behind a message, and a message that loses its context."""
    with pytest.raises(KeyError), disk_errors_as(UserError):
        raise KeyError("x")
    expected = r"^--output o: /runs/a/config\.yaml: disk full; try again$"
    with pytest.raises(UserError, match=expected) as caught, disk_errors_as(UserError, "--output o: ", "; try again"):
        raise FULL
    assert caught.value.__suppress_context__
