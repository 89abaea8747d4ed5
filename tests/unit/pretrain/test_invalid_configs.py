"""`deepcloze pretrain` rejects invalid configs with exit code 2 and one message."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig, BertForMaskedLM

from experiment.config import build_config, dump_config, load_config
from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer, save_tokenizer
from launcher.cli import main
from pretrain.config import CheckpointConfig, PretrainConfig
from pretrain.schedule_config import ScheduleConfig
from runs import small_tree

TINY = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
Reject = Callable[..., str]


@pytest.fixture
def config(tmp_path: Path, wordpiece_corpus: Path) -> Path:
    """A valid config file."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(small_tree(tmp_path / "run", wordpiece_corpus)))
    return path


@pytest.fixture
def start(tmp_path: Path, wordpiece: Path) -> Path:
    """A Hugging Face folder for model.init_from."""
    tokenizer, folder = load_tokenizer(wordpiece), tmp_path / "start"
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=500, pad_token_id=tokenizer.pad_token_id, **TINY)).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture
def rejected_message(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Reject:
    """Returns a function that calls `deepcloze pretrain`, checks that it is rejected, and returns the message."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr("launcher.launch.held_ranks", lambda *_: nullcontext())  # no ranks while the config is checked

    def command(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["pretrain", "--config", str(config), *arguments]) == 2
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        assert printed.err.startswith("deepcloze: ")
        assert printed.out == ""
        return printed.err.removeprefix("deepcloze: ").strip()

    return command


def test_the_config_itself_is_valid(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Catches a config that is rejected for another reason than the one that a test is about, and a dry run that
    writes files."""
    assert main(["pretrain", "--config", str(config), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "launcher.ranks.start_rank" in printed
    assert "max_seq_length: 32" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--corpus.eval={{'': corpora/held}}"], ["'corpus.eval'", "a name for each corpus", "corpora/held"]),
        (["--model.added_tokens=/nowhere"], ["model.added_tokens", "/nowhere"]),
        (["--model.added_tokens={byte_level}"], ["model.added_tokens", "{byte_level}", "does not extend"]),
        (["--model.max_positions=100"], ["model.max_positions is 100", "512"]),
        (["--batch.max_seq_length=600", "--batch.microbatch_tokens=600", "--model.max_positions=599"], ["599"]),
        (["--run.resume={start}"], ["'run.resume'", "{start}", "has no complete checkpoint"]),
    ],
)
def test_values_that_do_not_fit_init_from_are_rejected(
    rejected_message: Reject, start: Path, byte_level: Path, arguments: list[str], parts: list[str]
) -> None:
    """Catches another tokenizer or position limit than the model's that is rejected only after the launch."""
    named = {"start": start, "byte_level": byte_level}
    filled = [argument.format(**named) for argument in arguments]
    message = rejected_message(f"--model.init_from={start}", "--model.config=null", *filled)
    for part in parts:
        assert part.format(**named) in message


def test_word_masking_needs_word_boundaries(rejected_message: Reject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that fails at its first batch because its tokenizer has no word boundaries."""
    monkeypatch.setattr("pretrain.batching.vocabulary.word_boundaries", lambda _json: None)
    message = rejected_message("--masking.unit=word")
    assert "masking.unit is 'word'" in message
    assert "expected 'token'" in message


def test_urls(rejected_message: Reject, wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches URLs that are taken for folders, messages that name the key twice, and mirrors that cannot be written,
    which a run would find out at its first checkpoint."""
    message = rejected_message("--run.dir=s3://b/run")
    assert "'run.dir': expected a folder, found the URL s3://b/run; see 'checkpoint.mirror'" in message
    for mirror in ("mirror", "https://host/x", "S3://bucket/x", "foo://x", "s3://", "s3:///x", "file://x", "file:///"):
        with pytest.raises(ValueError, match=f"expected a URL of s3://.*, found '{mirror}'"):
            CheckpointConfig(mirror=mirror)
    message = rejected_message("--checkpoint.mirror=mirror")
    assert "'checkpoint.mirror': expected a URL of s3://, gs://, hf:// or file:///, such as s3://bucket/" in message
    message = rejected_message("--checkpoint.mirror=s3://b/run[1]")
    assert "'checkpoint.mirror': expected a URL without *, ? or [" in message
    cache = f"--corpus.cache={tmp_path / 'cache'}"
    message = rejected_message(cache, "--corpus.train=ftp://h/x")
    assert "deepcloze: corpus.train: ftp://h/x/manifest.json: unknown protocol 'ftp'; expected one of s3://," in message
    message = rejected_message(cache, "--corpus.cache_gib=0.00001", f"--corpus.train=file://{wordpiece_corpus}")
    assert re.search(r"deepcloze: corpus.cache_gib is 1e-05, but the corpora take .* GiB$", message)


def test_a_budget_needs_a_unit() -> None:
    """Catches the advice to write a number in quotes, which is no duration either."""
    with pytest.raises(UserError, match=r"'budget': '48' is not a duration such as 90s, 30m, 24h or 1d12h"):
        build_config(ScheduleConfig, {"budget": 48})


def test_the_default_rate_is_too_high_to_continue_a_model() -> None:
    """Catches a model of the Hub that forgets what it has learned silently, and a warning about a rate that was
    chosen."""
    tree: dict[str, Any] = {"run": {"dir": "r"}, "corpus": {"train": "c"}, "schedule": {"steps": 9}}
    scratch, start = {"model": {"config": {"model_type": "bert"}}}, {"model": {"init_from": "bert-base-uncased"}}
    (line,) = build_config(PretrainConfig, tree | start | {"optimizer": {"weight_decay": 0.1}}, {}).warnings(None)
    assert line == "optimizer.lr is 0.0005, for training from scratch: to continue a model, set 5e-5"
    for chosen in (scratch, start | {"optimizer": {"lr": 5e-4}}):
        assert not list(build_config(PretrainConfig, tree | chosen, {}).warnings(None))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"every_steps": None, "every_minutes": 10}, "null"),
        ({"every_steps": 300}, "300"),
        ({"every_steps": 500}, None),
        ({"every_steps": 5000}, None),
        ({"every_steps": None, "every_minutes": 10, "keep_every": 1}, None),
        ({}, None),  # 100
    ],
)
def test_milestones_that_are_not_saved(options: dict[str, Any], found: str | None) -> None:
    """Catches weeks of training of which the last checkpoints alone are left, without a word."""
    tree: dict[str, Any] = {"run": {"dir": "r"}, "corpus": {"train": "c"}, "schedule": {"steps": 9}}
    tree |= {"model": {"config": {"model_type": "bert"}}, "checkpoint": {"keep_every": 1000, **options}}
    expected = f"checkpoint.keep_every is 1000: few of these steps are saved, as checkpoint.every_steps is {found}"
    assert list(build_config(PretrainConfig, tree, {}).warnings(None)) == ([] if found is None else [expected])


@pytest.mark.parametrize(
    ("text", "value"), [("on", True), ("off", False), ("true", True), ("false", False), ("auto", "auto")]
)
def test_compile_takes_on_and_off(config: Path, tmp_path: Path, text: str, value: bool | str) -> None:
    """Catches `on` and `off`, which YAML 1.2 reads as text, that are rejected, or both taken for true."""
    file, dumped = tmp_path / "with-compile.yaml", tmp_path / "dumped.yaml"
    file.write_text(config.read_text().replace("engine:", f"engine:\n  compile: {text}"))
    loaded = load_config(PretrainConfig, file)
    assert loaded.engine.compile == value
    assert load_config(PretrainConfig, config, {"engine.compile": text}) == loaded
    dumped.write_text(dump_config(loaded))
    assert load_config(PretrainConfig, dumped) == loaded
