"""The config of `deepcloze clean`, checked when it is built.

`steps` has the name of one step and its keys in each item. The keys of a step are declared in its file.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, create_model, model_validator

from experiment.config import Section
from experiment.config.field_types import LocalPath
from pretrain.cleaning.readers import reader_names
from pretrain.cleaning.step import Step, find_step
from pretrain.cleaning.steps import step_names
from pretrain.corpus.options import TextOptions


class OneStep(Section):
    """One step: its name, with its keys below."""

    @model_validator(mode="after")
    def _has_one_name(self) -> Self:
        if len(self.model_fields_set) != 1:
            found = ", ".join(sorted(self.model_fields_set)) or "none"
            raise ValueError(f"expected the name of one step in each item of the list, found {found}")
        return self

    @property
    def name(self) -> str:
        (name,) = self.model_fields_set
        return name

    def make(self) -> Step[Any]:
        """Return the step, with the defaults of its config for the keys that are not given."""
        step_type = find_step(self.name)
        return step_type(getattr(self, self.name) or step_type.config_type())


_ITEM = create_model(
    "OneStep",
    __base__=OneStep,
    **{  # type: ignore[call-overload]
        name: (config_type | None, Field(None, description=(config_type.__doc__ or "").partition("\n\n")[0]))
        for name in step_names()
        for config_type in [find_step(name).config_type]
    },
)


class CleanConfig(TextOptions):
    """A cleaning: its sources, the steps in their order, and the output."""

    are_flags: ClassVar[bool] = False

    source: str | tuple[str, ...]
    """Input: files, folders and globs, as for `deepcloze corpus`, and the formats of docs/cleaning.md."""

    output: LocalPath
    """Folder to write: documents as .jsonl.zst, clean.json and report.html."""

    format: Literal["auto", *reader_names()] = "auto"  # type: ignore[valid-type]
    """Format of all files; `auto`: as their names suggest."""

    metadata: tuple[str, ...] = ()
    """Metadata to keep, for the steps and the output: columns of .jsonl, .csv, .tsv and .parquet files,
    `url` of web archives, `title` of wiki dumps, `language` of Moses files."""

    steps: tuple[_ITEM, ...] = ()
    """The steps, in order."""

    @property
    def columns(self) -> Mapping[str, str]:
        return {**super().columns, **dict.fromkeys(self.metadata, "metadata")}

    @model_validator(mode="after")
    def _metadata_is_not_the_text(self) -> Self:
        if self.column in self.metadata:
            raise ValueError(f"'metadata': '{self.column}' is the column of the text")
        return self

    @model_validator(mode="after")
    def _samples_are_independent(self) -> Self:
        seeds = [item.make().config.seed for item in self.steps if item.name == "sample"]
        if len(set(seeds)) < len(seeds):
            raise ValueError("two `sample` steps have the same seed and would draw the same numbers: change one `seed`")
        return self

    @model_validator(mode="after")
    def _steps_are_in_a_possible_order(self) -> Self:
        available = {*self.metadata, "source"}
        compared = None
        for number, item in enumerate(self.steps):
            step = item.make()
            for key in step.needs:
                if key not in available:
                    raise ValueError(f"steps.{number}.{item.name}: {_provider_of(key)}")
            if step.repairs and compared is not None:
                raise ValueError(
                    f"steps.{number}.{item.name}: it changes how words are written after steps.{compared} compared; "
                    f"put it before steps.{compared}"
                )
            available |= {*step.provides}
            compared = f"{number}.{item.name}" if step.needs_repaired else compared
        return self


def _provider_of(key: str) -> str:
    providers = [name for name in step_names() if key in find_step(name).provides]
    if providers:
        return f"needs the {key} of each document; put the step {' or '.join(providers)} before it"
    return f"needs the {key} of each document; name the column that holds it in 'metadata'"
