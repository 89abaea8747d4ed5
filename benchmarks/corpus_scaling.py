"""How fast `deepcloze corpus` is with several workers, and, by simulation, with many machines.

    python -m benchmarks.corpus_scaling --source FILE --tokenizer DIR [--workers 2,4] [--rounds 3]

Builds the corpus with one worker and with several, in turn. Then it times each task of a build in this process, and how
long the main process is busy with a result of a stand-in for a task, and simulates machines that build larger corpora
at these speeds: with the real plan of splits, one queue of tasks for all cores (`--engine ray`) or for each machine
(`slurm`), and durations that vary by a fifth. Disks and networks are not simulated: they are assumed to be fast enough.
"""

import heapq
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import fire
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import describe_machine
from experiment.files import sha256
from pretrain.corpus import build, passes
from pretrain.corpus.build import build_corpus
from pretrain.corpus.engines import open_engine
from pretrain.corpus.options import CorpusOptions, TextOptions
from pretrain.corpus.shards import SHARD_TOKENS
from pretrain.corpus.sources import Source
from pretrain.corpus.splits import plan_splits

_VARIATION = 0.2  # standard deviation of the logarithm of a task's duration
_START_SECONDS = 3.0  # of a worker process
_STAND_INS = 4000


class Speeds(NamedTuple):
    tokenizing: float  # bytes of text per second and core
    joining: float  # the same
    hashing: float  # the same
    tokens_per_byte: float
    handling: float  # seconds of the main process per task


def corpus_scaling(
    source: str,
    tokenizer: str,
    workers: Sequence[int] | int = (2, 4),
    rounds: int = 3,
    machines: int = 16,
    cores: int = 64,
) -> None:
    """Measure, simulate and print both.

    Args:
        source: text file, one document per line
        tokenizer: Hugging Face folder
        workers: numbers to compare with one; comma-separated
        rounds: how often each number runs
        machines: that are simulated
        cores: of each of them
    """
    print(describe_machine())
    numbers = [1, *([workers] if isinstance(workers, int) else workers)]
    Console().print(_measured(source, tokenizer, numbers, rounds))
    speeds = _speeds(source, tokenizer)
    print(
        f"a core tokenizes {speeds.tokenizing / 1e6:.1f} MB/s and joins shards of {speeds.joining / 1e6:.0f} MB/s of "
        f"text, and hashes {speeds.hashing / 1e6:,.0f} MB/s; "
        f"the main process needs {speeds.handling * 1e3:.2f} ms per task"
    )
    Console().print(_simulated(speeds, machines, cores))


def _measured(source: str, tokenizer: str, numbers: Sequence[int], rounds: int) -> Table:
    seconds: dict[int, list[float]] = {number: [] for number in numbers}
    with tempfile.TemporaryDirectory(prefix="deepcloze-corpus-") as folder:
        for turn in range(rounds):
            for number in numbers:
                command = [sys.executable, "-m", "launcher", "corpus", f"--source={source}", f"--tokenizer={tokenizer}"]
                start = time.monotonic()
                output = f"--output={folder}/{turn}-{number}"
                subprocess.run([*command, output, f"--workers={number}"], check=True, stdout=subprocess.DEVNULL)
                seconds[number].append(time.monotonic() - start)
    table = Table("workers", "seconds", "speed-up, median of rounds")
    for number, found in seconds.items():
        ratio = median(one / other for one, other in zip(seconds[1], found, strict=True))
        table.add_row(str(number), f"{median(found):.1f}", f"{ratio:.2f}")
    return table


def _speeds(source: str, tokenizer: str) -> Speeds:
    with tempfile.TemporaryDirectory(prefix="deepcloze-corpus-") as folder:
        options = CorpusOptions(source=source, tokenizer=tokenizer, output=Path(folder) / "corpus", workers=1)
        with _timed(passes, "tokenize_split") as tokenizing, _timed(build, "write_shard_file") as joining:
            manifest = build_corpus(options)
        start = time.process_time()
        for shard in manifest.shards:
            sha256(Path(folder) / "corpus" / shard.file)
        hashing = time.process_time() - start
    text = manifest.text_bytes
    with open_engine(2, None) as run:
        list(run(_stand_in, range(100)))  # starts the workers
        start = time.process_time()
        list(run(_stand_in, range(_STAND_INS)))
        handling = (time.process_time() - start) / _STAND_INS
    return Speeds(text / sum(tokenizing), text / sum(joining), text / hashing, manifest.tokens / text, handling)


def _stand_in(job: object, task: int) -> dict[str, Any]:
    """Returns about as much as a split: its record."""
    return {"key": f"{task:032x}", "pieces": [{"file": f"{task:032x}-main-000.arrow", "rows": task, "tokens": task}]}


@contextmanager
def _timed(module: Any, name: str) -> Iterator[list[float]]:
    """The CPU seconds of each call of a function of a module."""
    function: Callable[..., Any] = getattr(module, name)
    found: list[float] = []

    def timed(*arguments: Any) -> Any:
        start = time.process_time()
        try:
            return function(*arguments)
        finally:
            found.append(time.process_time() - start)

    with mock.patch.object(module, name, timed):
        yield found


def _simulated(speeds: Speeds, machines: int, cores: int) -> Table:
    table = Table("source", "splits", "planned in", "engine", "minutes", f"speed of {machines * cores:,} cores")
    for files, size in ((1_000, 1 << 30), (10_000, 1 << 30), (1_000_000, 1 << 22)):
        sources = [Source("file", f"{number:07}.jsonl", "", size, "1") for number in range(files)]
        start = time.monotonic()
        splits = plan_splits(sources, TextOptions())
        planning = time.monotonic() - start
        work = [split.bytes / speeds.tokenizing for split in splits]
        tokens = files * size * speeds.tokens_per_byte
        joins = [files * size / speeds.joining * SHARD_TOKENS / tokens] * round(tokens / SHARD_TOKENS)
        ideal = (sum(work) + sum(joins)) / (machines * cores)
        for engine, shares in (("ray", 1), ("slurm", machines)):
            total = planning + _START_SECONDS
            for tasks in (work, joins):
                ends = (_finish(tasks[n::shares], machines * cores // shares, speeds.handling) for n in range(shares))
                total += max(ends)
            if engine == "slurm":  # the task that publishes the corpus compares all shards with their checksums
                total += files * size / speeds.hashing / cores
            name, share = f"{files:,} files of {size / 1e6:,.0f} MB", f"{ideal / total:.1%}"
            table.add_row(name, f"{len(splits):,}", f"{planning:.1f} s", engine, f"{total / 60:.1f}", share)
    return table


def _finish(durations: Sequence[float], cores: int, handling: float) -> float:
    """When the last of some tasks ends. A task starts when a core is free and the main process has submitted it: two
    per core at first, then one for each result."""
    generator = random.Random(0)
    varied = [seconds * generator.lognormvariate(0.0, _VARIATION) for seconds in durations]
    submitted = [number * handling for number in range(min(len(varied), 2 * cores))]
    free, results, busy, last = [0.0] * min(cores, len(varied)), list[float](), len(submitted) * handling, 0.0
    for number, seconds in enumerate(varied):
        while number >= len(submitted):
            busy = max(busy, heapq.heappop(results)) + handling
            submitted.append(busy)
        end = max(heapq.heappop(free), submitted[number]) + seconds
        heapq.heappush(free, end)
        heapq.heappush(results, end)
        last = max(last, end)
    return last


if __name__ == "__main__":
    from benchmarks import corpus_scaling as module  # workers find the stand-in there, and not in __main__

    fire.Fire(module.corpus_scaling)
