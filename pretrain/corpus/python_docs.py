"""The documentation of Python and the installed packages, as text to train on; `deepcloze python_docs`.

It consists of docstrings, package descriptions, .rst, .md and README pages, and the language reference that `help()`
shows. It needs no network, and its vocabulary and style differ from package to package, so it makes a good first
corpus. Source is parsed, never imported.
"""

import ast
import gc
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from experiment.errors import UserError, readable_disk_errors
from experiment.files import atomic_write, is_unicode
from experiment.process.cpu_cores import cpu_cores
from experiment.progress import progress
from pretrain.corpus.workers import worker_pool

_TESTS = re.compile(r"(?:^|/)(?:tests?|idle_test|conftest\.py|test_[^/]*\.py|[^/]*_test\.py)(?:/|$)")
_LEGAL = re.compile(r"licen[sc]e|copying|copyright|notice|authors|third.?party|vendor", re.IGNORECASE)
PYTHON = "python"  # the package name of the standard library


class PythonDoc(NamedTuple):
    """A docstring, page or package description. The fields are named as in the JSON lines."""

    text: str
    package: str  # name of the distribution; "python" for the standard library
    document: str  # unique name: package/module.qualified_name or package/path


class _DocFile(NamedTuple):
    """A file that may contain documentation."""

    path: str
    package: str
    name: str  # module name, or path inside the package


def write_python_docs(
    output: Path, packages: Collection[str] | None = None, files_per_package: int | None = None
) -> None:
    """`deepcloze python_docs`: write documents as JSON lines. Raises UserError if the file cannot be written."""
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; expected a file")
    counts: Counter[str] = Counter()
    characters = 0
    with (
        readable_disk_errors("--output: ", writes=True),
        atomic_write(output) as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        for doc in read_python_docs(packages, files_per_package):
            file.write(json.dumps(doc._asdict(), ensure_ascii=False) + "\n")
            counts[doc.package] += 1
            characters += len(doc.text)
    largest = ", ".join(f"{package} {count:,}" for package, count in counts.most_common(8))
    print(f"{output}: {counts.total():,} documents of {len(counts)} packages, {characters / 1e6:.1f} M characters")
    print(f"  most from: {largest}")


def read_python_docs(
    packages: Collection[str] | None = None, files_per_package: int | None = None
) -> Iterator[PythonDoc]:
    """Yield each text once, in an order that depends only on the installed packages.

    packages: None: all. Raises UserError for one that is not installed.
    files_per_package: at most, evenly spaced; None: all.
    """
    names: Counter[str] = Counter()
    seen: set[bytes] = set()

    def unseen(package: str, name: str, text: str) -> Iterator[PythonDoc]:
        if not is_unicode(text):  # half of a surrogate pair, which files and tokenizers refuse
            return
        identity = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if text and identity not in seen:
            seen.add(identity)
            document = f"{package}/{name}"
            names[document] += 1
            yield PythonDoc(text, package, document if names[document] == 1 else f"{document}#{names[document]}")

    distributions = _distributions()
    wanted = installed = {PYTHON, *(name for name, _ in distributions)}
    if packages is not None:
        wanted = {_normalized(name) for name in packages}
        if missing := wanted - installed:
            raise UserError(f"--packages: not installed: {', '.join(sorted(missing))}")
        distributions = [(name, found) for name, found in distributions if name in wanted]
    for package, distribution in distributions:
        payload = distribution.metadata.get_payload()  # type: ignore[attr-defined]
        yield from unseen(package, "METADATA", prose(payload) if isinstance(payload, str) else "")
    by_package = [_select_docs(package, _installed_files(found)) for package, found in distributions]
    if PYTHON in wanted:
        by_package = [_select_docs(PYTHON, _standard_library()), *by_package]
    files = [file for found in by_package for file in _spread(found, files_per_package)]
    with (
        # Syntax trees have no cycles: looking for some takes a seventh of the time.
        worker_pool(cpu_cores(), "run the same command again", gc.disable) as pool,
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
        metadata = distribution.metadata
        if "Name" in metadata:  # not if half uninstalled
            found.setdefault(_normalized(metadata["Name"]), distribution)
    return sorted(found.items())


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _spread(files: list[_DocFile], most: int | None) -> list[_DocFile]:
    count = len(files) if most is None else min(most, len(files))
    return [files[number * len(files) // count] for number in range(count)]


def _standard_library() -> Iterator[tuple[Path, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for directory, inside, names in os.walk(root):
        inside[:] = set(inside) - {"site-packages", "dist-packages", "__pycache__"}
        paths = (Path(directory, name) for name in names if name.endswith(".py"))
        yield from ((path, path.relative_to(root).as_posix()) for path in paths)


def _installed_files(distribution: importlib.metadata.Distribution) -> Iterator[tuple[Path, str]]:
    named = ((Path(str(file.locate())), file.as_posix()) for file in distribution.files or [])
    return ((path, name) for path, name in named if not name.startswith(".."))


def _select_docs(package: str, files: Iterator[tuple[Path, str]]) -> list[_DocFile]:
    """Return source files and documentation pages, sorted by name, without tests, licenses and data."""
    found = []
    for path, name in sorted(files, key=lambda file: file[1]):
        source = path.suffix in (".py", ".pyi")
        page = path.suffix in (".rst", ".md") or (path.suffix == ".txt" and path.stem.lower().startswith("readme"))
        if not (source or page) or _TESTS.search(name) or _LEGAL.search(path.stem) or ".dist-info/" in name:
            continue
        module = name.rsplit(".", 1)[0].replace("/", ".").removesuffix(".__init__")
        found.append(_DocFile(str(path), package, module if source else name))
    return found


_MIN_WORDS = 8
_MIN_LETTERS = 0.75  # share of letters and spaces; text with less is not prose
_RULE = re.compile(r"\s*[-=~^\"'`*#+_.|:\s]{3,}$")  # heading underlines, table borders
_TABLE_ROW = re.compile(r"\s*\|.*\|\s*$|\s*(?:\S+ {3,}){3,}\S+$")
_LIST_ITEM = re.compile(r"(?:[-*+•]|\d+[.)]|#+|\w[\w, *]* ?: ?\S.*|:\w.*)\s*")
_ADMONITION = re.compile(
    r"(\s*)\.\. (?:note|warning|tip|important|seealso|deprecated|versionadded|versionchanged|admonition)::\s*"
)
_MARKUP = (
    (re.compile(r"!?\[!?\[[^\]]*\]\([^)]*\)\]\([^)]*\)|!\[[^\]]*\]\([^)]*\)"), ""),  # badges, images
    (re.compile(r"\[([^\]\n]+)\]\([^)\n]*\)"), r"\1"),  # Markdown links
    (re.compile(r"(?::[\w+.-]+)+:`~?\.?([^`<\n]+?)(?:\s*<[^>`\n]*>)?`"), r"\1"),  # roles: :class:`~torch.Tensor`
    (re.compile(r"`([^`<\n]+?)\s*<[^>`\n]*>`_{0,2}"), r"\1"),  # reStructuredText links
    (re.compile(r"`+([^`\n]+)`+_{0,2}"), r"\1"),
    (re.compile(r"\*\*([^*\n]+)\*\*"), r"\1"),
    (re.compile(r"</?[a-zA-Z][^>\n]*>"), " "),
)


def extract_docs(path: str) -> list[tuple[str, str]]:
    """Return (name inside the file, prose) of each text in a .py, .pyi, .rst, .md or .txt file.

    The name is empty for a page. A file that cannot be read or parsed has no texts.
    """
    file = Path(path)
    try:
        is_source = file.suffix in (".py", ".pyi")
        found = _in_source(file.read_bytes()) if is_source else [("", file.read_text(encoding="utf-8"))]
        cleaned = [(name, prose(text)) for name, text in found]
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):  # templates, Python 2, odd encodings
        return []
    return [(name, text) for name, text in cleaned if text]


def prose(text: str) -> str:
    """Remove examples, tables and markup, and join wrapped lines. Returns "" if little prose is left."""
    kept = "\n".join(_unwrapped(_without_code(inspect.cleandoc(text).splitlines())))
    for pattern, replacement in _MARKUP:
        kept = pattern.sub(replacement, kept)
    kept = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+", " ", kept)).strip()
    letters = sum(character.isalpha() or character.isspace() for character in kept)
    if len(kept.split()) < _MIN_WORDS or letters < _MIN_LETTERS * len(kept):
        return ""
    return kept


def _in_source(source: bytes) -> Iterable[tuple[str, str]]:
    if b'"""' not in source and b"'''" not in source:
        return ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code
        return _in_node(ast.parse(source), "")


def _in_node(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield docstrings, texts passed to functions such as `add_docstr`, and texts in dictionaries of help topics."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield name, docstring
    for block in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, block, ()):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _in_node(child, f"{name}.{child.name}" if name else child.name)
            elif isinstance(child, ast.Expr | ast.Assign):
                yield from _in_expression(child.value, name)
            else:
                yield from _in_node(child, name)


def _in_expression(value: ast.expr, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, ast.Call) and "doc" in ast.unparse(value.func).lower() and value.args:
        about = ast.unparse(value.args[0])[:80]
        for argument in ast.walk(value):
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str) and "\n" in argument.value:
                yield f"{name}.{about}" if name else about, argument.value
    elif isinstance(value, ast.Dict) and name == "":
        for key, text in zip(value.keys, value.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(text, ast.Constant) and isinstance(text.value, str):
                yield str(key.value), text.value


def _without_code(lines: list[str]) -> Iterator[str]:
    fenced = doctest = False
    block_indent: int | None = None  # of the line whose indented block is skipped
    for line in lines:
        text = line.lstrip()
        indent = len(line) - len(text)
        if text.startswith(("```", "~~~")):
            fenced = not fenced
            continue
        if fenced:
            continue
        if not text:
            doctest = False
            yield ""
            continue
        if block_indent is not None and indent > block_indent:
            continue
        block_indent = None
        doctest = doctest or text.startswith(">>>")
        if doctest or _TABLE_ROW.match(line):
            continue
        if _RULE.match(line):  # an underlined heading is separate from the text after it
            yield ""
            continue
        if admonition := _ADMONITION.match(line):
            line = admonition[1] + line[admonition.end() :]
            if not line.strip():
                continue
        elif text.startswith(".. "):
            block_indent = indent
            continue
        if line.rstrip().endswith("::"):
            block_indent = indent
            line = line.rstrip()[:-1]
            if line.strip() == ":":
                continue
        yield line


def _unwrapped(lines: Iterator[str]) -> Iterator[str]:
    """Join the lines of a paragraph: those with the same indent that do not start a list item."""
    paragraph, paragraph_indent = "", 0
    for line in lines:
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        is_next = text and indent == paragraph_indent and not _LIST_ITEM.match(text)
        if paragraph and is_next and not paragraph.endswith(":"):
            paragraph += " " + text
            continue
        if paragraph:
            yield paragraph
        if not text:
            yield ""
        paragraph, paragraph_indent = text, indent
    if paragraph:
        yield paragraph
