"""Extract prose from Python source and documentation pages. Source is parsed, never imported."""

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

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
        if file.suffix in (".py", ".pyi"):
            found: Iterator[tuple[str, str]] = _in_source(file.read_bytes())
        else:
            found = iter([("", file.read_text(encoding="utf-8"))])
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


def _in_source(source: bytes) -> Iterator[tuple[str, str]]:
    if b'"""' not in source and b"'''" not in source:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code
        tree = ast.parse(source)
    yield from _in_node(tree, "")


def _in_node(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield docstrings, texts passed to functions such as `add_docstr`, and texts in dictionaries of help topics."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield name, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _in_node(child, f"{name}.{child.name}" if name else child.name)
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            if isinstance(child, ast.Expr | ast.Assign):
                yield from _in_expression(child.value, name)
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
        indent = len(line) - len(line.lstrip())
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
            continue
        if fenced:
            continue
        if not line.strip():
            doctest = False
            yield ""
            continue
        if block_indent is not None:
            if indent > block_indent:
                continue
            block_indent = None
        if line.lstrip().startswith(">>>"):
            doctest = True
        if doctest or _TABLE_ROW.match(line):
            continue
        if _RULE.match(line):  # an underlined heading is separate from the text after it
            yield ""
            continue
        admonition = _ADMONITION.match(line)
        if admonition:
            line = admonition[1] + line[admonition.end() :]
            if not line.strip():
                continue
        elif line.lstrip().startswith(".. "):
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
        if (
            paragraph
            and text
            and indent == paragraph_indent
            and not _LIST_ITEM.match(text)
            and not paragraph.endswith(":")
        ):
            paragraph += " " + text
            continue
        if paragraph:
            yield paragraph
        if not text:
            yield ""
        paragraph, paragraph_indent = text, indent
    if paragraph:
        yield paragraph
