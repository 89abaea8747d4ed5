import importlib.metadata
import json
import os
from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.process import cpu_cores
from launcher.cli import main
from pretrain.corpus import python_docs
from pretrain.corpus.documents import read_documents
from pretrain.corpus.formats import ReadStats
from pretrain.corpus.options import TextOptions
from pretrain.corpus.python_docs import extract_docs, prose, read_python_docs, write_python_docs
from pretrain.corpus.sources import Span, find_sources

SOURCE = '''
"""This module is for things that need eight words at the least."""
import nowhere_to_be_found

raise SystemExit("imported")

class Shape:
    """A shape that has an area and a perimeter, both of them positive."""

    def area(self):
        """Return the area of the shape in the unit of its sides, squared."""

    def short(self):
        """Too short."""

add_docstr(Shape.perimeter, r"""
perimeter(input) -> float

Return the length of the line that runs around the whole shape.
""")
'''


def test_docstrings_are_read_without_importing(tmp_path: Path) -> None:
    """Catches code that is executed, wrong names, and missed documentation that is added by calls."""
    path = tmp_path / "shapes.py"
    path.write_text(SOURCE)
    found = dict(extract_docs(str(path)))
    assert list(found) == ["", "Shape", "Shape.area", "Shape.perimeter"]
    assert found["Shape.area"] == "Return the area of the shape in the unit of its sides, squared."
    assert "runs around the whole shape." in found["Shape.perimeter"]


@pytest.mark.parametrize("source", [b'print \'old\'  """', b'\xff\xfe"""', b'x = """\0"""', b'{{ template }}"""'])
def test_unparsable_files_are_skipped(tmp_path: Path, source: bytes) -> None:
    """Catches one odd file among thousands that stops the command."""
    path = tmp_path / "odd.py"
    path.write_bytes(source)
    assert extract_docs(str(path)) == []
    assert extract_docs(str(tmp_path / "nowhere.py")) == []


def test_prose_without_examples_and_markup() -> None:
    """Catches doctests, code blocks and tables in the corpus, and prose that is removed with them."""
    text = """Compute the :func:`~numpy.mean` of `a` and **b**, see `the guide <http://x.org>`_ for
    what is meant by that.

    Notes
    -----
    It is slow, as in::

        for i in range(10): pass

    .. code-block:: python

        mean(3)

    .. note::
        Values that are missing
        are left out.

    >>> mean([1, 2])
    1.5

    ====  =====
    name  value
    ====  =====

    | a | b |

    ```python
    mean()
    ```
    - first thing
    - second thing
    """
    assert prose(text).split("\n") == [
        "Compute the numpy.mean of a and b, see the guide for what is meant by that.",
        "",
        "Notes",
        "",
        "It is slow, as in:",
        "",
        "Values that are missing are left out.",
        "",
        "name value",
        "",
        "- first thing",
        "- second thing",
    ]
    assert prose("x = [1, 2, 3] + {4: 5} * (6 ** 7) // 8 % 9 - 0x1f") == ""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment with one installed package and a standard library of one module."""
    site = tmp_path / "site"
    info = site / "My_Shapes-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "half_uninstalled-1.0.dist-info").mkdir()
    description = "My shapes is a package about shapes of all kinds, and what their areas are.\n"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: My_Shapes\nVersion: 1.0\n\n{description}")
    names = ["shapes/__init__.py", "shapes/area.py", "shapes/tests/test_a.py", "shapes/LICENSE.md", "shapes/guide.md"]
    for name in names:
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = f"The file {path.stem} tells in eight words or more what it does."
        path.write_text(
            f'"""{text}"""\n\ndef f():\n    """Return the same words in both of the files, always so."""\n'
            if name.endswith(".py")
            else text
        )
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in [*names, "../../bin/shapes.py"]))
    library = tmp_path / "lib"
    (library / "site-packages").mkdir(parents=True)
    (library / "abc.py").write_text('"""The standard library says in eight words what it is for."""\n')
    (library / "site-packages" / "other.py").write_text(
        '"""Not of the standard library, though it has eight words."""\n'
    )
    real = importlib.metadata.distributions
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: real(path=[str(site)]))
    monkeypatch.setattr(python_docs.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    return tmp_path


@pytest.mark.filterwarnings("error")
def test_read_installed_packages(installed: Path) -> None:
    """Catches tests and licenses among the documents, duplicate texts, and an unstable order."""
    docs = list(read_python_docs())
    assert [doc.document for doc in docs] == [
        "my-shapes/METADATA",
        "python/abc",
        "my-shapes/shapes",
        "my-shapes/shapes.f",
        "my-shapes/shapes.area",
        "my-shapes/shapes/guide.md",
    ]
    assert {doc.package for doc in docs} == {"python", "my-shapes"}
    assert list(read_python_docs()) == docs


def test_a_container_quota_limits_the_processes(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a process for each core of the host in a container that may use only a few."""
    (installed / "cpu.max").write_text("100000 100000\n")
    monkeypatch.setattr(cpu_cores, "_CGROUP", installed)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3)))
    started = list[int]()
    real = python_docs.worker_pool
    monkeypatch.setattr(python_docs, "worker_pool", lambda count, *rest: started.append(count) or real(count, *rest))
    assert list(read_python_docs())
    assert started == [1]


def test_texts_that_are_not_unicode_are_left_out(installed: Path) -> None:
    """Catches a docstring of an installed package that ends the command."""
    text = "A byte becomes the character \\udc80, which eight words surround here."
    (installed / "site" / "shapes" / "area.py").write_text(f'"""{text}"""\n')
    write_python_docs(installed / "docs.jsonl")
    assert "shapes.area" not in (installed / "docs.jsonl").read_text()


def test_packages_and_files_can_be_chosen(installed: Path) -> None:
    """Catches packages that are read although they were not asked for, and a name that nothing has."""
    assert {doc.package for doc in read_python_docs(["Python"])} == {"python"}
    assert {doc.package for doc in read_python_docs(["My_Shapes"])} == {"my-shapes"}
    files = [doc.document for doc in read_python_docs(["my-shapes"], files_per_package=1)]
    assert files == ["my-shapes/METADATA", "my-shapes/shapes", "my-shapes/shapes.f"]
    assert main(["python_docs", f"--output={installed / 'docs.jsonl'}", "--packages=python,my-shapes"]) == 0
    lines = (installed / "docs.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["package"] for line in lines} == {"python", "my-shapes"}
    with pytest.raises(UserError, match="--packages: not installed: circles"):
        list(read_python_docs(["circles", "python"]))


def test_file_equals_source(installed: Path) -> None:
    """Catches JSON lines that `deepcloze corpus` cannot read, and a `python-docs` source that differs from them."""
    path = installed / "docs.jsonl"
    write_python_docs(path)
    assert set(json.loads(path.read_text().splitlines()[0])) == {"text", "package", "document"}
    read = [
        [document.text for document in read_documents(map(Span, find_sources(source)), TextOptions(), ReadStats())]
        for source in (path, "python-docs")
    ]
    assert read[0] == read[1]
    with pytest.raises(UserError, match="is a folder"):
        write_python_docs(installed)
