import ast
from pathlib import Path

ENGINE = sorted((Path(__file__).resolve().parents[4] / "pretrain" / "engine").glob("*.py"))
PUBLIC_MODULES = {"deepspeed", "deepspeed.accelerator", "deepspeed.runtime.config", "deepspeed.utils"}


def test_modules_are_imported_in_one_place() -> None:
    """Catches an import whose module a release may move, outside of the list."""
    for path in ENGINE:
        if path.stem != "deepspeed_internals":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
            assert {name for name in imported if name.startswith("deepspeed")} <= PUBLIC_MODULES, path
