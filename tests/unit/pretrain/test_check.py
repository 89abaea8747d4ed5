import logging
from pathlib import Path

import pytest

from experiment.configuration import build_config
from pretrain.check import check_run
from pretrain.config import PretrainConfig
from pretrain.corpus.build import build_corpus

TINY = {"model_type": "bert", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(("unit", "space", "warned"), [("word", "", True), ("word", " ", False), ("token", "", False)])
def test_words_in_text_without_spaces(
    tmp_path: Path, wordpiece: Path, caplog: pytest.LogCaptureFixture, unit: str, space: str, warned: bool
) -> None:
    """Catches a run over Chinese that masks single characters, or whole sentences, without a word said about it."""
    (tmp_path / "s.txt").write_text(space.join("你好世界今天天气") + "\n", encoding="utf-8")
    build_corpus(tmp_path / "s.txt", wordpiece, tmp_path / "corpus", workers=1)
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"config": TINY},
        "corpus": {"train": str(tmp_path / "corpus")},
        "masking": {"unit": unit},
        "batch": {"sequences": 8, "max_seq_length": 32, "microbatch_tokens": 64},
        "schedule": {"steps": 2},
        "engine": {"ds_config": "ds_configs/fp32_zero1.json"},
    }
    with caplog.at_level(logging.WARNING):
        check_run(build_config(PretrainConfig, tree), 1)
    assert ("--segmenter jieba" in caplog.text) == warned
