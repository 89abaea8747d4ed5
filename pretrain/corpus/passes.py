"""The passes of a build over its text: count the documents, then tokenize them. Each resumes from its records."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from pretrain.corpus.build_plan import BuildPlan
from pretrain.corpus.documents import reading_progress
from pretrain.corpus.records import SplitCount, SplitRecord, SplitTask, read_counts, read_finished, write_count
from pretrain.corpus.source_digest import SourceDigest
from pretrain.corpus.sources import changed_source
from pretrain.corpus.splits import Split
from pretrain.corpus.task_runners import TaskRunner
from pretrain.corpus.tasks import count_split, tokenize_split

R = TypeVar("R", SplitCount, SplitRecord)


def scan_source(plan: BuildPlan, run_tasks: TaskRunner) -> SourceDigest:
    """Read the whole source without tokenizing it, and return its digest. Records nothing."""
    counts = _with_progress("comparing", run_tasks(count_split, plan.splits), plan.splits)
    sources = {count.key: count.source for count in counts}
    return join_digests(sources[split.key] for split in plan.splits)


def count_documents(plan: BuildPlan, run_tasks: TaskRunner, splits: Sequence[Split]) -> dict[str, SplitCount]:
    """Count the documents of splits. Returns the counts by key."""
    counts = read_counts(plan.partial, [split.key for split in splits])
    todo = [split for split in splits if split.key not in counts]
    for count in _with_progress("counting", run_tasks(count_split, todo), todo):
        write_count(plan.partial, count)
        counts[count.key] = count
    return counts


def split_tasks(plan: BuildPlan, counts: Mapping[str, SplitCount]) -> list[SplitTask]:
    """Assign the documents of all splits to parts. `counts`: of all splits; not needed if nothing is sampled."""
    documents = [counts[split.key].source.documents if counts else 0 for split in plan.splits]
    return list(map(SplitTask, plan.splits, plan.sampling.parts_of(documents)))


def tokenize(
    plan: BuildPlan, run_tasks: TaskRunner, tasks: Sequence[SplitTask], counts: Mapping[str, SplitCount]
) -> list[SplitRecord]:
    """Tokenize splits, those that are finished excepted, and return the records of all.

    Raises UserError for a source that differs from the one that was counted.
    """
    records = read_finished(plan.partial, tasks)
    todo = [task for task in tasks if task.split.key not in records]
    for record in _with_progress("tokenizing", run_tasks(tokenize_split, todo), [task.split for task in todo]):
        records[record.key] = record
    for task in tasks:
        split = task.split
        if counts and records[split.key].source != counts[split.key].source:
            raise changed_source(split.spans[0].source.name)
    return [records[task.split.key] for task in tasks]


def join_digests(digests: Iterable[SourceDigest]) -> SourceDigest:
    """Return the digest of all documents, from the digests of all splits in order."""
    joined = SourceDigest()
    for digest in digests:
        joined.extend(digest)
    return joined


def _with_progress(label: str, results: Iterator[R], splits: Sequence[Split]) -> Iterator[R]:
    sizes = {split.key: split.bytes for split in splits}
    with reading_progress(label, sum(sizes.values()) or None) as advance:
        for result in results:
            advance(sizes[result.key], result.source.documents, result.text_bytes)
            yield result
