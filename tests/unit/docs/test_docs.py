"""Links, commands and config keys in the documentation."""

import itertools
import re
import runpy
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from experiment.config.reference import config_reference
from experiment.config.yaml_dialect import read_yaml
from launcher.cli import main
from launcher.command_line import flags_of, options_of
from launcher.commands import COMMANDS
from launcher.configs import CONFIGS

REPOSITORY = Path(__file__).resolve().parents[3]
PAGES = sorted(
    path
    for folder in (".", "docs", "ds_configs", "hostfiles", "benchmarks")
    for path in (REPOSITORY / folder).glob("*.md")
)
FOLDERS = ("launcher", "pretrain", "finetune", "experiment", "tests", "docs", "ds_configs", "hostfiles", "benchmarks")
MODULES = [path.as_posix() for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")] + [
    str(REPOSITORY / "deepcloze.py")
]
SECTIONS = {name for config in CONFIGS.values() for name in config.model_fields}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))


def test_there_are_pages() -> None:
    """A moved folder would leave the other tests with nothing to check."""
    assert {"README.md", "CONTRIBUTING.md", "pretraining.md", "RESULTS.md"} <= {page.name for page in PAGES}


def test_the_site_has_all_pages() -> None:
    """A new page is missing in the navigation of the site, or a removed one is still there."""
    nav = re.findall(r"[\w/]+\.md", (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {path.name for path in (REPOSITORY / "docs").glob("*.md")}
    assert len(nav) == len(set(nav))
    assert pages <= set(nav)
    assert [name for name in nav if name not in pages and not (REPOSITORY / name).is_file()] == []


@pytest.mark.parametrize("name", ["config", "commands"])
def test_a_generated_page_is_up_to_date(name: str) -> None:
    """docs/config.md or docs/commands.md drifts from the docstrings of config fields, commands and flags.

    Also a command, flag or key that was renamed or removed by accident: scripts and configs of users name them, so that
    CHANGELOG.md tells of an intended change.
    """
    write_page = runpy.run_path(str(REPOSITORY / "docs" / "reference_pages.py"))["PAGES"][name]
    page = (REPOSITORY / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert page == write_page(), f"python docs/reference_pages.py {name} > docs/{name}.md"


def test_the_reference_names_each_flag_and_key() -> None:
    """A flag that several commands have is missing at one of them, or a key that is printed in a shared table."""
    for section in (REPOSITORY / "docs/commands.md").read_text(encoding="utf-8").split("\n## deepcloze ")[1:]:
        command = section.split()[0]
        for flag in flags_of(options_of(COMMANDS[command])).values():
            assert f"`{flag.label}".replace("|", r"\|") in section, f"{command} {flag.label}"
    config = (REPOSITORY / "docs/config.md").read_text(encoding="utf-8")
    for table in itertools.chain.from_iterable(map(config_reference, CONFIGS.values())):
        for key in table.keys:
            assert f"\n| `{key.name}` |" in config


@each_page
def test_links_resolve(page: Path) -> None:
    """A page was renamed or a heading reworded, and a link still has the old name."""
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in _anchors(linked), f"{target}: no such heading; found {_anchors(linked)}"


@each_page
def test_commands_have_the_flags_shown(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flag or config key was renamed, and the page still shows the old command."""
    for command in _commands(page):
        name, *arguments = shlex.split(command)[1:]
        assert main([name, "--help"]) == 0
        flags = set(re.findall(r"--(\w+)", capsys.readouterr().out)) | {"help"}
        for flag in (argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")):
            key = f"task.{flag}" if name == "predict" else flag
            known = _is_config_key(key) if "." in flag else flag in flags
            assert known, f"{command}: no such flag: --{flag}"


@each_page
def test_config_keys_exist(page: Path) -> None:
    """A config key was renamed, and the page still has the old name."""
    for key in re.findall(rf"`((?:{'|'.join(SECTIONS)})(?:\.\w+)+)", _prose(page)):
        assert key.endswith((".py", ".md")) or _is_config_key(key), f"no such key: {key}"
    for block in _yaml_blocks(page):
        for key in _flatten(block):
            assert _is_config_key(key), f"yaml example: no such key: {key}"


@each_page
def test_pretraining_examples_set_the_learning_rate(page: Path) -> None:
    """An example trains at the default rate, which is too high to continue a model, or for a BERT-base."""
    for block in _yaml_blocks(page):
        if {"run", "corpus", "schedule"} <= block.keys():
            assert "lr" in block.get("optimizer", {}), block["run"]


@each_page
def test_files_exist(page: Path) -> None:
    """A module was moved or renamed, and the page still has the old name."""
    if page.name == "CHANGELOG.md":  # names files of earlier versions
        return
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", _prose(page)):
        assert (REPOSITORY / path).exists(), f"no such file: {path}"
    for path in re.findall(r"`([\w/]+\.py)`", _prose(page)):  # may leave out the first folders
        assert any(f"/{module}".endswith(f"/{path}") for module in MODULES), f"no such module: {path}"


def _prose(page: Path) -> str:
    """The text without code blocks."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def _yaml_blocks(page: Path) -> list[dict[str, Any]]:
    text = page.read_text(encoding="utf-8")
    return [read_yaml(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]


def _anchors(page: Path) -> list[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    anchors: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        repeated = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", other) is not None for other in anchors)
        anchors.append(f"{anchor}-{repeated}" if repeated else anchor)
    return anchors


def _commands(page: Path) -> list[str]:
    """The `deepcloze …` lines of code blocks, with continuation lines joined, except those shown with their error."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^(?:    (?:\$ )?)?(deepcloze \w+.*)$(?!\n    deepcloze: )", text, re.MULTILINE)


def _is_config_key(key: str) -> bool:
    types = [kind for config in CONFIGS.values() for kind in (config, *config.variants().values())]
    return any(_has(config, key.split(".")) for config in types)


def _has(annotation: Any, parts: list[str]) -> bool:
    """Whether a config class has a field at a dotted path. A mapping may have any keys."""
    if not parts:
        return True
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(parts[0])
        return field is not None and _has(field.annotation, parts[1:])
    arguments = get_args(annotation)
    if get_origin(annotation) in (dict, Mapping):
        return any(_has(argument, parts[1:]) for argument in arguments)
    return any(_has(argument, parts) for argument in arguments if argument is not Annotated)


def _flatten(tree: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"
