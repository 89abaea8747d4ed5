"""`deepcloze corpus --engine slurm`: the share of one task of a SLURM job array."""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from experiment.errors import UserError, readable_disk_errors
from experiment.files import created_parents
from experiment.output_folder import LockedError
from pretrain.corpus.build import (
    build_job,
    check_records,
    complete_corpus,
    existing_manifests,
    holds_corpus,
    shard_tasks,
)
from pretrain.corpus.build_plan import BuildPlan, plan_build
from pretrain.corpus.options import CorpusOptions
from pretrain.corpus.passes import count_documents, split_tasks, tokenize
from pretrain.corpus.records import SplitRecord, SplitTask, open_partial, read_counts, read_finished
from pretrain.corpus.task_runners import TaskRunner, open_task_runner
from pretrain.corpus.tasks import write_shard_file

T = TypeVar("T")

_PREFIX = "SLURM_ARRAY_TASK_"
_PATIENCE = 60.0  # seconds in which the other tasks finish nothing, after which a task does not wait for them
_POLL_SECONDS = 2.0


def build_share(options: CorpusOptions) -> None:
    """Tokenize every N-th split, N being the number of tasks in the array, and then join every N-th shard. When
    the others have done so too, or have ended, one task joins the rest and publishes the corpus.

    If documents are sampled, all must be counted first: one array counts them, the same one submitted again tokenizes
    them. Raises UserError outside a job array, and as `build_corpus`.
    """
    index, tasks = array_share(os.environ)
    plan = plan_build(options)
    if holds_corpus(plan.folder):
        existing_manifests(plan)
        print(f"{plan.folder} already exists")
        return
    advice = "; submit the same array again to resume from what is finished"
    is_last = False
    try:
        with readable_disk_errors(f"--output {plan.folder}: ", advice), created_parents(plan.folder):
            open_partial(plan.partial, plan.arguments, plan.splits)
            with open_task_runner(plan.options.workers, build_job(plan)) as run_tasks:
                is_last = _build_share(plan, run_tasks, slice(index, None, tasks))
    except UserError:
        if not holds_corpus(plan.folder):  # otherwise another array has published it and deleted the partial folder
            raise
    if is_last:
        try:
            complete_corpus(plan)
        except LockedError:
            print(f"{plan.folder}: another task publishes the corpus")
    elif holds_corpus(plan.folder):
        shutil.rmtree(plan.partial, ignore_errors=True)  # which this task may have made again


def array_share(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return which task of the array this is, from 0, and how many there are. Raises UserError outside an array."""
    try:
        number, first, last, step, count = (
            int(environment[_PREFIX + name]) for name in ("ID", "MIN", "MAX", "STEP", "COUNT")
        )
    except (KeyError, ValueError):
        raise UserError(
            "--engine slurm: expected a task of a job array (SLURM_ARRAY_TASK_ID); start it with `sbatch --array=0-15`"
        ) from None
    if (last - first) // step + 1 != count:
        raise UserError(
            f"--engine slurm: expected an array without gaps, such as --array=0-15; found {count} tasks from {first} "
            f"to {last}"
        )
    return (number - first) // step, count


def _build_share(plan: BuildPlan, run_tasks: TaskRunner, share: slice) -> bool:
    """Count or tokenize a share of the splits, then join a share of the shards. Returns whether the corpus is to
    be published."""
    counts = {}
    if plan.sampling.enabled:
        count_documents(plan, run_tasks, plan.splits[share])
        counts = read_counts(plan.partial, [split.key for split in plan.splits])
        if len(counts) < len(plan.splits):
            print(
                f"{plan.partial}: {len(counts):,} of {len(plan.splits):,} splits are counted; when all tasks have "
                "ended, submit the same array again to tokenize them"
            )
            return False
    tasks = split_tasks(plan, counts)
    tokenize(plan, run_tasks, tasks[share], counts)
    records: dict[str, SplitRecord] = {}

    def unfinished(tasks: Sequence[SplitTask]) -> list[SplitTask]:
        # Each record is read once: while others join pieces, a listing may have neither a piece nor its shard.
        records.update(read_finished(plan.partial, tasks))
        return [task for task in tasks if task.split.key not in records]

    _wait_for_others(plan.folder, tasks, unfinished)
    if holds_corpus(plan.folder):
        return False
    print(f"{plan.partial}: {len(records):,} of {len(tasks):,} splits are finished")
    if len(records) < len(tasks):
        return False
    ordered = [records[task.split.key] for task in tasks]
    check_records(plan, ordered)  # no task completes such a corpus
    joins = shard_tasks(plan, ordered)
    with suppress(FileNotFoundError):  # pieces that a task with the same share has just joined, and deleted
        list(run_tasks(write_shard_file, joins[share]))
    _wait_for_others(
        plan.folder, joins, lambda left: [task for task in left if not (plan.partial / task.record).exists()]
    )
    return not holds_corpus(plan.folder)


def _wait_for_others(corpus: Path, tasks: Sequence[T], unfinished: Callable[[Sequence[T]], Sequence[T]]) -> None:
    """Wait until the array has finished these tasks or published the corpus, or nothing more has been finished for a
    while: its other tasks may not be running."""
    left, changed = unfinished(tasks), time.monotonic()
    while left and time.monotonic() - changed < _PATIENCE and not holds_corpus(corpus):
        time.sleep(_POLL_SECONDS)
        before = len(left)
        with suppress(FileNotFoundError):  # published, and the pieces deleted
            left = unfinished(left)
        if len(left) < before:
            changed = time.monotonic()
