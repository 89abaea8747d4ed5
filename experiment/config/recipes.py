"""The configs that come with deepcloze, pretrain/recipes/NAME.yaml and finetune/recipes/NAME.yaml: found by name."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from experiment.config import did_you_mean
from experiment.errors import UserError
from experiment.files import REPOSITORY

RecipeKind = Literal["pretrain", "finetune"]
_KINDS: tuple[RecipeKind, ...] = ("pretrain", "finetune")


class Recipe(NamedTuple):
    kind: RecipeKind  # the command that takes it
    name: str
    path: Path

    @property
    def summary(self) -> str:
        """The first sentence of the comment that it begins with."""
        lines = itertools.takewhile(lambda line: line.startswith("#"), self.path.read_text("utf-8").splitlines())
        text = " ".join(line.removeprefix("#").strip() for line in lines)
        return re.split(r"(?<=[.?!])\s+(?=[A-Z]|https:)", text)[0]


def all_recipes(kinds: Sequence[RecipeKind] = _KINDS) -> list[Recipe]:
    """Sorted by command and name."""
    return [
        Recipe(kind, path.stem, path)
        for kind in kinds
        for path in sorted((REPOSITORY / kind / "recipes").glob("*.yaml"))
    ]


def find_recipe(name: str, kinds: Sequence[RecipeKind] = _KINDS) -> Recipe:
    """Return the recipe of that name, or KIND/NAME. Raises UserError if there is none, or more than one."""
    known = all_recipes(kinds)
    found = [recipe for recipe in known if name in (recipe.name, f"{recipe.kind}/{recipe.name}")]
    if not found:
        longer = [recipe.name for recipe in known if recipe.name.startswith(name)]
        close = did_you_mean(name, longer or [recipe.name for recipe in known])
        raise UserError(f"there is no file and no recipe '{name}'{close}")
    if len(found) > 1:
        names = " or ".join(f"{recipe.kind}/{recipe.name}" for recipe in found)
        raise UserError(f"there are several recipes '{name}': expected {names}")
    return found[0]


def find_config(name: str, *kinds: RecipeKind) -> str:
    """Return the file that `name` refers to: itself, or a recipe for one of the commands if there is no such file.

    Raises UserError for a name, or KIND/NAME, that is neither.
    """
    folder, _, last = name.rpartition("/")
    if Path(name).is_file() or folder not in ("", *_KINDS) or Path(last).suffix:
        return name
    try:
        return str(find_recipe(name, kinds).path)
    except UserError:
        if Path(name).is_dir():
            raise UserError(f"{name} is a folder; expected a YAML file, or the name of a recipe") from None
        if (file := Path(f"{name}.yaml")).is_file():
            raise UserError(f"there is no file and no recipe '{name}'; did you mean '{file}'?") from None
        raise
