"""Cleanings of lines of text, in this process."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiment.config import build_config
from experiment.decontamination import EvaluationText
from pretrain.cleaning import run
from pretrain.cleaning.config import CleanConfig

Clean = Callable[..., dict[str, Any]]


@pytest.fixture
def clean(tmp_path: Path) -> Clean:
    """Clean lines of text with steps; returns clean.json. The documents are in tmp_path/out."""

    def call(
        lines: Sequence[str], *steps: dict[str, Any], evaluated: Sequence[str] = (), **keys: Any
    ) -> dict[str, Any]:
        source = tmp_path / "in.txt"
        text = "".join(f"{line}\n" for line in lines)
        if not source.exists() or source.read_text(encoding="utf-8") != text:
            source.write_text(text, encoding="utf-8")
        tree = {"source": str(source), "output": str(tmp_path / "out"), "steps": list(steps), **keys}
        texts = [EvaluationText("test", f"test.tsv:{number}", text) for number, text in enumerate(evaluated, 2)]
        return dict(run.clean(build_config(CleanConfig, tree), lambda name: texts, 1))

    return call
