"""`deepcloze corpus --engine slurm`: the share of one task of a SLURM job array."""

import os
from collections.abc import Mapping

from experiment.errors import UserError, disk_errors_as
from experiment.files import created_parents
from experiment.output_folder import LockedError
from pretrain.corpus.build import build_corpus, build_job, holds_corpus
from pretrain.corpus.build_plan import BuildPlan, plan_build
from pretrain.corpus.engines import Engine, open_engine
from pretrain.corpus.options import CorpusOptions
from pretrain.corpus.passes import count_documents, split_tasks, tokenize
from pretrain.corpus.records import open_partial, read_counts, read_finished

_PREFIX = "SLURM_ARRAY_TASK_"


def build_share(options: CorpusOptions) -> None:
    """Tokenize every N-th split, N being the number of tasks in the array. The task that finds all splits finished
    writes the corpus.

    If documents are sampled, all must be counted first: one array counts them, the same one submitted again tokenizes
    them. Raises UserError outside a job array, and as `build_corpus`.
    """
    index, tasks = array_share(os.environ)
    plan = plan_build(options)
    if holds_corpus(plan.folder):
        print(f"{plan.folder} already exists")
        return
    advice = "; submit the same array again to resume from what is finished"
    with disk_errors_as(UserError, f"--output {plan.folder}: ", advice), created_parents(plan.folder):
        open_partial(plan.partial, plan.arguments)
        with open_engine(plan.workers, build_job(plan)) as run:
            is_finished = _build_share(plan, run, slice(index, None, tasks))
    if is_finished:
        try:
            build_corpus(options)
        except LockedError:
            print(f"{plan.folder}: another task joins the shards")


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


def _build_share(plan: BuildPlan, run: Engine, share: slice) -> bool:
    """Count or tokenize a share of the splits. Returns whether all splits are finished."""
    counts = {}
    if plan.sampling.enabled:
        count_documents(plan, run, plan.splits[share])
        counts = read_counts(plan.partial, [split.key for split in plan.splits])
        if len(counts) < len(plan.splits):
            print(
                f"{plan.partial}: {len(counts):,} of {len(plan.splits):,} splits are counted; when all tasks have "
                "ended, submit the same array again to tokenize them"
            )
            return False
    tasks = split_tasks(plan, counts)
    tokenize(plan, run, tasks[share], counts)
    finished = len(read_finished(plan.partial, tasks))
    print(f"{plan.partial}: {finished:,} of {len(tasks):,} splits are finished")
    return finished == len(tasks)
