"""Language identification by a fastText model, such as lid.176.bin."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from experiment.config import Section
from experiment.config.field_types import Fraction, PathText
from experiment.errors import UserError
from experiment.files import checksum
from pretrain.cleaning.step import Document, DocumentStep, ReadTask, Verdict

_LABEL = "__label__"
_CHARACTERS = 10_000  # of a document; enough to tell its language


class Config(Section):
    """Note the language of each document in its metadata, and drop other languages than those named."""

    model: PathText
    """A fastText model file, such as lid.176.bin or lid.176.ftz."""

    keep: Annotated[tuple[str, ...] | None, Field(min_length=1)] = None
    """Languages to keep, as the model calls them, such as `[en, zh]`; null: all."""

    min_score: Fraction = 0.65
    """Smallest probability of the language."""


class Step(DocumentStep[Config]):
    config_type = Config
    packages = ("fasttext",)
    provides = ("language",)

    def prepare(self, read_task: ReadTask) -> None:
        if not Path(self.config.model).is_file():
            raise UserError(f"steps: language.model: no such file: {self.config.model}")
        labels = {label.removeprefix(_LABEL) for label in self._load().labels}
        if unknown := [name for name in self.config.keep or () if name not in labels]:
            examples = ", ".join(sorted(labels)[:10])
            raise UserError(
                f"steps: language.keep: {self.config.model} knows no language '{unknown[0]}'; it knows {examples}, …"
            )
        self._digest = checksum(Path(self.config.model))

    def facts(self) -> Mapping[str, Any]:
        """Return a digest of the model: a cleaning by another one is refused."""
        return {"model": self._digest}

    @cached_property
    def model(self) -> Any:
        return self._load()

    def apply(self, document: Document) -> Verdict | None:
        (label, *_), (score, *_) = self.model.predict(" ".join(document.text[:_CHARACTERS].split()))
        language = label.removeprefix(_LABEL)
        document.metadata["language"] = language
        if self.config.keep is not None and language not in self.config.keep:
            return Verdict("other_language", detail=f"{language} {score:.2f}")
        if score < self.config.min_score:
            return Verdict("uncertain_language", detail=f"{language} {score:.2f}")
        return None

    def _load(self) -> Any:
        from fasttext.FastText import _FastText

        try:
            return _FastText(self.config.model)
        except (ValueError, MemoryError, RuntimeError) as error:
            raise UserError(
                f"steps: language.model: {self.config.model} is not a fastText model, or damaged: {error}"
            ) from None
