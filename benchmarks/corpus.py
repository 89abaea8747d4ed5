"""Seconds to build a corpus, compared with tokenization alone and with `datasets.map`.

    python -m benchmarks.corpus --source FILE --tokenizer DIR [--threads 2] [--rounds 3]

`deepcloze corpus` runs as a process and is timed from its start to its end. The others tokenize the same lines on as
many threads or processes, each in a process of its own: `encode_batch` and `encode_batch_fast` (without offsets) of
`tokenizers`, of which only the calls are timed, and `datasets.map` as `run_mlm` calls it, timed from the start of its
process and without it. They alternate. Peak memory is summed over all processes of a contestant, shared pages counted
once (PSS). Last, one process reads and hashes the source without tokenizing it, to find how many cores the reader can
feed.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measuring import PeakMemory, deepcloze, describe_machine, run_module, run_or_measure, spread
from experiment.formatting import print_table

_DEEPCLOZE, _RAW, _FAST, _MAP = "deepcloze corpus", "encode_batch", "encode_batch_fast", "datasets.map"
_BATCH = 1000  # documents, as in `datasets.map`

Runs = dict[str, list[dict[str, float]]]
"""Of each contestant: its figures, one entry per round."""


def corpus(source: str, tokenizer: str, threads: int = 0, rounds: int = 3) -> None:
    """Measure and print a table.

    Args:
        source: text file, one document per line
        tokenizer: Hugging Face folder with a tokenizer.json
        threads: of each contestant; 0: all cores
        rounds: how often each contestant runs
    """
    threads = threads or len(os.sched_getaffinity(0))
    print(describe_machine())
    runs: Runs = {name: [] for name in (_DEEPCLOZE, _RAW, _FAST, _MAP)}
    with tempfile.TemporaryDirectory(prefix="deepcloze-corpus-") as folder:
        for number in range(rounds):
            for name, found in runs.items():
                found.append(_run(name, source, tokenizer, threads, Path(folder) / f"{number}"))
        read = _run("read", source, tokenizer, threads, Path(folder) / "read")
    columns = ("process, s: median (min – max)", "tokenization, s", "peak memory, GB", "deepcloze is faster by")
    print_table(["", *columns], _rows(runs))
    megabytes = Path(source).stat().st_size / 1e6
    encoding = megabytes / statistics.median(run["encoding"] for run in runs[_FAST]) / threads
    reading = megabytes / read["encoding"]
    print(
        f"reading and hashing: {reading:.0f} MB/s; a core tokenizes {encoding:.1f} MB/s: feeds {reading / encoding:.0f}"
    )


def _run(name: str, source: str, tokenizer: str, threads: int, output: Path) -> dict[str, float]:
    """{"total": seconds of the process, "encoding": seconds of tokenization, "memory": peak bytes}"""
    flags = ("--quiet", "--source", source, "--tokenizer", tokenizer, "--output", str(output), f"--workers={threads}")
    settings = {"name": name, "source": source, "tokenizer": tokenizer, "threads": threads}
    # A cache of `datasets` would have the result of an earlier round.
    environment = {"RAYON_NUM_THREADS": str(threads), "HF_DATASETS_CACHE": str(output / name)}
    start = time.monotonic()
    with PeakMemory(seconds=0.5) as memory:
        if name == _DEEPCLOZE:
            deepcloze("corpus", *flags)
            encoding = None
        else:
            encoding = float(run_module("benchmarks.corpus", settings, environment=environment))
        seconds = time.monotonic() - start
    return {"total": seconds, "encoding": seconds if encoding is None else encoding, "memory": memory.bytes}


def _rows(runs: Runs) -> Iterator[list[str]]:
    ours = [run["total"] for run in runs[_DEEPCLOZE]]
    for name, found in runs.items():
        # Of `datasets.map` the whole process, as users start it; of the others tokenization alone.
        key = "total" if name in (_DEEPCLOZE, _MAP) else "encoding"
        ratio = (
            "" if name == _DEEPCLOZE else spread([run[key] / own for run, own in zip(found, ours, strict=True)], ".2f")
        )
        seconds = (spread([run[of] for run in found], ".2f") for of in ("total", "encoding"))
        yield [name, *seconds, f"{max(run['memory'] for run in found) / 1e9:.2f}", ratio]


def measure(name: str, source: str, tokenizer: str, threads: int) -> float:
    """Run one contestant in this process. Returns the seconds of its tokenization, or of reading."""
    return {_MAP: _map, "read": _read}.get(name, _encode)(name, source, tokenizer, threads)


def _encode(name: str, source: str, tokenizer: str, _threads: int) -> float:
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    raw.no_truncation()
    raw.no_padding()
    encode = raw.encode_batch if name == _RAW else raw.encode_batch_fast
    lines = Path(source).read_text(encoding="utf-8").split("\n")
    start = time.monotonic()
    for first in range(0, len(lines), _BATCH):
        encode(lines[first : first + _BATCH], add_special_tokens=False)
    return time.monotonic() - start


def _map(_name: str, source: str, tokenizer: str, threads: int) -> float:
    import datasets
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    lines = datasets.load_dataset("text", data_files=source, split="train")
    start = time.monotonic()
    lines.map(
        lambda batch: encode(batch["text"], return_special_tokens_mask=True),
        batched=True,
        num_proc=threads,
        remove_columns=["text"],
    )
    return time.monotonic() - start


def _read(_name: str, source: str, tokenizer: str, _threads: int) -> float:
    from pretrain.corpus.build import build_job
    from pretrain.corpus.build_plan import plan_build
    from pretrain.corpus.options import CorpusOptions
    from pretrain.corpus.passes import scan_source
    from pretrain.corpus.task_runners import open_task_runner

    plan = plan_build(CorpusOptions(source=source, tokenizer=str(tokenizer), output=Path("unused")))
    start = time.monotonic()
    with open_task_runner(1, build_job(plan)) as run:
        scan_source(plan, run)
    return time.monotonic() - start


if __name__ == "__main__":
    run_or_measure(corpus, measure)
