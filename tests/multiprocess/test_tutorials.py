"""The tutorials in docs/ run as they are written, on a small model and few documents."""

import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForMaskedLM, BertTokenizer

from experiment.tokenizer import save_tokenizer
from runs import TINY

DOCS = Path(__file__).parents[2] / "docs"
# Added to the commands: fewer steps, and no bf16, which this machine may lack.
FEWER = {
    "pretrain": ("--schedule.steps=3", "--schedule.epochs=null", "--engine.ds_config=fp32_zero1"),
    "finetune": ("--training.epochs=1", "--training.seeds=1", "--training.precision=fp32", "--tracking.wandb=disabled"),
}


def bert(folder: Path, vocabulary: list[str]) -> None:
    """A Hugging Face folder like one that is downloaded, small."""
    folder.mkdir()
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *vocabulary]
    (folder / "vocab.txt").write_text("\n".join(entries) + "\n", encoding="utf-8")
    config = AutoConfig.for_model(**TINY | {"max_position_embeddings": 512}, vocab_size=len(entries))
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    save_tokenizer(BertTokenizer(str(folder / "vocab.txt")), folder)


def english(folder: Path) -> None:
    words = ["the", "run", "was", "long", "loss", "fell", "slowly", "again"]
    bert(folder / "bert-base-uncased", words)
    draw = random.Random(1)
    for name, documents in (("train.txt", 300), ("validation.txt", 30)):
        lines = (" ".join(draw.choices(words, k=12)) for _ in range(documents))
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def chinese(folder: Path) -> None:
    characters = "我们在图书馆里学习自然语言处理的新方法今天气很好"
    bert(folder / "bert-base-chinese", sorted(set(characters)))
    draw = random.Random(1)
    texts = ["".join(draw.choices(characters, k=20)) for _ in range(300)]
    (folder / "news.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    for name in ("train.csv", "test.csv"):
        rows = [f"{text},{'好' if '好' in text else '其他'}" for text in texts[:60]]
        (folder / name).write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("page", "prepare", "result"),
    [
        ("from_run_mlm.md", english, "my-model/model.safetensors"),
        pytest.param("chinese.md", chinese, "labels.csv", marks=pytest.mark.soak),
    ],
)
def test_a_tutorial_runs(page: str, prepare: Callable[[Path], None], result: str, tmp_path: Path) -> None:
    """Catches a tutorial with a command or a config that does not work."""
    text = (DOCS / page).read_text(encoding="utf-8")
    prepare(tmp_path)
    for name, config in re.findall(r"```yaml\n# (\S+)\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(config, encoding="utf-8")
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert len(commands) > 4
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    for command in commands:
        program, name, *arguments = shlex.split(command)
        assert program == "deepcloze"
        argv = [str(Path(sys.executable).with_name("deepcloze")), name, *arguments, *FEWER.get(name, ())]
        done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / result).is_file()
