"""The passes of a cleaning. Each reads all documents, in parts that worker processes handle on their own.

A step that compares all documents ends a pass: the pass observes them, the main process decides, and the next pass
applies the decisions. Finished parts and passes are kept if the cleaning is killed.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import xxhash
from pydantic import TypeAdapter

from experiment.errors import UserError
from experiment.files import names_in, read_json, write_json
from experiment.progress import progress
from pretrain.cleaning.markup import HTTP_ERROR, TOO_LARGE, to_text
from pretrain.cleaning.parts import PassFolder
from pretrain.cleaning.step import CollectionStep, Document, DocumentStep, DuplicateStep, Step, Verdict
from pretrain.cleaning.tally import PartTally, StepTally
from pretrain.corpus.task_runners import TaskRunner, check_shared

_STEP_TALLIES = TypeAdapter(list[StepTally])
_PART_CHARACTERS = 1 << 22
_PART_DOCUMENTS = 20_000
_ERROR_CHARACTERS = 200  # an error may quote a whole document
_DONE, _DECIDED = "done.json", "decided.json"


@dataclass(frozen=True)
class Pass:
    """The work of one pass: apply decisions, then steps, then observe the rest for the next decisions."""

    decided: CollectionStep[Any] | None
    steps: tuple[DocumentStep[Any], ...]
    observed: CollectionStep[Any] | None

    @property
    def counted(self) -> tuple[Step[Any], ...]:
        """The steps whose effect this pass counts."""
        return (*((self.decided,) if self.decided is not None else ()), *self.steps)


def plan_passes(steps: Sequence[Step[Any]]) -> tuple[Pass, ...]:
    """Divide the steps into passes: one, and one more for each step that compares all documents."""
    passes, decided = list[Pass](), None
    current = list[DocumentStep[Any]]()
    for step in steps:
        if isinstance(step, CollectionStep):
            passes.append(Pass(decided, tuple(current), step))
            decided, current = step, []
        else:
            assert isinstance(step, DocumentStep)
            current.append(step)
    return (*passes, Pass(decided, tuple(current), None))


@dataclass(frozen=True)
class Done:
    """A finished pass."""

    files: PassFolder
    parts: int
    tallies: tuple[StepTally, ...]

    @classmethod
    def read(cls, files: PassFolder) -> Self | None:
        """Read a finished pass; None if it is not finished."""
        path = files.folder / _DONE
        if not path.exists():
            return None
        try:
            found = read_json(path)
            return cls(files, found["parts"], tuple(_STEP_TALLIES.validate_python(found["steps"])))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged; delete {files.folder.parent} to start over") from None

    def write(self) -> None:
        steps = [asdict(tally) for tally in self.tallies]
        write_json(self.files.folder / _DONE, {"parts": self.parts, "steps": steps})


class _Part(NamedTuple):
    """A part that a worker handles in one pass."""

    pass_number: int
    files: PassFolder
    number: int
    documents: list[Document] | PassFolder  # of the first pass; of later ones: the pass before, which has written them
    digest: str = ""  # of the documents

    @property
    def place(self) -> str:
        """Where its documents are, for messages."""
        if isinstance(self.documents, PassFolder):
            return str(self.documents.documents(self.number))
        return f"documents from {self.documents[0].id} on"


def run_passes(
    passes: Sequence[Pass], documents: Iterator[Document], folder: Path, run_tasks: TaskRunner
) -> tuple[Done, list[StepTally]]:
    """Run all passes that are not finished. run_tasks: its job are the passes.

    Returns the last pass, and the tallies of all steps. Raises UserError.
    """
    before, tallies = None, list[StepTally]()
    for number, planned in enumerate(passes):
        files = PassFolder(folder / f"pass-{number}")
        done = Done.read(files)
        if done is None:
            files.folder.mkdir(exist_ok=True)
            label = f"cleaning, pass {number + 1} of {len(passes)}"
            if before is None:
                done = _first_pass(planned, documents, files, run_tasks, label)
            else:
                done = _next_pass(number, planned, before, files, run_tasks, label)
            done.write()
        if before is not None:
            before.files.remove_documents()
        before, tallies = done, [*tallies, *done.tallies]
    assert before is not None
    return before, tallies


def _first_pass(
    planned: Pass, documents: Iterator[Document], files: PassFolder, run_tasks: TaskRunner, label: str
) -> Done:
    """Divide the documents into parts, and handle those that are not finished, or whose documents were others: a source
    may have been repaired since."""
    parts = 0

    def unfinished() -> Iterator[_Part]:
        nonlocal parts
        for number, chunk in enumerate(_chunks(documents)):
            parts, digest = number + 1, _digest(chunk)
            if not files.is_finished(number) or files.tally(number).digest != digest:
                yield _Part(0, files, number, chunk, digest)

    _count(label, run_tasks(_process, unfinished()))
    if not parts:
        raise UserError("source: it holds no documents with text")
    return Done(files, parts, _merged(planned, files, parts))


def _next_pass(number: int, planned: Pass, before: Done, files: PassFolder, run_tasks: TaskRunner, label: str) -> Done:
    """Decide, and handle the parts that are not finished."""
    _decide(planned, before, files)
    left = (part for part in range(before.parts) if not files.is_finished(part))
    _count(label, run_tasks(_process, (_Part(number, files, part, before.files) for part in left)))
    tallies = _merged(planned, files, before.parts)
    if isinstance(planned.decided, DuplicateStep):
        _name_kept(tallies[0], before)
    return Done(files, before.parts, tallies)


def _count(label: str, parts: Iterable[int]) -> None:
    """Wait for parts, each given as its number of documents, and show the progress."""
    with progress(label, None, describe=lambda done: f"{done:,.0f} documents") as advance:
        for read in parts:
            advance(read)


def _merged(planned: Pass, files: PassFolder, parts: int) -> tuple[StepTally, ...]:
    """Return the tallies of the steps that the pass counts, over all parts in order."""
    names_in(files.folder)  # a network file system may have cached that tallies of other machines do not exist
    totals = tuple(StepTally() for _ in planned.counted)
    for part in range(parts):
        for total, tally in zip(totals, files.tally(part).steps, strict=True):
            total.merge(tally)
    return totals


def _process(passes: Sequence[Pass], part: _Part) -> int:
    """Handle one part, in a worker. Returns how many documents were read."""
    check_shared(part.files.folder)
    planned = passes[part.pass_number]
    markup, empty = StepTally(), 0
    if isinstance(part.documents, PassFolder):
        documents = part.documents.read(part.number)
    else:
        documents = _without_markup(part.documents, markup)
        empty = len(part.documents) - markup.read
    read = len(documents)
    tallies = list[StepTally]()
    for step in planned.counted:
        texts = [document.text for document in documents]
        verdicts = list(map(_dropped_if_empty, documents, _apply(step, documents, part)))
        tallies.append(StepTally())
        for document, text, verdict in zip(documents, texts, verdicts, strict=True):
            tallies[-1].count(document, text, verdict, step.lists_matches, step.masks)
        pairs = zip(documents, verdicts, strict=True)
        documents = [document for document, verdict in pairs if verdict is None or not verdict.dropped]
    observed = {} if planned.observed is None else planned.observed.observe(documents)
    languages = Counter(str(found) for document in documents if (found := document.metadata.get("language")))
    tally = PartTally(part.digest, empty, markup, len(documents), dict(languages), tallies)
    part.files.write(part.number, documents, observed, tally)
    return read


def _without_markup(documents: list[Document], tally: StepTally) -> list[Document]:
    """Return the documents with plain text; those without any are left out, as are empty lines of a file. tally: counts
    the others, and those whose markup cannot be removed."""
    left, sources = list[Document](), [document.text for document in documents]
    verdicts = _apply_to_each(_remove_markup, documents, "removing markup")
    for document, source, verdict in zip(documents, sources, verdicts, strict=True):
        if verdict is not None or document.text.strip():
            tally.count(document, source, verdict, listed=False)
            if verdict is None:
                left.append(document)
    return left


def _remove_markup(document: Document) -> Verdict | None:
    if document.markup in (HTTP_ERROR, TOO_LARGE):
        return Verdict(document.markup)
    if document.markup:
        document.text, document.markup = to_text(document.text, document.markup), ""
    return None


def _apply(step: Step[Any], documents: list[Document], part: _Part) -> list[Verdict | None]:
    if isinstance(step, CollectionStep):
        return step.apply(documents, part.files.decisions(part.number))
    assert isinstance(step, DocumentStep)
    return _apply_to_each(step.apply, documents, f"the step {type(step).__module__.rpartition('.')[2]}")


def _apply_to_each(
    function: Callable[[Document], Verdict | None], documents: Sequence[Document], name: str
) -> list[Verdict | None]:
    """Apply a function to documents; those that a library fails on are dropped. Raises UserError if it fails on all of
    several."""
    verdicts, errors = list[Verdict | None](), list[str]()
    for document in documents:
        try:
            verdicts.append(function(document))
        except (UserError, OSError, MemoryError):  # of the config, or of the machine
            raise
        except Exception as error:
            errors.append(repr(error)[:_ERROR_CHARACTERS])
            verdicts.append(Verdict("failed", detail=errors[-1]))
    if 1 < len(errors) == len(documents):
        raise UserError(f"{documents[0].id}: {name} fails on this document: {errors[0]}")
    return verdicts


def _dropped_if_empty(document: Document, verdict: Verdict | None) -> Verdict | None:
    if verdict is None or verdict.dropped or document.text.strip():
        return verdict
    return Verdict("nothing_left", detail=verdict.detail)


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    chunk, characters = list[Document](), 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= _PART_CHARACTERS or len(chunk) >= _PART_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _digest(documents: Iterable[Document]) -> str:
    """Hash documents with their metadata, if they have any."""
    texts = list[str]()
    for document in documents:
        texts += [document.id, document.text]
        if document.metadata:
            texts.append(json.dumps(document.metadata, sort_keys=True, default=str))
    return xxhash.xxh3_128_hexdigest("\0".join(texts).encode())


def _decide(planned: Pass, before: Done, current: PassFolder) -> None:
    """Let the step that the pass before observed for decide, unless it has."""
    if (current.folder / _DECIDED).exists():
        return
    assert planned.decided is not None
    shutil.rmtree(current.folder)
    current.folder.mkdir()
    current.write_decisions(planned.decided.decide(partial(before.files.observed, before.parts)))
    write_json(current.folder / _DECIDED, {})


def _name_kept(tally: StepTally, before: Done) -> None:
    """Replace the indices of kept documents in the examples by their ids."""
    wanted = {int(example.detail.removeprefix("#")) for rule in tally.rules.values() for example in rule.examples}
    names, start = dict[str, str](), 0
    for part in range(before.parts):
        count = before.files.tally(part).kept
        if any(start <= index < start + count for index in wanted):
            ids = [document.id for document in before.files.read(part)]
            names |= {f"#{index}": f"of {ids[index - start]}" for index in wanted if start <= index < start + count}
        start += count
    for rule in tally.rules.values():
        rule.examples = [replace(example, detail=names[example.detail]) for example in rule.examples]
