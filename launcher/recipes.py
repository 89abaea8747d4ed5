"""`deepcloze recipes`: the configs that come with deepcloze."""

import textwrap
from pathlib import Path

from experiment.errors import UserError
from experiment.files import write_text
from experiment.recipes import Recipe, all_recipes, find_recipe
from launcher.options import RecipesOptions


def recipes_command(options: RecipesOptions) -> None:
    """Raises UserError for a missing or unknown name, and for a target that exists."""
    if options.action == "ls":
        print(_table())
        return
    if options.name is None:
        raise UserError(f"recipes {options.action}: missing: NAME, see `deepcloze recipes`")
    recipe = find_recipe(options.name)
    text = recipe.path.read_text(encoding="utf-8")
    if options.action == "show":
        print(text, end="")
        return
    target = Path(options.target or recipe.path.name)
    if target.is_dir():
        target = target / recipe.path.name
    if target.exists():
        raise UserError(f"recipes cp: {target} exists already; name another file")
    write_text(target, text)
    print(f"{target}: edit it, then run: deepcloze {recipe.kind} --config {target}")


def _table() -> str:
    recipes = all_recipes()
    width = max(len(recipe.name) for recipe in recipes)
    lines = []
    for kind in dict.fromkeys(recipe.kind for recipe in recipes):
        lines += ["", f"deepcloze {kind} --config NAME"]
        lines += [_row(recipe, width) for recipe in recipes if recipe.kind == kind]
    return "\n".join(lines[1:])


def _row(recipe: Recipe, width: int) -> str:
    indent = " " * (width + 4)
    name = f"  {recipe.name}".ljust(width + 4)
    return textwrap.fill(recipe.summary, 100, initial_indent=name, subsequent_indent=indent)
