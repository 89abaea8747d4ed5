"""The file of `deepcloze compare`, checked when it is read."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from experiment.config import Section
from experiment.config.field_types import LocalPath, PathText, Seed
from launcher.options import FinetuneConfigName, PretrainConfigName


class CompareRunConfig(Section):
    """The folder of the comparison."""

    dir: LocalPath
    """Folder for all runs and the tables."""


class RowConfig(Section):
    """One row of the table: where the models come from."""

    init_from: PathText
    """A Hugging Face folder, a pretraining run (its newest checkpoint), or a checkpoint of one; the URL of a
    checkpoint or mirror; or NAME[@REVISION] of a model on the Hugging Face Hub."""

    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` keeps the architecture and initializes the weights randomly, as a baseline."""

    pretrain: PretrainConfigName | None = None
    """Pretraining config, or name of a recipe, that continues from `init_from` before the tasks, such as on their own
    text; null: none."""

    @model_validator(mode="after")
    def _pretrained_weights_are_used(self) -> Self:
        if self.pretrain is not None and self.weights == "random":
            raise ValueError("weights: random would ignore what pretrain has trained; leave out one of the two")
        return self


class CompareConfig(Section):
    """Initializations × tasks × seeds."""

    run: CompareRunConfig

    rows: Annotated[Mapping[str, RowConfig], Field(min_length=1)]
    """Initializations by name, in the order of the table."""

    tasks: Annotated[tuple[FinetuneConfigName, ...], Field(min_length=1)]
    """Fine-tuning configs or names of recipes, one for each column. Their `model.init_from`, `model.weights`, `run.dir`
    and `training.seeds` are replaced."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (1, 2, 3)
    """Each cell is trained once with each of these seeds."""

    grid: str | None = None
    """Values of fine-tuning keys to try in each cell, as `deepcloze sweep --grid` takes them. The point that is best on
    validation is reported, with its test score."""
