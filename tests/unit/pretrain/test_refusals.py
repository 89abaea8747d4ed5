"""What keeps a pretraining from starting ends `deepcloze pretrain` with exit code 2 and one message."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from deepspeed.accelerator import get_accelerator
from transformers import BertConfig, BertForMaskedLM

from experiment.tokenizer import load_tokenizer, save_tokenizer
from launcher.cli import main
from launcher.machine import cpu_cores

TINY = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
Refuse = Callable[..., str]


@pytest.fixture
def config(tmp_path: Path, wordpiece_corpus: Path) -> Path:
    """A config file that would start."""
    path = tmp_path / "run.yaml"
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"config": {"model_type": "bert", **TINY, "max_position_embeddings": 64}},
        "corpus": {"train": str(wordpiece_corpus)},
        "batch": {"sequences": 8, "max_seq_length": 32, "microbatch_tokens": 64},
        "schedule": {"steps": 2},
        "engine": {"ds_config": "ds_configs/fp32_zero1.json"},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def start(tmp_path: Path, wordpiece: Path) -> Path:
    """A Hugging Face folder that a run may begin with."""
    tokenizer, folder = load_tokenizer(wordpiece), tmp_path / "start"
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=500, pad_token_id=tokenizer.pad_token_id, **TINY)).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture
def refuse(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Call `deepcloze pretrain`, which must refuse; returns the message."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def command(*arguments: str, file: Path = config) -> str:
        capsys.readouterr()
        assert main(["pretrain", "--config", str(file), *arguments]) == 2
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        assert printed.err.startswith("deepcloze: ")
        assert printed.out == ""
        return printed.err.removeprefix("deepcloze: ").strip()

    return command


def test_the_config_itself_starts(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Catches a config that is refused for another reason than the one each test below is about; and a dry run that
    leaves something behind."""
    assert main(["pretrain", "--config", str(config), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "pretrain.run" in printed
    assert "max_seq_length: 32" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--optimizer.learning_rate=1"], ["unknown config key 'optimizer.learning_rate'"]),
        (["--batch.sequences=many"], ["'batch.sequences'", "many"]),
        (["--batch.sequences=0"], ["'batch.sequences'", "0"]),
        (["--batch.microbatch_tokens=16"], ["microbatch_tokens (16)", "max_seq_length (32)"]),
        (["--masking.mask_share=0.95"], ["mask_share + random_share"]),
        (["--schedule.epochs=1"], ["exactly one of 'steps', 'epochs'"]),
        (["--run.resume=sometimes"], ["'run.resume'", "sometimes"]),
        (["--corpus.train=/nowhere/at/all"], ["corpus.train", "/nowhere/at/all"]),
        (["--corpus.eval.held=/nowhere/at/all"], ["corpus.eval.held", "/nowhere/at/all"]),
        (["--engine.ds_config=nothing.json"], ["engine.ds_config", "nothing.json", "bf16_zero1.json"]),
        (["--model.config.model_type=brt"], ["unknown model type 'brt'", "'bert'"]),
        (["--model.config.hiden_size=24"], ["'model.config.hiden_size'", "'hidden_size'"]),
        (["--model.freeze=[embeding]", "--model.freeze_steps=2"], ["model.freeze", "'embeding'", "'embeddings'"]),
        (["--batch.max_seq_length=65", "--batch.microbatch_tokens=100"], ["max_seq_length is 65", "64"]),
        (["--model.init_from=/nowhere/at/all"], ["model.init_from", "/nowhere/at/all"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_bad_value_is_refused(refuse: Refuse, arguments: list[str], parts: list[str]) -> None:
    """Catches traces, messages that name neither the key nor the value, and bad values found after the launch."""
    message = refuse(*arguments)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_missing_file_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    """Catches a trace where the config's name is misspelled."""
    assert str(tmp_path / "no.yaml") in refuse(file=tmp_path / "no.yaml")


def test_the_line_of_the_file_is_named(refuse: Refuse, config: Path) -> None:
    """Catches messages about a file that leave its reader to search it."""
    config.write_text(config.read_text().replace("sequences: 8", "sequences: eight"))
    line = 1 + config.read_text().splitlines().index("  sequences: eight")
    assert f"{config}, line {line}: 'batch.sequences'" in refuse()


def test_more_ranks_than_cores_are_refused(refuse: Refuse) -> None:
    """Catches ranks that fight for cores because of a typo."""
    message = refuse(f"--num_gpus={cpu_cores() + 1}")
    assert str(cpu_cores()) in message
    assert "--oversubscribe" in message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model.added_tokens=/nowhere"], ["model.added_tokens", "/nowhere"]),
        (["--model.added_tokens={byte_level}"], ["model.added_tokens", "{byte_level}", "does not extend"]),
        (["--model.max_positions=100"], ["model.max_positions is 100", "512"]),
        (["--batch.max_seq_length=600", "--batch.microbatch_tokens=600", "--model.max_positions=599"], ["599"]),
        (["--run.resume={start}"], ["'run.resume'", "{start}", "has no complete checkpoint"]),
    ],
)
def test_what_does_not_fit_the_model_that_goes_on_is_refused(
    refuse: Refuse, start: Path, byte_level: Path, arguments: list[str], parts: list[str]
) -> None:
    """Catches a model with other words or positions than the config says, found only when the devices are taken."""
    named = {"start": start, "byte_level": byte_level}
    filled = [argument.format(**named) for argument in arguments]
    message = refuse(f"--model.init_from={start}", "--model.config=null", *filled)
    for part in parts:
        assert part.format(**named) in message


def test_a_precision_the_device_lacks_is_refused(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a launch that dies inside DeepSpeed, and a refusal that does not say what to use."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    message = refuse("--engine.ds_config=ds_configs/fp16_zero2.json")
    assert "fp16" in message
    assert "ds_configs/bf16_zero" in message


def test_words_that_nothing_marks_are_refused(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run by words that dies with its first batch, where the tokenizer does not tell words apart."""
    monkeypatch.setattr("pretrain.batching.vocabulary.word_boundaries", lambda _json: None)
    message = refuse("--masking.unit=word")
    assert "masking.unit is 'word'" in message
    assert "expected 'token'" in message


def test_a_corpus_of_another_tokenizer_is_refused(refuse: Refuse, start: Path, byte_level_corpus: Path) -> None:
    """Catches token ids that fit a model's vocabulary and mean something else to it."""
    message = refuse(f"--model.init_from={start}", "--model.config=null", f"--corpus.train={byte_level_corpus}")
    assert "another tokenizer" in message
    assert str(start) in message
    assert str(byte_level_corpus) in message
    message = refuse(f"--corpus.eval.other={byte_level_corpus}")
    assert "corpus.eval.other" in message
    assert "another tokenizer" in message
