"""Documentation that every machine with Python has: of the standard library and of the installed packages.

Docstrings stand beside package descriptions, .rst, .md and README pages, and the language reference that `help()`
shows. It needs no network, and its vocabulary and style differ from package to package: a corpus to try things on.
"""

import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress as RichProgress

from experiment.errors import UserError
from experiment.files import fsync
from pretrain.corpus.python_docs.docstrings import documents_in, prose
from pretrain.corpus.workers import worker_pool

_TESTS = re.compile(r"(?:^|/)(?:tests?|idle_test|conftest\.py|test_[^/]*\.py|[^/]*_test\.py)(?:/|$)")
_LEGAL = re.compile(r"licen[sc]e|copying|copyright|notice|authors|third.?party|vendor", re.IGNORECASE)


class Record(NamedTuple):
    """One piece of documentation."""

    text: str
    package: str  # "python" for the standard library, else the distribution
    document: str  # its name, unique: package/module.qualified_name or package/path


class _File(NamedTuple):
    path: str
    package: str
    name: str  # module, or path inside the package


def write_python_docs(path: Path) -> None:
    """`deepcloze python_docs`: all of it as JSON lines of `text`, `package`, `document`. Raises UserError."""
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; expected the name of a file")
    partial = path.with_name(f".{path.name}.partial")
    counts: Counter[str] = Counter()
    characters = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            for record in python_documents():
                file.write(json.dumps(record._asdict(), ensure_ascii=False) + "\n")
                counts[record.package] += 1
                characters += len(record.text)
        fsync(partial)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"--output {path}: cannot write: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
    largest = ", ".join(f"{package} {count:,}" for package, count in counts.most_common(8))
    print(f"{path}: {sum(counts.values()):,} documents of {len(counts)} packages, {characters / 1e6:.1f} M characters")
    print(f"  most from: {largest}")


def python_documents() -> Iterator[Record]:
    """Every piece of documentation once, in an order that depends on nothing but what is installed."""
    names: Counter[str] = Counter()
    seen: set[bytes] = set()

    def unseen(package: str, name: str, text: str) -> Iterator[Record]:
        identity = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
        if text and identity not in seen:
            seen.add(identity)
            document = f"{package}/{name}"
            names[document] += 1
            yield Record(text, package, document if names[document] == 1 else f"{document}#{names[document]}")

    distributions = _distributions()
    for package, distribution in distributions:
        yield from unseen(package, "METADATA", _description(distribution))
    files = [*_standard_library(), *(file for package, found in distributions for file in _files(package, found))]
    with worker_pool(len(os.sched_getaffinity(0))) as pool, _progress(len(files)) as advance:
        for file, found in zip(files, pool.map(documents_in, [file.path for file in files], chunksize=16), strict=True):
            advance()
            for inner, text in found:
                yield from unseen(file.package, f"{file.name}.{inner}" if inner else file.name, text)


def _distributions() -> list[tuple[str, importlib.metadata.Distribution]]:
    """(normalised name, distribution), by name; the first one found where a name is installed twice."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution)
    return sorted(found.items())


def _description(distribution: importlib.metadata.Distribution) -> str:
    payload = distribution.metadata.get_payload()  # type: ignore[attr-defined]
    return prose(payload) if isinstance(payload, str) else ""


def _standard_library() -> Iterator[_File]:
    root = Path(sysconfig.get_paths()["stdlib"])
    yield from _readable("python", ((path, path.relative_to(root).as_posix()) for path in _source_below(root)))


def _source_below(folder: Path) -> Iterator[Path]:
    for directory, inside, names in os.walk(folder):
        inside[:] = sorted(set(inside) - {"site-packages", "dist-packages", "__pycache__"})
        yield from (Path(directory, name) for name in names if name.endswith(".py"))


def _files(package: str, distribution: importlib.metadata.Distribution) -> Iterator[_File]:
    named = ((Path(str(file.locate())), file.as_posix()) for file in distribution.files or [])
    yield from _readable(package, ((path, name) for path, name in named if not name.startswith("..")))


def _readable(package: str, files: Iterator[tuple[Path, str]]) -> Iterator[_File]:
    """The source and the pages among `files`, by name; tests, licences and plain data are left out."""
    for path, name in sorted(files, key=lambda file: file[1]):
        source = path.suffix in (".py", ".pyi")
        page = path.suffix in (".rst", ".md") or (path.suffix == ".txt" and path.stem.lower().startswith("readme"))
        if not (source or page) or _TESTS.search(name) or _LEGAL.search(path.stem) or ".dist-info/" in name:
            continue
        yield _File(str(path), package, _module(name) if source else name)


def _module(name: str) -> str:
    return name.rsplit(".", 1)[0].replace("/", ".").removesuffix(".__init__")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar of files on a terminal, a line every few thousand in a log; calls count one file each."""
    console = Console(stderr=True)
    done = itertools.count(1)
    with RichProgress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading documentation", total=total)

        def advance() -> None:
            count = next(done)
            bar.advance(task)
            if not console.is_terminal and count % 5000 == 0:
                print(f"reading documentation: {count:,} of {total:,} files", file=sys.stderr, flush=True)

        yield advance
