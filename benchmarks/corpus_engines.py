"""Seconds to tokenize the splits of a corpus with deepcloze's engines and with datatrove's executors.

    python -m benchmarks.corpus_engines --source FOLDER --tokenizer DIR [--workers 2] [--rounds 3]

All run the same function, `tokenize_split`, for the same splits, and its pieces and records are the same: deepcloze's
engines `local` and `ray`, and datatrove's `LocalPipelineExecutor` and `RayPipelineExecutor`. Then all run tasks that
return at once, which shows what a task costs. Each runs in a process of its own, and the time includes the start of its
workers; they alternate. Ray's cluster, on this machine, is started before.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fire
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import describe_machine, run_module, spread
from pretrain.corpus.build import build_job
from pretrain.corpus.build_plan import plan_build
from pretrain.corpus.engines import open_engine
from pretrain.corpus.options import CorpusOptions
from pretrain.corpus.passes import split_tasks
from pretrain.corpus.records import SplitTask, open_partial
from pretrain.corpus.tasks import BuildJob, tokenize_split

_CONTESTANTS = ("deepcloze, local", "datatrove, local", "deepcloze, ray", "datatrove, ray")


def corpus_engines(source: str, tokenizer: str, workers: int = 0, rounds: int = 3, empty_tasks: int = 50) -> None:
    """Measure and print a table.

    Args:
        source: folder of text files, several for each worker
        tokenizer: Hugging Face folder
        workers: of each contestant; 0: all cores
        rounds: how often each contestant runs
        empty_tasks: number of the tasks that return at once
    """
    import ray

    workers = workers or len(os.sched_getaffinity(0))
    print(describe_machine())
    cluster = ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
    seconds: dict[str, dict[str, list[float]]] = {name: {"splits": [], "empty": []} for name in _CONTESTANTS}
    for _ in range(rounds):
        for name, found in seconds.items():
            settings = {
                "contestant": name,
                "source": source,
                "tokenizer": tokenizer,
                "workers": workers,
                "empty_tasks": empty_tasks,
                "ray_address": cluster.address_info["gcs_address"],
            }
            for kind, value in run_module("benchmarks.corpus_engines", settings).items():
                found[kind].append(value)
    ray.shutdown()
    table = Table(f"{workers} workers", "tokenization, s", f"{empty_tasks:,} empty tasks, s")
    for name, found in seconds.items():
        table.add_row(name, spread(found["splits"], ".1f"), spread(found["empty"], ".2f"))
    Console().print(table)


@dataclass(frozen=True)
class _Tokenize:
    """A step of datatrove's pipelines: tokenizes one split."""

    job: BuildJob
    tasks: Sequence[SplitTask]

    def __call__(self, _data: Any, rank: int, _world_size: int) -> None:
        tokenize_split(self.job, self.tasks[rank])


def _nothing(*_: Any) -> None:
    pass


def run_contestant(
    contestant: str, source: str, tokenizer: str, workers: int, empty_tasks: int, ray_address: str
) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="deepcloze-engines-") as scratch:
        plan = plan_build(CorpusOptions(source=source, tokenizer=tokenizer, output=Path(scratch) / "corpus"))
        open_partial(plan.partial, plan.arguments)
        job, tasks = build_job(plan), split_tasks(plan, {})
        owner, engine = contestant.split(", ")
        if owner == "deepcloze":
            start = time.monotonic()
            with open_engine(workers, job, engine, ray_address) as run:
                for _ in run(tokenize_split, tasks):
                    pass
            splits = time.monotonic() - start
            start = time.monotonic()
            with open_engine(workers, None, engine, ray_address) as run:
                for _ in run(_nothing, range(empty_tasks)):
                    pass
            return {"splits": splits, "empty": time.monotonic() - start}
        start = time.monotonic()
        _datatrove(engine, _Tokenize(job, tasks), len(tasks), workers, f"{scratch}/splits", ray_address)
        splits = time.monotonic() - start
        start = time.monotonic()
        _datatrove(engine, _nothing, empty_tasks, workers, f"{scratch}/empty", ray_address)
        return {"splits": splits, "empty": time.monotonic() - start}


def _datatrove(engine: str, step: Any, tasks: int, workers: int, folder: str, ray_address: str) -> None:
    import ray
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor

    if engine == "local":
        LocalPipelineExecutor([step], tasks=tasks, workers=workers, logging_dir=folder).run()
        return
    ray.init(address=ray_address, log_to_driver=False)
    RayPipelineExecutor([step], tasks=tasks, workers=workers, logging_dir=folder, mem_per_cpu_gb=0.5).run()
    ray.shutdown()


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        from benchmarks import corpus_engines as importable  # workers cannot import what __main__ defines

        print(json.dumps(importable.run_contestant(**json.loads(sys.argv[1]))))
    else:
        fire.Fire(corpus_engines)
