import errno
import fcntl
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from pretrain.engine import initialization
from pretrain.engine.kernel_lock import KernelLock


def test_a_kernel_is_built_after_an_interrupted_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that waits forever, because a process was killed while DeepSpeed built a kernel."""
    build = Mock()
    monkeypatch.setattr(cpp_extension, "FileBaton", FileBaton, raising=False)  # restored at the end
    monkeypatch.setattr(cpp_extension, "_write_ninja_file_and_build_library", build)
    monkeypatch.setattr(FileBaton, "wait", lambda _: pytest.fail("waits for a process that has ended"))
    source = tmp_path / "kernel.cpp"
    source.touch()

    def load_kernel(**_: Any) -> tuple[Any, ...]:
        cpp_extension.load("kernel", [str(source)], build_directory=str(tmp_path), is_python_module=False)
        return SimpleNamespace(), None, None, None

    monkeypatch.setattr(cpp_extension, "_import_module_from_library", lambda *_: None)
    monkeypatch.setattr("deepspeed.initialize", load_kernel)
    (tmp_path / "lock").touch()
    model = torch.nn.Linear(1, 1)
    initialization.initialize(model, torch.optim.AdamW(model.parameters()), {})
    build.assert_called_once()


def test_one_process_builds_at_a_time(tmp_path: Path) -> None:
    """Catches a lock that is taken from a process that builds, and one that is kept after the build."""
    first, second = (KernelLock(str(tmp_path / "lock")) for _ in range(2))
    assert first.try_acquire()
    waiting = threading.Thread(target=second.try_acquire, daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    assert (tmp_path / "lock").exists()
    first.release()
    waiting.join()
    assert (tmp_path / "lock").exists()
    second.release()
    assert not (tmp_path / "lock").exists()


def test_on_a_disk_without_file_locks_torch_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback on Lustre without `-o flock`, and two ranks that build in one folder there."""
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))))
    first, second = (KernelLock(str(tmp_path / "lock")) for _ in range(2))
    assert first.try_acquire()
    assert not second.try_acquire()
    first.release()
    second.wait()


def test_a_kernel_of_another_user_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that ends because another user of a shared folder has built the kernel, and made the lock."""
    refusal = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "lock.held")
    monkeypatch.setattr(Path, "open", Mock(side_effect=refusal))
    lock = KernelLock(str(tmp_path / "lock"))
    assert lock.try_acquire()
    lock.release()
    assert not (tmp_path / "lock").exists()
