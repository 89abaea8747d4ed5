from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from experiment.files import call_after_syncs, fsync_tree, write_text
from experiment.models.tensor_files import save_tensors
from pretrain.training.background_save import ThreadWork


def test_a_thread_that_waits_for_a_disk_does_not_work() -> None:
    """Catches a dead disk that counts as a slow one: a thread that waits for it may still wake up now and then."""
    used = 5.0
    work = ThreadWork(lambda: used)
    found = []
    for more in (0.0, 0.0001, 0.0009, 0.02, 0.0, 0.0002, 0.001):
        used += more
        found.append(work.has_worked())
    assert found == [False, False, False, True, False, False, True]


def test_a_thread_that_syncs_small_files_works(tmp_path: Path) -> None:
    """Catches a slow disk that counts as a dead one while small files are written, which takes no processor time."""
    with ThreadPoolExecutor(1) as pool:
        work = ThreadWork(lambda: 5.0)
        pool.submit(call_after_syncs, work.count_sync).result()
        found = [work.has_worked()]
        for write in (
            lambda: write_text(tmp_path / "small", "text"),
            lambda: fsync_tree(tmp_path),
            lambda: save_tensors({"weight": torch.zeros(2)}, tmp_path / "tensors"),
        ):
            pool.submit(write).result()
            found += [work.has_worked(), work.has_worked()]
    write_text(tmp_path / "other", "by another thread, such as that of a tracker")
    assert [*found, work.has_worked()] == [False, True, False, True, False, True, False, False]
