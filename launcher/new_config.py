"""Recipes and new configs, to edit. Editors complete and check their keys by the JSON Schema beside them."""

import shlex
from collections.abc import Collection, Iterator
from pathlib import Path

from pydantic import BaseModel

from experiment.config.field_types import annotation_below, is_section
from experiment.config.json_schema import json_schema
from experiment.config.recipes import all_recipes, find_recipe
from experiment.config.reference import find_meaning
from experiment.errors import UserError, readable_disk_errors
from experiment.files import atomic_write, write_json
from launcher.command_line import table
from launcher.configs import CONFIGS
from launcher.options import RecipesOptions

_USUALLY_SET: dict[str, tuple[str, ...]] = {
    "pretrain": ("model.config", "schedule.steps"),
    "finetune": ("task.train", "task.columns", "task.columns.text", "task.columns.label"),
    "compare": ("rows.NAME.init_from",),
    "clean": ("steps",),
}
"""Kind of config -> keys that are no required fields, but without which few configs are complete."""


def recipes_command(options: RecipesOptions) -> None:
    """List or copy recipes. Raises UserError for a missing or unknown name, and for an existing target."""
    if options.action == "ls":
        print(_recipe_table())
        return
    if options.name is None:
        raise UserError(f"recipes {options.action}: missing: NAME, see `deepcloze recipes`")
    recipe = find_recipe(options.name)
    text = recipe.path.read_text(encoding="utf-8")
    if options.action == "show":
        print(text, end="")
        return
    target = Path(options.target or recipe.path.name)
    if str(options.target).endswith("/") and not target.is_dir():
        raise UserError(f"recipes cp: there is no folder {options.target}")
    if target.is_dir():
        target = target / recipe.path.name
    _write_config(target, text, recipe.kind)


def write_new_config(file: Path, kind: str) -> None:
    """Write a config with the keys that most users set, without values. Raises UserError for a file that exists."""
    keys = _keys_to_set(CONFIGS[kind].specialize({"task": {}}), _USUALLY_SET[kind])
    _write_config(file, "".join(f"{line}\n" for line in keys), kind)


def _write_config(file: Path, text: str, kind: str) -> None:
    """Write a config and, in .deepcloze beside it, its schema, which its first line names."""
    if file.exists() or file.is_symlink():
        raise UserError(f"{file} exists already; name another file")
    schema = f".deepcloze/{kind}.schema.json"
    with readable_disk_errors(writes=True), atomic_write(file) as temporary:
        temporary.write_text(f"# yaml-language-server: $schema={schema}\n{text}", encoding="utf-8")
        write_json(file.parent / schema, json_schema(CONFIGS[kind]))
    flag = "" if kind == "compare" else "--config "
    print(f"{file}: edit it, then run: deepcloze {kind} {flag}{shlex.quote(str(file))}")


def _keys_to_set(section: type[BaseModel], usual: Collection[str], *above: str) -> Iterator[str]:
    """Yield a line for each required or usual key, with its meaning as a comment. above: the keys of the section."""
    for name, field in section.model_fields.items():
        if field.is_required() or ".".join((*above, name)) in usual:
            meaning = find_meaning(section, name).partition(". ")[0].removesuffix(".")
            yield f"{'  ' * len(above)}{name}:  # {meaning}"
            if is_section(field.annotation):
                yield from _keys_to_set(field.annotation, usual, *above, name)
            elif is_section(value := annotation_below(field.annotation, "NAME")):
                yield f"{'  ' * len(above)}  NAME:"
                yield from _keys_to_set(value, usual, *above, name, "NAME")


def _recipe_table() -> str:
    recipes = all_recipes()
    rows = table([(recipe.name, recipe.summary) for recipe in recipes], width=100)
    lines = []
    for kind in dict.fromkeys(recipe.kind for recipe in recipes):
        lines += ["", f"deepcloze {kind} --config NAME"]
        lines += [row for recipe, row in zip(recipes, rows, strict=True) if recipe.kind == kind]
    return "\n".join(lines[1:])
