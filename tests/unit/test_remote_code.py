"""No code from a model's folder is run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("launcher", "pretrain", "finetune", "experiment", "benchmarks")
LOADERS = ("from_pretrained", "from_config")


def unsafe_uses(source: str) -> list[int]:
    """Lines that use a loader of transformers other than in a call with `trust_remote_code=False`."""
    tree = ast.parse(source)
    safe = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and any(ast.unparse(keyword) == "trust_remote_code=False" for keyword in node.keywords)
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in LOADERS and id(node) not in safe
    ]


def test_no_call_trusts_the_code_of_a_folder() -> None:
    """Catches a call without `trust_remote_code=False`: transformers then asks on stdin whether to run the code."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    sources = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in paths}
    assert sum(source.count(f".{name}(") for source in sources.values() for name in LOADERS) >= 7
    users = {path: source for path, source in sources.items() if any(name in source for name in LOADERS)}
    assert [f"{path}:{line}" for path, source in users.items() for line in unsafe_uses(source)] == []


@pytest.mark.parametrize(
    ("source", "safe"),
    [
        ("AutoModel.from_pretrained(folder, trust_remote_code=False)", True),
        ("getattr(transformers, name).from_config(config, trust_remote_code=False)", True),
        ("AutoConfig.from_pretrained(folder)", False),
        ("AutoModel.from_config(config, trust_remote_code=None)", False),
        ("AutoModel.from_pretrained(folder, trust_remote_code=trusted)", False),
        ("load = AutoModel.from_pretrained", False),
        ("AutoModel.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))", False),
    ],
)
def test_unsafe_uses_are_found(source: str, safe: bool) -> None:
    """Catches a check that accepts other values than False, or overlooks calls."""
    assert unsafe_uses(source) == ([] if safe else [1])
