"""The YAML dialect of configs: plain scalars as in YAML 1.2, and no duplicate keys.

`5e-4` is a number; dates, `on`, `yes`, `010` and `1_000` are text.
"""

import copy
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

import yaml

_MAX_VALUES = 100_000  # in a document, counted again for each alias

_FULL_WIDTH = re.compile("[：，＃［］｛｝＂＇\u3000]")  # whose ASCII forms are syntax
_TEXT = re.compile(r"""(?:^|\s)#.*|"[^"]*"|'[^']*'""")  # comments and quoted values

KeyPath = tuple[str, ...]  # path of a value: keys and, in lists, indices


def read_yaml(text: str) -> Any:
    """Return the value of one YAML document. Raises yaml.YAMLError."""
    return read_yaml_with_lines(text)[0]


def read_yaml_with_lines(text: str) -> tuple[Any, dict[KeyPath, int]]:
    """(value, line of each key and list item, counted from 1) of one YAML document. Raises yaml.YAMLError."""
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        value = None if node is None else loader.construct_document(node)
        return value, dict(_lines(node, (), ()))
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def write_yaml(value: Any) -> str:
    """Return YAML text that `read_yaml`, or any other YAML reader, reads as `value`."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def explain_yaml(error: yaml.YAMLError) -> str:
    """Return ', line N: the problem', to append to the name of the file."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        if r"'\t'" in problem:
            problem = "found a tab: use spaces, not tabs"
        if not mark:
            return f": {problem}"
        first = (error.context_mark or mark).line - 1  # a key without a colon may go on in the next line
        lines = "\n".join((mark.buffer or "").split("\n")[max(first, 0) : mark.line + 1])
        return f", line {mark.line + 1}: {problem}{full_width_hint(_TEXT.sub('', lines))}"
    if isinstance(error, yaml.reader.ReaderError):
        return f": the character {chr(error.character)!r} at position {error.position} is not allowed in YAML"
    return f": {error}"


def full_width_hint(text: str) -> str:
    """Return the end of a message about text that has full-width punctuation, as of a Chinese keyboard; else empty."""
    if (found := _FULL_WIDTH.search(text)) is None:
        return ""
    return f"; the full-width '{found[0]}' is text in YAML; did you mean '{unicodedata.normalize('NFKC', found[0])}'?"


class Loader(yaml.SafeLoader):
    """Rejects what YAML loaders silently misread: duplicate keys, of which they keep the last, and `{steps:3}`, a key
    without a value. Rejects aliases of aliases that a few lines expand to billions of values, too.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values: dict[yaml.Node, int] = {}  # in each node

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        is_alias: bool = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        assert node is not None
        if not is_alias:  # an alias to a node that contains it is rejected later
            values = 1 + sum(self._values.get(child, 0) for _, _, child in _children(node))
            if values > _MAX_VALUES:
                problem = f"aliases make this more than {_MAX_VALUES:,} values"
                raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
            self._values[node] = values
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError) as error:  # such as a whole number of 10,000 digits
            kind = node.tag.rpartition(":")[2]
            problem = f"cannot read {str(node.value)[:20]!r} as {kind}: {str(error).partition(';')[0]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for number, (key, value) in enumerate(node.value):
            if isinstance(key, yaml.ScalarNode):
                name, colon, rest = key.value.partition(":")
                if node.flow_style and colon and key.style is None and value.value == "":
                    problem = f"write '{name}: {rest}', with a space after the colon"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                line = key.start_mark.line + 1
                if key.value in seen:
                    problem = f"duplicate key '{key.value}', already in line {seen[key.value]}"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen[key.value] = line
                if key.tag != "tag:yaml.org,2002:merge":  # as numbers, 1.1 and 1.10 would be the same
                    text = copy.copy(key)  # `key` may be a value with an anchor
                    text.tag = "tag:yaml.org,2002:str"
                    node.value[number] = (text, value)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes all text that our loader, or another, would read as something else."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # PyYAML writes U+0085 and similar characters unescaped, and reads them back as line breaks.
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


_PLAIN_VALUES = {
    "bool": (r"true|True|false|False", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.inf)|\.nan",
        "-+.0123456789",
    ),
}
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[1] in ("null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rsplit(":", 1)[1] in ("null", "bool", "int", "float", "str", "seq", "map")
}
for _name, (_pattern, _first) in _PLAIN_VALUES.items():
    for _class in (Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _lines(node: yaml.Node | None, key: KeyPath, parents: tuple[yaml.Node, ...]) -> Iterator[tuple[KeyPath, int]]:
    if node is None or node in parents:  # an alias may point to a node that contains it
        return
    for name, mark, value in _children(node):
        yield (*key, name), mark.start_mark.line + 1
        yield from _lines(value, (*key, name), (*parents, node))


def _children(node: yaml.Node) -> list[tuple[str, yaml.Node, yaml.Node]]:
    """Return (key or index, node where its line is, value) of each value in a mapping or list."""
    if isinstance(node, yaml.MappingNode):
        return [(str(name.value), name, value) for name, value in node.value]
    if isinstance(node, yaml.SequenceNode):
        return [(str(index), item, item) for index, item in enumerate(node.value)]
    return []
