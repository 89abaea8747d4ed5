"""`deepcloze clean`: raw documents to a folder of clean ones.

1. The sources are read in order and divided into parts of a few megabytes.
2. Worker processes apply the steps to the parts, in one pass, and one more for each step that compares all documents.
3. The last parts are joined to files in `DIR.partial/result`, which is renamed to `DIR`.

A killed cleaning resumes from its finished parts. The bytes of the result depend on the documents and the config, not
on workers, time or interruptions.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiment.decontamination import CLEAN_SUMMARY, CleanSummary, read_clean_summary
from experiment.errors import UserError, readable_disk_errors
from experiment.files import fsync_tree, json_digest, read_json, write_json
from experiment.output_folder import holds_result, is_free, lock_output
from pretrain.cleaning.config import CleanConfig
from pretrain.cleaning.parts import SUFFIX, PassFolder
from pretrain.cleaning.passes import Done, Pass, plan_passes, run_passes
from pretrain.cleaning.reading import find_inputs, identity_of, read_inputs
from pretrain.cleaning.report import describe_kept, print_steps, summarize, write_report
from pretrain.cleaning.step import ReadTask, Step, check_installed
from pretrain.cleaning.tally import StepTally
from pretrain.corpus.origins import read_cleanings
from pretrain.corpus.sources import Source, partial_folder
from pretrain.corpus.task_runners import TaskRunner, open_task_runner

_FILE_BYTES = 1 << 28  # of a file of the result, compressed
_RECIPE = "recipe.json"
_SOURCES = ".sources.json"  # not in clean.json: times of files may differ where the same documents are


def clean(
    config: CleanConfig,
    read_task: ReadTask,
    workers: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
) -> CleanSummary:
    """Write the folder `config.output`, and print the effect of each step. `engine` and so on: as `open_task_runner`.

    An existing result of the same config and sources is kept. Raises UserError for bad input, naming file and place,
    and for an output folder that holds something else; StoppedError if a worker is killed.
    """
    folder = Path(config.output).absolute()
    advice = "; the same command resumes from the finished parts"
    with readable_disk_errors(f"output {folder}: ", advice), lock_output(folder, "output"):
        sources = find_inputs(config)
        steps = _prepare_steps(config, read_task)
        recipe = _recipe(config, steps)
        if holds_result(folder, CLEAN_SUMMARY, "output", "cleaned documents"):
            summary = read_clean_summary(str(folder))
            if summary is None:
                raise UserError(f"{folder / CLEAN_SUMMARY} is damaged; delete {folder} to start over")
            recorded = None
            with suppress(OSError, ValueError):
                recorded = read_json(folder / _SOURCES)
            if summary["recipe"] != recipe or recorded != identity_of(sources):
                raise UserError(
                    f"output: {folder} already holds documents that were cleaned with another config or version, or of "
                    "other sources or lists, also if files were changed or copied since; name a new folder or delete it"
                )
            if unknown := [source.name for source in sources if not source.version]:
                raise UserError(
                    f"output: {folder} already holds cleaned documents, and the server of {unknown[0]} gives neither "
                    "ETag nor Last-Modified, so the file may have changed; name a new folder or delete it"
                )
            print(f"{folder} already exists, of the same sources and steps")
            if _is_cleaning(partial := partial_folder(folder)):  # killed after the rename
                shutil.rmtree(partial, ignore_errors=True)
        else:
            passes = plan_passes(steps)
            with open_task_runner(workers, passes, engine, ray_address) as run_tasks:
                summary = _clean(config, sources, steps, passes, recipe, folder, run_tasks)
    print(describe_kept(summary))
    if summary["steps"]:
        print_steps(summary)
    print(f"{config.output}/report.html")
    return summary


def check(config: CleanConfig, read_task: ReadTask) -> None:
    """Find the sources, read the first document, and prepare the steps. Raises UserError, also for an output folder
    that holds something else.

    Data sets of the Hub are not read: they would be downloaded.
    """
    holds_result(Path(config.output).absolute(), CLEAN_SUMMARY, "output", "cleaned documents")
    sources = find_inputs(config)
    if all(source.kind != "hub" for source in sources) and next(read_inputs(sources, config), None) is None:
        raise UserError("source: it holds no documents with text")
    _prepare_steps(config, read_task)


def _prepare_steps(config: CleanConfig, read_task: ReadTask) -> list[Step[Any]]:
    """Make the steps and open the files that they name. Raises UserError, also for a package that is missing."""
    steps = []
    for number, item in enumerate(config.steps):
        step = item.make()
        check_installed(f"steps.{number}.{item.name}", step.packages)
        step.prepare(read_task)
        steps.append(step)
    return steps


def _clean(
    config: CleanConfig,
    sources: Sequence[Source],
    steps: Sequence[Step[Any]],
    passes: Sequence[Pass],
    recipe: str,
    folder: Path,
    run_tasks: TaskRunner,
) -> CleanSummary:
    unfinished = partial_folder(folder)
    _check_unfinished(unfinished, {"recipe": recipe, "sources": identity_of(sources)})
    try:
        last, tallies = run_passes(passes, read_inputs(sources, config), unfinished, run_tasks)
    except UserError:
        if not _holds_parts(unfinished):
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    result = unfinished / "result"
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir()
    _join(last, result)
    first, empty, kept, languages = PassFolder(unfinished / "pass-0"), 0, 0, Counter[str]()
    markup = StepTally()
    for part in range(last.parts):
        tally, of_source = last.files.tally(part), first.tally(part)
        empty += of_source.empty
        markup.merge(of_source.markup)
        kept += tally.kept
        languages.update(tally.languages)
    # Texts that an earlier cleaning did not find may be found after a repair.
    decontaminated = None if any(step.repairs for step in steps) else read_cleanings(sources)[1]
    identity = {"recipe": recipe, **({"decontaminated": decontaminated} if decontaminated else {})}
    summary = summarize(config, identity, empty, kept, languages, [markup, *tallies], steps)
    write_report(result, summary)
    write_json(result / _SOURCES, identity_of(sources))
    fsync_tree(result)
    result.replace(folder)
    shutil.rmtree(unfinished, ignore_errors=True)  # NFS keeps files that are open; the next call removes the rest
    return summary


def _recipe(config: CleanConfig, steps: Sequence[Step[Any]]) -> str:
    """Return a digest of everything that the result depends on besides the documents."""
    tree = config.model_dump(mode="json", exclude={"source", "output"})
    return json_digest({"config": tree, "steps": [dict(step.facts()) for step in steps]})


def _check_unfinished(partial: Path, identity: dict[str, str]) -> None:
    """Record the identity. Raises UserError if the folder holds parts of another cleaning, or anything else. Until the
    first pass is finished, sources may change: its parts tell which documents they are of."""
    if not is_free(partial) and not _is_cleaning(partial):
        raise UserError(f"{partial} holds something that is no unfinished cleaning; move it, or choose another output")
    path, recorded = partial / _RECIPE, None
    with suppress(ValueError, TypeError):
        recorded = read_json(path) if path.exists() else identity
        if Done.read(PassFolder(partial / "pass-0")) is None:
            recorded = {**recorded, "sources": identity["sources"]}
    if recorded != identity and _holds_parts(partial):
        raise UserError(
            f"{partial} holds an unfinished cleaning with another config or version, or of other sources or lists, "
            "also if files were changed or copied since; use the same to resume it, or delete it to start over"
        )
    partial.mkdir(exist_ok=True)
    write_json(path, identity)


def _is_cleaning(partial: Path) -> bool:
    patterns = (_RECIPE, f".{_RECIPE}.*", "pass-*")  # the second one: a temporary file of `write_json`
    return any(any(partial.glob(pattern)) for pattern in patterns)


def _holds_parts(partial: Path) -> bool:
    """Return whether there is something to resume from."""
    return any(partial.glob("pass-*/*.json"))


def _join(last: Done, result: Path) -> None:
    """Concatenate the parts, which are Zstandard frames, to files of a few hundred megabytes."""
    number, size = 0, 0
    for part in range(last.parts):
        path = last.files.documents(part)
        if size and size + path.stat().st_size > _FILE_BYTES:
            number, size = number + 1, 0
        with path.open("rb") as source, (result / f"data-{number:05d}{SUFFIX}").open("ab") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        size += path.stat().st_size
