"""The lists of modules in the docstrings of packages: `- name: what it is for; name, name: what they are for`."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
NAMES = re.compile(r"(?:^|; )((?:\w+, )*\w+): ")


def docstring(package: Path) -> str:
    return ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""


def listed_modules(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if line.startswith("- "):
            for names in NAMES.findall(line.removeprefix("- ")):
                yield from names.split(", ")


PACKAGES = [
    path.parent
    for folder in ("launcher", "pretrain", "finetune", "experiment")
    for path in sorted((REPOSITORY / folder).rglob("__init__.py"))
    if any(listed_modules(docstring(path.parent)))
]


def test_there_are_lists() -> None:
    """Another form of the lists would leave the next test with nothing to check."""
    assert {"engine", "modeling", "training", "batching", "corpus", "plan"} <= {package.name for package in PACKAGES}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_list_has_exactly_the_modules_of_its_package(package: Path) -> None:
    """Catches a module that was renamed, moved or added, while the docstring of its package still has the old list."""
    modules = [path.stem for path in package.glob("*.py") if path.stem != "__init__"]
    packages = [path.parent.name for path in package.glob("*/__init__.py")]
    assert sorted(listed_modules(docstring(package))) == sorted([*modules, *packages])
