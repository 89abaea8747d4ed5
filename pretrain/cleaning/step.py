"""The interface of cleaning steps. Each file in pretrain/cleaning/steps defines one, as a class called `Step`.

From its declaration follow its config keys, their reference, and its place in the report. To add a step, add a file.
"""

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from numpy.typing import NDArray

from experiment.config import Section
from experiment.decontamination import EvaluationText
from experiment.errors import UserError
from pretrain.cleaning import steps
from pretrain.cleaning.arrays import StoredArray

ConfigT = TypeVar("ConfigT", bound=Section)

Arrays = Mapping[str, NDArray[Any]]
"""A step's observations of the documents of one part, by name."""


@dataclass(slots=True)
class Document:
    """A text with its source and metadata."""

    id: str  # unique in the collection
    source: str  # file, or archive::member
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    markup: str = ""  # of the text, until a worker has removed it, see `markup.to_text`


class Verdict(NamedTuple):
    """The effect of a step on a document, and the reason."""

    rule: str  # name of the rule, for counts and examples
    dropped: bool = True  # False: its text was changed
    detail: str = ""  # the finding of the rule, such as a matching n-gram


ReadTask = Callable[[str], Sequence[EvaluationText]]
"""Name or path of a fine-tuning config -> the texts of its validation and test splits. Raises UserError."""


Observed = Callable[[str], Sequence[StoredArray]]
"""Name of an array -> this array of each part."""


class Step(ABC, Generic[ConfigT]):
    """One step. It is made in the main process and sent to the workers."""

    config_type: ClassVar[type[Section]]
    """The keys of the step. The first line of its docstring describes the step."""

    packages: ClassVar[tuple[str, ...]] = ()
    """Packages of the extra `clean` that the step imports."""

    needs: tuple[str, ...] = ()
    """Metadata that the step reads, which an earlier step or the source has to provide."""

    provides: ClassVar[tuple[str, ...]] = ()
    """Metadata that the step adds."""

    repairs: ClassVar[bool] = False
    """Whether the step changes how words are written."""

    needs_repaired: ClassVar[bool] = False
    """Whether repairs after the step would reveal texts that it looks for."""

    lists_matches: ClassVar[bool] = False
    """Whether clean.json lists the details of its first verdicts."""

    masks: ClassVar[bool] = False
    """Whether the step masks text. Its examples show only what is left."""

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what each process loads for itself, such as a model, which cannot be sent."""
        kind = type(self)
        return {
            name: value
            for name, value in vars(self).items()
            if not isinstance(getattr(kind, name, None), cached_property)
        }

    def prepare(self, read_task: ReadTask) -> None:
        """Open the files that the config names, in the main process. Raises UserError."""

    def facts(self) -> Mapping[str, Any]:
        """Return the facts about the step in clean.json besides its counts. A cleaning with other facts is refused,
        finished or not."""
        return {}


class DocumentStep(Step[ConfigT]):
    """A step that looks at one document at a time, in any of the workers."""

    @abstractmethod
    def apply(self, document: Document) -> Verdict | None:
        """Keep the document (None), change it in place, or drop it."""


def changed(document: Document, text: str, rule: str) -> Verdict | None:
    """Give a document this text. Returns the verdict of `DocumentStep.apply`: None if the text is the same."""
    if text == document.text:
        return None
    document.text = text
    return Verdict(rule, dropped=False)


class CollectionStep(Step[ConfigT]):
    """A step that compares all documents.

    Workers observe the documents of each part. The main process decides, from the observations of all parts in order.
    Workers apply the decisions of each part. None of it may depend on how documents are divided into parts.
    """

    @abstractmethod
    def observe(self, documents: Sequence[Document]) -> Arrays:
        """Return the observations of the documents of a part, for `decide`."""

    @abstractmethod
    def decide(self, observed: Observed) -> list[NDArray[Any]]:
        """Return decisions for each part."""

    @abstractmethod
    def apply(self, documents: Sequence[Document], decisions: NDArray[Any]) -> list[Verdict | None]:
        """Apply the decisions for a part to its documents, as `DocumentStep.apply` does to one."""


class DuplicateStep(CollectionStep[ConfigT]):
    """A step that keeps one of several documents. A decision is the index of the document kept in place of another, in
    the whole collection, or -1."""

    def apply(self, documents: Sequence[Document], decisions: NDArray[Any]) -> list[Verdict | None]:
        return [None if kept < 0 else Verdict("duplicate", detail=f"#{kept}") for kept in decisions.tolist()]


def check_installed(place: str, packages: Sequence[str]) -> None:
    """Raise UserError if a package of the extra is not installed. place: the key or file that needs it."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{place}: {package} is not installed; run: pip install 'deepcloze[clean]'")


def find_step(name: str) -> type[Step[Any]]:
    """Return the step of this name, one of `steps.step_names`."""
    step: type[Step[Any]] = importlib.import_module(f"{steps.__name__}.{name}").Step
    return step
