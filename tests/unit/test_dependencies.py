"""`pyproject.toml` declares what the code imports, and nothing else."""

import ast
import functools
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from experiment.results.page import TEMPLATE

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
IMPORT = re.compile(r"^\s*(?:import|from)\s+(\w+)", re.MULTILINE)
PRODUCT = ("launcher", "pretrain", "finetune", "experiment")
# Needed without an import: command-line tools, pytest plugins, stubs for mypy; transformers' Trainer needs accelerate,
# its SentencePiece tokenizers sentencepiece and protobuf, starlette's test client httpx2, and its forms
# python-multipart; torch.onnx needs onnxscript; datatrove's URL filter needs fasteners, trafilatura lxml_html_clean. A
# test asks pytest for schemathesis; moto's server, ipykernel and MkDocs are started as processes.
NOT_IMPORTED = {
    "accelerate",
    "fasteners",
    "httpx2",
    "ipykernel",
    "lxml-html-clean",
    "mkdocs-material",
    "moto",
    "mypy",
    "onnxscript",
    "protobuf",
    "pytest-timeout",
    "pytest-xdist",
    "python-multipart",
    "selenium",
    "ruff",
    "schemathesis",
    "sentencepiece",
}
BY_TORCH = {"triton"}  # installed by torch for CUDA; our kernels are used if it is there


def normalised(name: str) -> str:
    """A distribution's name as PEP 503 compares it, without version or extras."""
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[; ]", name)[0]).lower()


def declared(*extras: str) -> set[str]:
    """The distributions in `dependencies`, or in these extras."""
    lists = [PYPROJECT["project"]["optional-dependencies"][extra] for extra in extras] or [
        PYPROJECT["project"]["dependencies"]
    ]
    return {normalised(requirement) for requirements in lists for requirement in requirements}


@functools.cache
def imported(*folders: str) -> set[str]:
    """The distributions that these folders import, wherever in a file the import is."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    own = {
        *PRODUCT,
        "benchmarks",
        "deepcloze",
        "_typeshed",
        *(path.stem for path in (ROOT / "tests").rglob("*") if path.is_dir() or path.suffix == ".py"),
    }
    own |= sys.stdlib_module_names
    modules: set[str] = set()
    for file in files:
        text = file.read_text(encoding="utf-8")
        if modules | own >= set(IMPORT.findall(text)):  # to parse all files takes seconds
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
                modules.add(node.module.split(".")[0])
    distributions = packages_distributions()
    return {normalised(distributions.get(module, [module])[0]) for module in modules - own}


def test_the_product_imports_what_it_declares() -> None:
    """Catches a library that is there only because another one needs it, and one that nothing imports any more."""
    optional = declared("chinese", "clean", "onnx", "ray", "serve", "tensorboard") - NOT_IMPORTED | BY_TORCH
    assert imported(*PRODUCT) - optional == declared() - {"protobuf", "sentencepiece"}
    assert optional <= imported(*PRODUCT)


def test_tests_and_benchmarks_import_what_they_declare() -> None:
    """Catches a fresh checkout whose tests fail for want of a library, and leftovers in the test extra."""
    extra, uses = declared("test"), imported("tests", "benchmarks")
    assert uses <= declared() | extra
    stubs = {name for name in extra if name.startswith("types-")}
    optional = declared("chinese", "clean", "onnx", "ray", "serve", "tensorboard") | BY_TORCH
    assert extra - NOT_IMPORTED - stubs - optional <= uses
    assert {normalised(name.removeprefix("types-")) for name in stubs} <= declared()


@pytest.mark.parametrize(
    ("package", "names"), [("experiment.results", {TEMPLATE}), ("finetune.serve", {"page.html", "docs.html"})]
)
def test_pages_are_installed(package: str, names: set[str]) -> None:
    """Catches a wheel without a page, with which a command fails on every machine but the author's."""
    data = PYPROJECT["tool"]["setuptools"]["package-data"][package]
    folder = ROOT / package.replace(".", "/")
    assert {path.name for pattern in data for path in folder.glob(pattern)} >= names
