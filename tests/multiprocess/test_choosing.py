"""The figures in docs/choosing.md are those of `deepcloze plan`."""

import contextlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from documented import CHOOSING, commands, configs, read_page
from launcher.cli import main
from pretrain.corpus.build import build_corpus
from pretrain.corpus.options import CorpusOptions
from runs import sampled

LINES = re.findall(r"^\| .*layers of .*", read_page(CHOOSING), re.MULTILINE)
COMMANDS = dict(zip(LINES, (command.text for command in commands(CHOOSING)), strict=True))
# Documents that fill all sequences of 128 tokens, and all of 1,024; two tokens of each are special.
_WORDS = 126 * 1022


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, wordpiece: Path) -> Path:
    """The files that the page names."""
    folder = tmp_path_factory.mktemp("choosing")
    for name, text in configs(CHOOSING).items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "text.txt").write_text("".join(f"{word} " * _WORDS + "\n" for word in "bd"), encoding="utf-8")
    options = {"source": folder / "text.txt", "tokenizer": wordpiece, "workers": 1}
    build_corpus(CorpusOptions(**options, output=folder / "corpora/books", holdout=1))
    return folder


def row(plan: dict[str, Any]) -> list[str]:
    """The cells after the name of the model. The text above a table has the tokens of a step."""
    parameters, cost = plan["parameters"]["total"], plan["cost"]
    tokens = plan["tokens"] or plan["budget_tokens"]
    _, needed = plan["zero"]["1"]["with_reserve"]
    assert plan["fits"]
    assert f"{plan['stages'][0]['batch']['tokens']:,} tokens per step" in read_page(CHOOSING)
    return [
        f"{parameters / 1e6:,.0f} M",
        f"{plan['steps'] or plan['budget_steps']:,}",
        f"{tokens / 1e9:,.3g} B",
        f"{tokens / parameters:,.0f}",
        f"{needed / 2**30:.0f} GiB",
        f"{cost['seconds'] / 3600:.3g}",
        f"{cost['price']:,.0f}",
    ]


@pytest.mark.parametrize("line", sampled(LINES, LINES[1:2]), ids=lambda line: line.split("|")[1].strip())
def test_the_page_has_the_figures_of_plan(line: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a page that promises other sizes, times and costs than `deepcloze plan`, after a change of either."""
    with contextlib.chdir(folder):
        assert main([*shlex.split(COMMANDS[line])[1:], "--json"]) == 0
    assert [cell.strip() for cell in line.split("|")[2:-1]] == row(json.loads(capsys.readouterr().out))
