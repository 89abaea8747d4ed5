"""The tutorials in docs/ run as they are written, on a small model and few documents."""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from documented import TUTORIALS, Terminal, commands, validate_configs, write_configs
from documented_files import CHINESE, write_chinese_text, write_lines, write_model, write_task
from rank_pool import RankPool
from runs import TINY, pretrain_case, run_config


@dataclass(frozen=True)
class Given:
    """What the tests have built already."""

    texts: list[str]
    tokenizer: Path
    corpus: Path
    pool: RankPool


def own_text(folder: Path, given: Given) -> None:
    write_model(folder / "bert-base-uncased", given.tokenizer)
    write_lines(folder / "papers/all.txt", given.texts * 2)
    write_task(folder, given.texts, word="ba")


def own_task(folder: Path, given: Given) -> None:
    write_model(folder / "bert-base-uncased", given.tokenizer)
    write_task(folder, given.texts, word="ba")
    changes = {"model__config": TINY | {"max_position_embeddings": 512}, "checkpoint__every_steps": 3}
    given.pool.run(pretrain_case, run_config(folder / "runs/mine", given.corpus, **changes))


def run_mlm(folder: Path, given: Given) -> None:
    write_model(folder / "bert-base-uncased", given.tokenizer)
    write_lines(folder / "train.txt", given.texts[:300])
    write_lines(folder / "validation.txt", given.texts[300:330])


def chinese(folder: Path, given: Given) -> None:
    write_model(folder / "bert-base-chinese", sorted(set(CHINESE)))
    write_task(folder, write_chinese_text(folder), word="好")


PREPARED: dict[str, tuple[Callable[[Path, Given], None], str]] = {
    "docs/continue_a_model.md": (own_text, "my-bert/model.safetensors"),
    "docs/compare_on_your_task.md": (own_task, "labels.csv"),
    "docs/from_run_mlm.md": (run_mlm, "my-model/model.safetensors"),
    "docs/chinese.md": (chinese, "labels.csv"),
}
"""Page -> what makes the files that its reader has, and a file that its reader has at the end."""


@pytest.mark.parametrize("page", TUTORIALS)
def test_a_tutorial_runs(
    page: str,
    tmp_path: Path,
    text_file: Path,
    wordpiece: Path,
    wordpiece_corpus: Path,
    pools: dict[int, RankPool],
    handed_over: Mapping[str, str],
) -> None:
    """Catches a tutorial with a command or a config that does not work."""
    prepare, result = PREPARED[page]
    texts = text_file.read_text(encoding="utf-8").splitlines()
    prepare(tmp_path, Given(texts, wordpiece, wordpiece_corpus, pools[1]))
    write_configs(page, tmp_path)
    found = commands(page)
    assert len(found) > 4
    with closing(Terminal(tmp_path, variables=handed_over)) as terminal:
        for command in found:
            if command.mark is None:
                terminal.run(command)
    assert (tmp_path / result).is_file()
    validate_configs(page, tmp_path)
