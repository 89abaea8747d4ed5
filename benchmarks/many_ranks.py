"""What grows with the number of ranks, measured with light processes in place of ranks, on one machine without GPUs.

    python -m benchmarks.many_ranks agreement --ranks 8,16,32,64
    python -m benchmarks.many_ranks heartbeats --ranks 64,1024 [--folder DIR]
    python -m benchmarks.many_ranks checkpoint --ranks 64,1024 [--folder DIR]

- agreement: the sums of a step over gloo: processor time, sockets and the time to connect, with connections to all
  ranks and with connections on first use
- heartbeats: one round of all ranks' heartbeats, and one check of them by the launcher
- checkpoint: what rank 0 does alone, when the shares of all ranks are on disk

More processes than cores wait for each other, so processor time is what counts; it does not include the network.
"""

import datetime
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import fire
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from benchmarks.measuring import describe_machine
from experiment.models.tensor_files import save_tensors
from experiment.run_files.heartbeat import Heartbeat, write_heartbeat
from experiment.run_files.run_folder import RunFolder
from launcher.supervision.hang_watch import HangWatch
from pretrain.training.checkpoint_tensors import MASTER, Share, WrittenShare, complete_checkpoint, write_share
from pretrain.training.cpu_group import CpuGroup

_NUMBERS = 12  # of a step, or a few more
_SUMS = 10
_LIMIT = datetime.timedelta(minutes=10)
_PARAMETERS = 125_000_000  # 500 MB of weights


def agreement(*, ranks: Sequence[int] = (8, 16, 32, 64)) -> None:
    """Sum the numbers of a step over so many processes."""
    torch.set_num_threads(1)
    for count in _listed(ranks):
        for on_use in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                # Raises the exception of the first process that fails, and ends the others.
                arguments = count, on_use, f"{folder}/store"
                start_processes(_sum, arguments, nprocs=count, start_method="fork")  # type: ignore[no-untyped-call]
    print(describe_machine())


def _sum(rank: int, count: int, on_use: bool, store: str) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.environ["TORCH_GLOO_LAZY_INIT"] = str(int(on_use))
    start = time.perf_counter(), time.process_time()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=_LIMIT)
    group = CpuGroup(_LIMIT)
    group.all_reduce_sum([0] * _NUMBERS)
    connected, connecting = time.perf_counter() - start[0], time.process_time() - start[1]
    before = time.process_time()
    for _ in range(_SUMS):
        group.all_reduce_sum([rank] * _NUMBERS)
    summing = (time.process_time() - before) / _SUMS
    group.all_gather_objects("")
    group.first_message(None)
    group.barrier()
    everything = torch.tensor([connecting, summing, _sockets()], dtype=torch.float64)
    dist.all_reduce(everything)
    if rank == 0:
        all_connecting, all_summing, sockets = everything.tolist()
        print(
            f"{count} ranks, connected {'on first use' if on_use else 'to all'}: {connected:.1f} s to connect "
            f"({1000 * all_connecting / count:.0f} ms of processor time a rank), {1000 * all_summing:.1f} ms of "
            f"processor time of all ranks for a sum, {sockets / count:.0f} sockets a rank",
            flush=True,
        )


def _sockets() -> int:
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # that of this listing
            found += entry.readlink().name.startswith("socket")
    return found


def heartbeats(*, ranks: Sequence[int] = (64, 1024), folder: str | None = None) -> None:
    """Write and read the heartbeats of so many ranks."""
    for count in _listed(ranks):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            run = RunFolder(Path(scratch))
            run.logs.mkdir()
            watch = HangWatch(run, count, 600.0, lambda _: None, lambda: None)
            beats = [Heartbeat(rank, "node-127", 123_456, 1, 1000, "training", True, 0.0) for rank in range(count)]
            write = partial(_write_heartbeats, run, beats)
            write()  # creates the files
            watch.is_settled()  # the first look also asks for the size of each log
            writing, looking = 1000 * _timed(write), 1000 * _timed(watch.is_settled)
            print(f"{count} ranks: {writing:.1f} ms to write all heartbeats, {looking:.1f} ms to look at them")
    print(describe_machine())


def _write_heartbeats(run: RunFolder, beats: Sequence[Heartbeat]) -> None:
    for beat in beats:
        write_heartbeat(run, beat)


def checkpoint(*, ranks: Sequence[int] = (64, 1024), folder: str | None = None) -> None:
    """Complete a checkpoint of 125 M parameters that so many ranks have written."""
    torch.set_num_threads(1)
    for count in _listed(ranks):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            unfinished = Path(scratch) / "partial"
            shares = [write_share(_share(rank, count), unfinished) for rank in range(count)]
            seconds = _timed(partial(_complete, unfinished, shares))
            print(f"{count} ranks: {seconds:.2f} s for rank 0 to complete {_PARAMETERS / 1e6:.0f} M parameters")
    print(describe_machine())


def _share(rank: int, count: int) -> Share:
    """Return the masters of one flat parameter, cut into equal parts; their moments are not read by rank 0."""
    size = _PARAMETERS // count
    numel = size if rank < count - 1 else _PARAMETERS - size * rank
    fragment = {"file": f"rank-{rank:05d}.safetensors", "start": size * rank, "numel": numel}
    index = {"weight": {"shape": [_PARAMETERS], "kinds": {MASTER: True}, "fragments": [fragment]}}
    return Share(rank, {f"weight@{size * rank}/{MASTER}": torch.ones(numel)}, index)


def _complete(checkpoint: Path, shares: list[WrittenShare]) -> None:
    def write(weights: dict[str, torch.Tensor], target: Path) -> None:
        target.mkdir()
        save_tensors(weights, target / "model.safetensors")

    complete_checkpoint(checkpoint, shares, {}, write)


def _timed(function: Callable[[], Any]) -> float:
    """Return seconds of processor time."""
    start = time.process_time()
    function()
    return time.process_time() - start


def _listed(ranks: Sequence[int] | int) -> Sequence[int]:
    return [ranks] if isinstance(ranks, int) else ranks


if __name__ == "__main__":
    fire.Fire({"agreement": agreement, "heartbeats": heartbeats, "checkpoint": checkpoint})
