"""Time and memory of near-deduplication by `deepcloze clean`, for many short documents.

    python -m benchmarks.cleaning_memory [--documents 1000000] [--workers 2] [--folder DIR]

Documents of 30 to 90 random words, a tenth of them near-duplicates. Memory is the anonymous memory of all processes:
pages of files that are mapped are the disk's cache.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import yaml

from benchmarks.measuring import describe_machine

_VOCABULARY = 50_000
_COPIES = 0.1
_SECONDS = 0.2  # between samples


def write_documents(path: Path, documents: int) -> None:
    generator, recent = random.Random(0), list[list[str]]()
    with path.open("w") as file:
        for number in range(documents):
            if recent and generator.random() < _COPIES:
                words = [*generator.choice(recent)[:-2], "new", f"end{number}"]
            else:
                words = [f"w{generator.randrange(_VOCABULARY)}" for _ in range(generator.randint(30, 90))]
                recent = [*recent[-999:], words] if number % 100 == 0 else recent
            file.write(" ".join(words) + "\n")


def memory(process: psutil.Process) -> Iterator[int]:
    """Yield bytes of anonymous memory of a process and of all that it has started."""
    for each in (process, *process.children(recursive=True)):
        try:
            info = each.memory_info()
            yield info.rss - info.shared
        except psutil.Error:  # it has ended
            continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    print(describe_machine(), flush=True)  # before what the command prints
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        write_documents(folder / "in.txt", arguments.documents)
        config = {"source": str(folder / "in.txt"), "output": str(folder / "out"), "steps": [{"minhash": {}}]}
        (folder / "clean.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "launcher", "clean", f"--config={folder / 'clean.yaml'}"]
        started, main_peak, peak = time.monotonic(), 0, 0
        with subprocess.Popen([*command, f"--workers={arguments.workers}"]) as process:
            watched = psutil.Process(process.pid)
            while process.poll() is None:
                used = list(memory(watched))
                main_peak, peak = max(main_peak, *used[:1], 0), max(peak, sum(used))
                time.sleep(_SECONDS)
        if process.returncode:
            sys.exit(f"failed: {command}")
        disk = sum(path.stat().st_size for path in (folder / "out").glob("*"))
        size = (folder / "in.txt").stat().st_size
        print(f"{arguments.documents:,} documents, {size / 1e6:,.0f} MB, {arguments.workers} workers")
        print(f"{time.monotonic() - started:,.0f} s; result {disk / 1e6:,.0f} MB")
        print(f"memory: {peak / 1e6:,.0f} MB at most, of the main process {main_peak / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
