import errno
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from multiprocessing.connection import Listener
from pathlib import Path

import pytest

from experiment.errors import (
    HostError,
    StoppedError,
    UserError,
    describe_disk_error,
    is_out_of_memory,
    notify,
    readable_disk_errors,
    stopped_by_disk_errors,
    user_errors_in,
)

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
        (OSError(errno.ENOTEMPTY, "of NFS, with an open file", "/runs/a"), "/runs/a: Directory not empty"),
        (TimeoutError(errno.ETIMEDOUT, "", "/nfs/a"), "/nfs/a: Connection timed out"),
        (TimeoutError(errno.ETIMEDOUT, "of a socket"), None),
        (OSError(errno.ENOLCK, "of flock(2), which knows no name"), "No locks available"),
        (RUST, "disk full"),
        (shutil.Error([("a", "b", str(FULL))]), "disk full"),
        (FileNotFoundError(errno.ENOENT, "", "/runs/a"), None),
        (BrokenPipeError(errno.EPIPE, ""), None),
        (OSError("no such model"), None),
        (UserError(f"the tokenizer fails on line 7: {RUST}"), None),
        (KeyError(28), None),
        (PermissionError(errno.EPERM, "of killpg(2), which is about no file"), None),
        (RuntimeError("the worker said: [Errno 13] Permission denied"), None),
        (RuntimeError("error sending request: operation timed out (os error 110)"), None),
    ],
)
def test_errors_of_the_disk_are_described(error: Exception, expected: str | None) -> None:
    """Catches a traceback for a full disk, and a bug that is reported as one."""
    assert describe_disk_error(error) == expected


def test_other_errors_pass() -> None:
    """Catches a bug that is hidden behind a message, and a message that loses its context."""
    with pytest.raises(KeyError), readable_disk_errors():
        raise KeyError("x")
    expected = r"^--output o: /runs/a/config\.yaml: disk full; try again$"
    with pytest.raises(UserError, match=expected) as caught, readable_disk_errors("--output o: ", "; try again"):
        raise FULL
    assert caught.value.__suppress_context__


def test_a_machine_without_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, and a message that does not name TMPDIR."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "missing")])
    with pytest.raises(UserError, match=r"^no folder for temporary files .* set TMPDIR"), readable_disk_errors():
        tempfile.gettempdir()


def test_a_long_path_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback of worker processes that does not name the folder, such as of a job on a cluster."""
    folder = tmp_path / ("t" * 90)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with (
        pytest.raises(UserError, match=rf"^the path .* is too long \({folder}\); set TMPDIR"),
        readable_disk_errors(),
        Listener(tempfile.mktemp(), "AF_UNIX"),
    ):
        pass


def test_a_key_before_a_message_keeps_its_kind() -> None:
    """Catches a disk that is away for a moment, and ends a run as a mistake in its config would."""
    with pytest.raises(HostError, match=r"^model.init_from: stale$"), user_errors_in("model.init_from"):
        raise HostError("stale")


@pytest.mark.parametrize(
    ("number", "expected"),
    [(number, StoppedError) for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)]
    + [(number, StoppedError) for number in (errno.ESHUTDOWN, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN)]
    + [(number, StoppedError) for number in (errno.EREMOTEIO, errno.ECOMM)]
    + [(number, UserError) for number in (errno.EACCES, errno.EISDIR, errno.EROFS, errno.ENAMETOOLONG, errno.EFBIG)]
    + [(number, UserError) for number in (errno.EBUSY, errno.ENOLCK)],
)
def test_only_an_error_that_may_pass_can_be_resumed(number: int, expected: type[Exception]) -> None:
    """Catches a queue that runs a command again forever because it exits with 75 for a file that it may not write."""
    with pytest.raises(expected, match=r"^sweep: /runs/a: "), stopped_by_disk_errors("sweep: "):
        raise OSError(number, "", "/runs/a")


def test_the_traceback_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a bug that looks like an error of the disk, and leaves no trace of where it is."""
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError), readable_disk_errors():
        raise FULL
    assert "test_the_traceback_is_logged" in caplog.text.partition("Traceback")[2]


LITTLE_MEMORY = """
import resource
import torch
from experiment.errors import is_out_of_memory

torch.set_num_threads(1)
layers = [torch.nn.Linear(512, 512), torch.nn.Linear(512, 512, dtype=torch.bfloat16)]
for layer in layers:
    layer(torch.zeros(8, 512, dtype=layer.weight.dtype))
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), resource.RLIM_INFINITY))
errors = []
for layer in layers:
    for rows in range(2000, 40000, 1000):
        try:
            layer(torch.zeros(rows, 512, dtype=layer.weight.dtype))
        except Exception as error:
            errors.append(error)
print(len(errors) > 2, [str(error) for error in errors if not is_out_of_memory(error)])
"""


def test_running_out_of_the_memory_of_a_limit_is_recognized() -> None:
    """Catches an error of the allocator or of oneDNN that ends a run instead of halving its microbatch."""
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY], capture_output=True, text=True, check=True)
    assert done.stdout == "True []\n"


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
        "NCCL error in: …, unhandled cuda error: Failed to CUDA calloc 8388608 bytes",
    ],
)
def test_running_out_of_the_memory_of_a_gpu_is_recognized(message: str) -> None:
    """Catches an error of a library, which torch does not raise as OutOfMemoryError."""
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(ValueError(message))


def test_a_signal_interrupts_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a launcher that dies, with its ranks, when a signal comes while it prints: the handler prints too, and
    Python does not let it enter the same stream again."""

    class Interrupted(io.FileIO):
        def write(self, data: bytes) -> int:
            count = super().write(data)
            signal.raise_signal(signal.SIGUSR1)
            return count

    before = signal.signal(signal.SIGUSR1, lambda *_: notify("stopping"))
    try:
        with io.TextIOWrapper(io.BufferedWriter(Interrupted(tmp_path / "stderr", "w")), "gb18030") as stderr:
            monkeypatch.setattr(sys, "stderr", stderr)
            notify("重新开始")
            monkeypatch.undo()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (tmp_path / "stderr").read_text("gb18030") == "deepcloze: 重新开始\ndeepcloze: stopping\n"
