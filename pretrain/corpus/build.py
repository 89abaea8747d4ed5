"""`deepcloze corpus`: build a corpus folder of Arrow shards from raw text.

1. One process reads the documents in order and hashes them.
2. Worker processes turn batches of documents into token ids; results are taken in the order of the source.
3. A writer cuts the stream of documents into shards in `DIR.partial/` and records each finished one in a journal.
4. When everything is written and synced, the folder is renamed to `DIR`.

A killed build can be resumed: it reads the text again, but does not tokenize what is in finished shards. The bytes of a
corpus depend on the documents, the tokenizer and the sampling only, not on workers, time, paths or interruptions.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from filelock import FileLock, Timeout

from experiment.errors import UserError, disk_errors_as
from experiment.files import created_parents
from pretrain.corpus.build_plan import HELDOUT, MAIN, BuildPlan, Part, plan_build
from pretrain.corpus.documents import read_documents
from pretrain.corpus.formats import ReadStats, detect_format
from pretrain.corpus.manifest import MANIFEST, TOKENIZER, Manifest, read_manifest
from pretrain.corpus.options import CorpusOptions, TextOptions
from pretrain.corpus.pipeline import encode_source, scan_source
from pretrain.corpus.shards import ShardWriter, SourcePosition
from pretrain.corpus.sources import Source


def build_corpus(options: CorpusOptions) -> Manifest:
    """Build the corpus `options.output` (and, with `holdout`, `output`-heldout) and return its manifest.

    An existing corpus with the same documents and tokenizer is kept as it is. Raises UserError for bad input, naming
    file and line, for an output folder that holds something else, and for a full disk; StoppedError if a worker is
    killed. Finished shards are kept, and the same call resumes from them.
    """
    plan = plan_build(options)
    advice = "; the same command resumes from the finished shards"
    with disk_errors_as(UserError, f"--output {plan.folder}: ", advice), _build_lock(plan.folder):
        manifests = _check_existing(plan) if _holds_corpus(plan.folder) else _build(plan)
    for part, manifest in manifests.items():
        print(summary(plan.folder_of(part), manifest))
    return manifests[MAIN]


def _build(plan: BuildPlan) -> dict[Part, Manifest]:
    """Build all parts and publish them. However this ends, finished shards are kept."""
    announce_sources(plan.sources, plan.text_options)
    total = scan_source("counting", plan) if plan.sampling.enabled else None
    writers = _open_writers(plan, total)
    try:
        end, empty_documents = encode_source(plan, writers, total)
        manifests = {}
        for part, writer in writers.items():
            plan.tokenizer.save(writer.partial / TOKENIZER)
            manifests[part] = writer.finish(
                plan.recipe(part, end.digest),
                plan.tokenizer.vocabulary_size,
                empty_documents if part == MAIN else 0,
                end,
            )
    finally:
        for writer in writers.values():
            writer.remove_if_empty()
    for part in reversed(writers):  # the main corpus last: if it exists, the build is complete
        writers[part].publish(manifests[part])
    return manifests


def _open_writers(plan: BuildPlan, total: SourcePosition | None) -> dict[Part, ShardWriter]:
    """Open a writer for each part that is not finished."""
    arguments = {
        "tokenizer": plan.tokenizer.fingerprint,
        "segmenter": plan.segmenter,
        "limit": plan.sampling.limit,
        "holdout": plan.sampling.holdout,
        "seed": plan.seed,
        "source": total.digest if total else None,  # sampling depends on the number of documents
    }
    writers = {}
    for part in plan.sampling.parts:
        folder = plan.folder_of(part)
        if part == HELDOUT and _holds_corpus(folder):  # an earlier build died after publishing this part
            _check_same_recipe(plan, {part: read_manifest(folder)}, total.digest if total else None)
        else:
            writers[part] = ShardWriter(folder, plan.tokenizer.spec.token_type, arguments)
    return writers


def _holds_corpus(folder: Path) -> bool:
    """Return whether the folder holds a corpus; False if it is missing or empty. Raises UserError for anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / MANIFEST).is_file():
        raise UserError(f"--output {folder} already holds something that is not a corpus; name a new folder")
    return True


def _check_existing(plan: BuildPlan) -> dict[Part, Manifest]:
    """Return the manifests of an existing corpus. Raises UserError if it differs from the one that would be built."""
    manifests = {part: read_manifest(plan.folder_of(part)) for part in plan.sampling.parts}
    _check_same_recipe(plan, manifests, None)  # before the source is read, which may take long
    _check_same_recipe(plan, manifests, scan_source("comparing", plan).digest)
    print(f"{plan.folder} already exists, built from the same documents with the same tokenizer")
    return manifests


def _check_same_recipe(plan: BuildPlan, manifests: dict[Part, Manifest], source: str | None) -> None:
    """Raises UserError for a corpus with another recipe. `source`: digest of all documents; None: not compared."""
    for part, manifest in manifests.items():
        found = manifest.recipe
        expected = plan.recipe(part, source or found.source)
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
    return (
        f"{folder}\n"
        f"  {manifest.documents:,} documents ({manifest.empty_documents:,} empty ones dropped), "
        f"{manifest.tokens:,} tokens in {len(manifest.shards):,} shard{'s' if len(manifest.shards) != 1 else ''}\n"
        f"  {manifest.unknown_token_rate:.3%} unknown tokens, {manifest.tokens_per_word:.2f} tokens per word\n"
        f"  document lengths in tokens: {lengths}"
    )


@contextmanager
def _build_lock(folder: Path) -> Iterator[None]:
    """Allow one build at a time into `folder`. Raises UserError if another one is running."""
    path = folder.with_name(f".{folder.name}.lock")
    lock = FileLock(path)
    with created_parents(folder):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"--output {folder}: another build is writing it") from None
        try:
            yield
        finally:
            path.unlink(
                missing_ok=True
            )  # while it is held: whoever opens it later gets a new one, and finds the corpus
            lock.release()


_LISTED = 10  # sources
_SAMPLE = 1000  # documents
_FEWEST = 50
_LONGEST_LINE = 120  # characters of wrapped text
_SHORTEST_LINE = 40
_SENTENCE_ENDS = tuple(".!?…:;\"'”’)]。！？；：”")


def announce_sources(sources: Sequence[Source], options: TextOptions) -> None:
    """List the sources; warn if the first file looks as if its lines were parts of paragraphs."""
    size = sum(source.bytes or 0 for source in sources)
    total = f", {size / 1e6:,.1f} MB" if size else ""
    print(f"reading {len(sources):,} source{'s' if len(sources) > 1 else ''}{total}:")
    for source in sources[:_LISTED]:
        print(f"  {source.name}{f'::{source.selection}' if source.selection else ''}")
    if len(sources) > _LISTED:
        print(f"  … and {len(sources) - _LISTED:,} more")
    if _reads_lines(sources[0], options) and is_hard_wrapped(_first_documents(sources[0], options)):
        print(
            f"warning: the lines of {sources[0].name} look like parts of paragraphs; with `--document line` each is "
            "a document of its own; if blank lines separate paragraphs, use `--document blank_line`",
            file=sys.stderr,
            flush=True,
        )


def is_hard_wrapped(lines: Sequence[str]) -> bool:
    """Whether lines were broken to fit a width: most are about as long as the longest ones, and end in a sentence."""
    if len(lines) < _FEWEST:
        return False
    width = sorted(len(line) for line in lines)[int(0.98 * len(lines))]
    if not _SHORTEST_LINE <= width <= _LONGEST_LINE:
        return False
    full = [line for line in lines if len(line) >= 0.75 * width]
    open_ended = sum(not line.rstrip().endswith(_SENTENCE_ENDS) for line in full)
    return len(full) >= 0.6 * len(lines) and open_ended >= 0.7 * len(full)


def _reads_lines(source: Source, options: TextOptions) -> bool:
    is_text = source.kind == "file" and detect_format(source.name)[0] in ("text", None)
    return is_text and options.document == "line" and options.document_start is None


def _first_documents(source: Source, options: TextOptions) -> list[str]:
    try:
        return [document.text for document in islice(read_documents([source], options, ReadStats()), _SAMPLE)]
    except UserError:
        return []  # the build says it, with its line
