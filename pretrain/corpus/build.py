"""`deepcloze corpus`: build a corpus folder of Arrow shards from raw text.

1. The sources are divided into splits, which depend on the files alone.
2. Tasks read, hash and tokenize a split each, and write its pieces and a record to `DIR.partial/`.
3. Tasks join pieces that follow one another to shards.
4. When everything is written and synced, the folder is renamed to `DIR`.

A build that was killed is resumed from the records. The bytes of a corpus depend on the files, the tokenizer and the
sampling only, not on workers, machines, time, paths or interruptions.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase

from experiment.decontamination import CleanSummary
from experiment.errors import UserError, notify, readable_disk_errors
from experiment.files import fsync, names_in
from experiment.formatting import counted
from experiment.output_folder import holds_result, lock_output
from pretrain.corpus import shards, tasks
from pretrain.corpus.announcement import announce_sources
from pretrain.corpus.build_plan import HELDOUT, MAIN, BuildPlan, Part, plan_build
from pretrain.corpus.documents import check_read
from pretrain.corpus.formats import Members
from pretrain.corpus.manifest import MANIFEST, TOKENIZER, Manifest, percentiles, read_manifest, write_manifest
from pretrain.corpus.options import CorpusOptions
from pretrain.corpus.origins import read_cleanings, source_shares, write_cleanings
from pretrain.corpus.passes import count_documents, join_digests, scan_source, split_tasks, tokenize
from pretrain.corpus.records import (
    ShardRecord,
    ShardTask,
    SplitCount,
    SplitRecord,
    forget_other_shards,
    forget_other_splits,
    forget_split_of,
    holds_work,
    open_partial,
)
from pretrain.corpus.shards import compose_shards, write_datasets_metadata
from pretrain.corpus.source_digest import SourceDigest
from pretrain.corpus.task_runners import TaskRunner, open_task_runner
from pretrain.corpus.tasks import BuildJob, write_shard_file
from pretrain.corpus.tokenization import most_frequent

_NAMED = 10  # sources in a message
_FEW_UNKNOWN = 1e-4  # share of the tokens up to which unknown texts are not named


def build_corpus(options: CorpusOptions) -> Manifest:
    """Build the corpus `options.output` (and, with `holdout`, `output`-heldout) and return its manifest.

    An existing corpus with the same documents and tokenizer is kept as it is. Raises UserError for bad input, naming
    file and line, for an output folder that holds something else, and for a full disk; StoppedError if a worker is
    killed. Finished shards are kept, and the same call resumes from them.
    """
    plan = plan_build(options)
    with _open_build(plan) as run_tasks:
        manifests = _check_existing(plan, run_tasks) if holds_corpus(plan.folder) else _build(plan, run_tasks)
    _print_summaries(plan, manifests)
    return manifests[MAIN]


def complete_corpus(plan: BuildPlan) -> None:
    """Build and publish the rest of a corpus, unless another process has done so. Raises LockedError if one is
    doing so, and as `build_corpus`."""
    with _open_build(plan) as run_tasks:
        manifests = {} if holds_corpus(plan.folder) else _build(plan, run_tasks)
    _print_summaries(plan, manifests)


@contextmanager
def _open_build(plan: BuildPlan) -> Iterator[TaskRunner]:
    options, advice = plan.options, "; the same command resumes from what is finished"
    with (
        readable_disk_errors(f"--output {plan.folder}: ", advice),
        lock_output(plan.folder, "--output"),
        open_task_runner(options.workers, build_job(plan), options.engine, options.ray_address) as run_tasks,
    ):
        yield run_tasks


def _print_summaries(plan: BuildPlan, manifests: Mapping[Part, Manifest]) -> None:
    for part, manifest in manifests.items():
        print(summary(plan.folder_of(part), manifest))
        for line in manifest.unknown_warnings(plan.folder_of(part)):
            notify(f"warning: {line}")
    unknown = "".join(text for manifest in manifests.values() for text in manifest.unknown_texts)
    if not {*ascii_uppercase}.isdisjoint(unknown) and plan.tokenizer.spec.loses_capitals:
        notify(
            f"warning: --tokenizer {plan.options.tokenizer} keeps capital letters, but its vocabulary has none, so "
            "words with capitals are unknown tokens; lowercase the text, or use a tokenizer that does"
        )


def build_job(plan: BuildPlan) -> BuildJob:
    """Return the settings that all tasks of a build share."""
    return BuildJob(plan.partial, plan.options, plan.tokenizer.spec, shards.SHARD_TOKENS, tasks.BATCH_BYTES)


def _build(plan: BuildPlan, run_tasks: TaskRunner) -> dict[Part, Manifest]:
    """Build all parts and publish them. However this ends, finished splits are kept."""
    announce_sources(plan.sources, plan.options)
    manifests = dict[Part, Manifest]()
    if HELDOUT in plan.sampling.parts and holds_corpus(plan.folder_of(HELDOUT)):  # an earlier build published only it
        manifests[HELDOUT] = read_manifest(plan.folder_of(HELDOUT))
        _check_same_recipe(plan, manifests, None)
    try:
        open_partial(plan.partial, plan.arguments, plan.splits)
        # Without a version, a file may have changed since a split was finished. Tasks of an array share such splits.
        is_array = plan.options.engine == "slurm"
        kept = [split for split in plan.splits if is_array or all(span.source.version for span in split.spans)]
        forget_other_splits(plan.partial, kept)
        counts = count_documents(plan, run_tasks, plan.splits) if plan.sampling.enabled else {}
        if manifests:
            _check_same_recipe(plan, manifests, join_digests(counts[split.key].source for split in plan.splits))
        unpublished = [part for part in plan.sampling.parts if part not in manifests]
        manifests |= _write_parts(plan, run_tasks, unpublished, counts)
    except BaseException:
        if not holds_work(plan.partial):
            shutil.rmtree(plan.partial, ignore_errors=True)
        raise
    for part in reversed(unpublished):  # the main corpus last: if it exists, the build is complete
        (plan.partial / part).replace(plan.folder_of(part))
        fsync(plan.folder.parent)
    shutil.rmtree(plan.partial, ignore_errors=True)  # NFS keeps files that are open; the next call removes the rest
    return manifests


def _write_parts(
    plan: BuildPlan, run_tasks: TaskRunner, parts: Sequence[Part], counts: Mapping[str, SplitCount]
) -> dict[Part, Manifest]:
    """Tokenize the unfinished splits, and write the folders of these parts in the partial folder."""
    cleanings, decontaminated = read_cleanings(plan.sources)
    records, written = _write_shards(plan, run_tasks, parts, counts)
    manifests = {}
    for part in parts:
        finished = [record for record in written if record.part == part]
        manifests[part] = replace(_manifest(plan, part, records, finished), decontaminated=decontaminated)
        _write_metadata(plan, plan.partial / part, manifests[part], cleanings)
    return manifests


def _write_shards(
    plan: BuildPlan, run_tasks: TaskRunner, parts: Sequence[Part], counts: Mapping[str, SplitCount]
) -> tuple[list[SplitRecord], list[ShardRecord]]:
    """Tokenize the unfinished splits, and join the shards of these parts. Returns the records of all splits, in
    order, and of the shards, in the order of their files."""
    splits = split_tasks(plan, counts)
    while True:
        records = tokenize(plan, run_tasks, splits, counts)
        if plan.options.document_start is not None and not any(record.start_matches for record in records):
            shutil.rmtree(plan.partial, ignore_errors=True)  # the right pattern cannot resume this build
        check_records(plan, records)
        joins = shard_tasks(plan, records)
        if forget_other_shards(plan.partial, joins):
            continue
        written = list(run_tasks(write_shard_file, [task for task in joins if task.part in parts]))
        damaged = [result for result in written if isinstance(result, str)]
        if not damaged:
            finished = [result for result in written if isinstance(result, ShardRecord)]
            return records, sorted(finished, key=lambda record: record.shard.file)
        for file in damaged:
            notify(f"{plan.partial / file} is missing or damaged; tokenizing its text again")
            forget_split_of(plan.partial, file)


def check_records(plan: BuildPlan, records: Sequence[SplitRecord]) -> None:
    """Raise UserError if there is no document, or if `check_read` does."""
    archives: dict[str, Members] = {}
    for record in records:
        for name, members in record.archives.items():
            archives.setdefault(name, Members()).add(members)
    check_read(plan.sources, plan.options, sum(record.start_matches for record in records), archives)
    if not any(record.source.documents for record in records):
        names = ", ".join(source.name for source in plan.sources[:_NAMED])
        raise UserError(f"--source {names}: none of its documents gives a token")


def shard_tasks(plan: BuildPlan, records: Sequence[SplitRecord]) -> list[ShardTask]:
    """Return how to join the pieces of all splits, in order, to shards."""
    joins = []
    for part in plan.sampling.parts:
        groups = compose_shards((piece for record in records for piece in record.pieces[part]), shards.SHARD_TOKENS)
        names = (f"data-{index:05d}-of-{len(groups):05d}.arrow" for index in range(len(groups)))
        joins += [ShardTask(part, name, group) for name, group in zip(names, groups, strict=True)]
    return joins


def _manifest(plan: BuildPlan, part: Part, records: Sequence[SplitRecord], finished: Sequence[ShardRecord]) -> Manifest:
    lengths: Counter[int] = Counter()
    for shard in finished:
        lengths.update(dict(shard.lengths))
    unknown = Counter[str]()
    for record in records:
        unknown.update(record.unknown_texts)
    return Manifest(
        recipe=plan.recipe(part, str(join_digests(record.source for record in records))),
        vocabulary_size=plan.tokenizer.vocabulary_size,
        token_type=plan.tokenizer.spec.token_type,
        empty_documents=sum(record.empty_documents for record in records) if part == MAIN else 0,
        length_percentiles=percentiles(lengths.items()),
        shards=tuple(record.shard for record in finished),
        sources=source_shares(
            (split.spans[0].source, record.pieces[part]) for split, record in zip(plan.splits, records, strict=True)
        ),
        unknown_texts=most_frequent(unknown) if part == MAIN else {},
        unspaced_characters=sum(piece.unspaced for record in records for piece in record.pieces[part]),
    )


def _write_metadata(plan: BuildPlan, folder: Path, manifest: Manifest, cleanings: Sequence[CleanSummary]) -> None:
    """Write all files but the shards, and delete others: shards of an earlier version of the source, and temporary
    files of writers that were killed."""
    for name in {*names_in(folder)} - {TOKENIZER, *(shard.file for shard in manifest.shards)}:
        (folder / name).unlink()
    plan.tokenizer.save(folder / TOKENIZER)
    write_cleanings(folder, cleanings)
    write_datasets_metadata(folder, manifest)
    write_manifest(folder, manifest)
    fsync(folder)


def holds_corpus(folder: Path) -> bool:
    """Return whether the folder holds a corpus; False if it is missing or empty. Raises UserError for anything else."""
    return holds_result(folder, MANIFEST, "--output", "a corpus")


def existing_manifests(plan: BuildPlan) -> dict[Part, Manifest]:
    """Return the manifests of an existing corpus. Raises UserError for another recipe; reads no documents."""
    manifests = dict[Part, Manifest]()
    for part in plan.sampling.parts:  # the main corpus first: another one may have no held-out corpus
        manifests[part] = read_manifest(plan.folder_of(part))
        _check_same_recipe(plan, manifests, None)
    return manifests


def _check_existing(plan: BuildPlan, run_tasks: TaskRunner) -> dict[Part, Manifest]:
    """Return the manifests of an existing corpus. Raises UserError if it differs from the one that would be built."""
    manifests = existing_manifests(plan)  # first, because reading the source may take long
    _check_same_recipe(plan, manifests, scan_source(plan, run_tasks))
    print(f"{plan.folder} already exists, built from the same documents with the same tokenizer")
    cleanings, decontaminated = read_cleanings(plan.sources)
    for part, manifest in manifests.items():
        folder = plan.folder_of(part)
        is_new = decontaminated not in (None, manifest.decontaminated)  # cleaned again, with the same result
        if is_new and os.access(folder, os.W_OK):
            manifests[part] = replace(manifest, decontaminated=decontaminated)
            write_cleanings(folder, cleanings)
            write_manifest(folder, manifests[part])
            print(f"{folder}: recorded what its documents are decontaminated against now")
    shutil.rmtree(plan.partial, ignore_errors=True)  # killed after the last rename
    return manifests


def _check_same_recipe(plan: BuildPlan, manifests: dict[Part, Manifest], source: SourceDigest | None) -> None:
    """Raise UserError for a corpus with another recipe. `source`: of all documents; None: not compared."""
    for part, manifest in manifests.items():
        found = manifest.recipe
        expected = plan.recipe(part, found.source if source is None else str(source))
        for name in ("tokenizer", "segmenter", "part", "limit", "holdout", "seed", "source"):
            if getattr(found, name) != getattr(expected, name):
                difference = "other documents" if name == "source" else f"another {name}: {getattr(found, name)}"
                raise UserError(
                    f"--output: {plan.folder_of(part)} already holds another corpus ({difference}); "
                    "name a new folder or delete it"
                )


def summary(folder: Path, manifest: Manifest) -> str:
    """Describe a corpus in a few lines."""
    lengths = ", ".join(f"{percentile} %: {length:,}" for percentile, length in manifest.length_percentiles.items())
    shares = [f"{source.name} {source.tokens / manifest.tokens:.1%}" for source in manifest.sources[:_NAMED]]
    if len(manifest.sources) > _NAMED:
        shares.append(f"and {len(manifest.sources) - _NAMED:,} more")
    return (
        f"{folder}\n"
        f"  {counted(manifest.documents, 'document')} ({counted(manifest.empty_documents, 'empty one')} dropped), "
        f"{manifest.tokens:,} tokens in {counted(len(manifest.shards), 'shard')}\n"
        + (f"  sources, share of the tokens: {', '.join(shares)}\n" if shares else "")
        + f"  {_describe_unknown(manifest)}, {_describe_words(manifest)}\n"
        f"  document lengths in tokens: {lengths}"
    )


def _describe_unknown(manifest: Manifest) -> str:
    rate, texts = manifest.unknown_token_rate, map(repr, manifest.unknown_texts)
    named = f" (in a sample, most often {', '.join(texts)})" if manifest.unknown_texts and rate > _FEW_UNKNOWN else ""
    return f"{rate:.3%} unknown tokens{named}"


def _describe_words(manifest: Manifest) -> str:
    if manifest.lacks_words:
        causes = "either the tokenizer does not fit, or some text has no spaces (Chinese: --segmenter jieba)"
        return f"{manifest.tokens_per_word:.2f} tokens between spaces: {causes}"
    return f"{manifest.tokens_per_word:.2f} tokens per word"
