"""Collect the documentation of the standard library and the installed packages.

It consists of docstrings, package descriptions, .rst, .md and README pages, and the language reference that `help()`
shows.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from experiment.disk_errors import describe_disk_error
from experiment.errors import UserError
from experiment.files import atomic_write
from experiment.progress import progress
from pretrain.corpus.python_docs.docstrings import extract_docs, prose
from pretrain.corpus.workers import worker_pool

_TESTS = re.compile(r"(?:^|/)(?:tests?|idle_test|conftest\.py|test_[^/]*\.py|[^/]*_test\.py)(?:/|$)")
_LEGAL = re.compile(r"licen[sc]e|copying|copyright|notice|authors|third.?party|vendor", re.IGNORECASE)


class PythonDoc(NamedTuple):
    """A docstring, page or package description. The field names are those of the JSON lines."""

    text: str
    package: str  # name of the distribution; "python" for the standard library
    document: str  # unique name: package/module.qualified_name or package/path


class _DocFile(NamedTuple):
    """A file that may contain documentation."""

    path: str
    package: str
    name: str  # module name, or path inside the package


def write_python_docs(output: Path) -> None:
    """`deepcloze python_docs`: write all documents as JSON lines. Raises UserError if the file cannot be written."""
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; expected a file")
    counts: Counter[str] = Counter()
    characters = 0
    try:
        with atomic_write(output) as temporary, temporary.open("w", encoding="utf-8") as file:
            for doc in read_python_docs():
                file.write(json.dumps(doc._asdict(), ensure_ascii=False) + "\n")
                counts[doc.package] += 1
                characters += len(doc.text)
    except OSError as error:
        raise UserError(f"--output: {describe_disk_error(error) or error}") from None
    largest = ", ".join(f"{package} {count:,}" for package, count in counts.most_common(8))
    print(
        f"{output}: {sum(counts.values()):,} documents of {len(counts)} packages, {characters / 1e6:.1f} M characters"
    )
    print(f"  most from: {largest}")


def read_python_docs() -> Iterator[PythonDoc]:
    """Yield each text once, in an order that depends only on what is installed."""
    names: Counter[str] = Counter()
    seen: set[bytes] = set()

    def unseen(package: str, name: str, text: str) -> Iterator[PythonDoc]:
        identity = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
        if text and identity not in seen:
            seen.add(identity)
            document = f"{package}/{name}"
            names[document] += 1
            yield PythonDoc(text, package, document if names[document] == 1 else f"{document}#{names[document]}")

    distributions = _distributions()
    for package, distribution in distributions:
        yield from unseen(package, "METADATA", _description(distribution))
    files = [
        *_standard_library(),
        *(file for package, found in distributions for file in _package_files(package, found)),
    ]
    with (
        worker_pool(len(os.sched_getaffinity(0)), "run the same command again") as pool,
        progress("reading documentation", len(files), "files") as advance,
    ):
        for file, found in zip(files, pool.map(extract_docs, [file.path for file in files], chunksize=16), strict=True):
            advance(1)
            for inner, text in found:
                yield from unseen(file.package, f"{file.name}.{inner}" if inner else file.name, text)


def _distributions() -> list[tuple[str, importlib.metadata.Distribution]]:
    """Return (normalized name, distribution), sorted by name. If a name is installed twice, the first one counts."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution)
    return sorted(found.items())


def _description(distribution: importlib.metadata.Distribution) -> str:
    payload = distribution.metadata.get_payload()  # type: ignore[attr-defined]
    return prose(payload) if isinstance(payload, str) else ""


def _standard_library() -> Iterator[_DocFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    yield from _select_docs("python", ((path, path.relative_to(root).as_posix()) for path in _python_files(root)))


def _python_files(folder: Path) -> Iterator[Path]:
    for directory, inside, names in os.walk(folder):
        inside[:] = sorted(set(inside) - {"site-packages", "dist-packages", "__pycache__"})
        yield from (Path(directory, name) for name in names if name.endswith(".py"))


def _package_files(package: str, distribution: importlib.metadata.Distribution) -> Iterator[_DocFile]:
    named = ((Path(str(file.locate())), file.as_posix()) for file in distribution.files or [])
    yield from _select_docs(package, ((path, name) for path, name in named if not name.startswith("..")))


def _select_docs(package: str, files: Iterator[tuple[Path, str]]) -> Iterator[_DocFile]:
    """Yield source files and documentation pages, sorted by name, without tests, licenses and data."""
    for path, name in sorted(files, key=lambda file: file[1]):
        source = path.suffix in (".py", ".pyi")
        page = path.suffix in (".rst", ".md") or (path.suffix == ".txt" and path.stem.lower().startswith("readme"))
        if not (source or page) or _TESTS.search(name) or _LEGAL.search(path.stem) or ".dist-info/" in name:
            continue
        yield _DocFile(str(path), package, _module_name(name) if source else name)


def _module_name(name: str) -> str:
    return name.rsplit(".", 1)[0].replace("/", ".").removesuffix(".__init__")
