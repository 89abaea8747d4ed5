"""`deepcloze pretrain` rejects invalid configs with exit code 2 and one message."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from deepspeed.accelerator import get_accelerator
from transformers import BertConfig, BertForMaskedLM

from experiment.tokenizer import load_tokenizer, save_tokenizer
from launcher.cli import main
from launcher.hosts.machine import cpu_cores

TINY = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
Reject = Callable[..., str]


@pytest.fixture
def config(tmp_path: Path, wordpiece_corpus: Path) -> Path:
    """A valid config file."""
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

    def command(*arguments: str, file: Path = config) -> str:
        capsys.readouterr()
        assert main(["pretrain", "--config", str(file), *arguments]) == 2
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
    assert "launcher.start_rank" in printed
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
        (["--corpus.eval={'': corpora/held}"], ["'corpus.eval'", "a name for each corpus", "corpora/held"]),
        (["--engine.ds_config=nothing.json"], ["engine.ds_config", "nothing.json", "bf16_zero1.json"]),
        (["--model.config.model_type=brt"], ["unknown model type 'brt'", "'bert'"]),
        (["--model.config.hiden_size=24"], ["'model.config.hiden_size'", "'hidden_size'"]),
        (["--model.freeze=[embeding]", "--model.freeze_steps=2"], ["model.freeze", "'embeding'", "'embeddings'"]),
        (["--batch.max_seq_length=65", "--batch.microbatch_tokens=100"], ["max_seq_length is 65", "64"]),
        (["--model.init_from=/nowhere/at/all"], ["model.init_from", "/nowhere/at/all"]),
        (["stray"], ["stray"]),
    ],
)
def test_invalid_values_are_rejected(rejected_message: Reject, arguments: list[str], parts: list[str]) -> None:
    """Catches traces, messages without the key or the value, and values that are rejected only after the launch."""
    message = rejected_message(*arguments)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_missing_file_is_rejected(rejected_message: Reject, tmp_path: Path) -> None:
    """Catches a trace for a misspelled file name."""
    assert str(tmp_path / "no.yaml") in rejected_message(file=tmp_path / "no.yaml")


def test_the_line_of_the_file_is_named(rejected_message: Reject, config: Path) -> None:
    """Catches messages about a file without the line."""
    config.write_text(config.read_text().replace("sequences: 8", "sequences: eight"))
    line = 1 + config.read_text().splitlines().index("  sequences: eight")
    assert f"{config}, line {line}: 'batch.sequences'" in rejected_message()


def test_more_ranks_than_cores_are_rejected(rejected_message: Reject) -> None:
    """Catches ranks that share cores because of a typo."""
    message = rejected_message(f"--num_gpus={cpu_cores() + 1}")
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
def test_values_that_do_not_fit_init_from_are_rejected(
    rejected_message: Reject, start: Path, byte_level: Path, arguments: list[str], parts: list[str]
) -> None:
    """Catches another tokenizer or position limit than the model's that is rejected only after the launch."""
    named = {"start": start, "byte_level": byte_level}
    filled = [argument.format(**named) for argument in arguments]
    message = rejected_message(f"--model.init_from={start}", "--model.config=null", *filled)
    for part in parts:
        assert part.format(**named) in message


def test_an_unsupported_precision_is_rejected(rejected_message: Reject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a launch that fails inside DeepSpeed, and a message that does not name what to use instead."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    message = rejected_message("--engine.ds_config=ds_configs/fp16_zero2.json")
    assert "fp16" in message
    assert "ds_configs/bf16_zero" in message


def test_word_masking_needs_word_boundaries(rejected_message: Reject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that fails at its first batch because its tokenizer has no word boundaries."""
    monkeypatch.setattr("pretrain.batching.vocabulary.word_boundaries", lambda _json: None)
    message = rejected_message("--masking.unit=word")
    assert "masking.unit is 'word'" in message
    assert "expected 'token'" in message


def test_a_corpus_of_another_tokenizer_is_rejected(
    rejected_message: Reject, start: Path, byte_level_corpus: Path
) -> None:
    """Catches token ids that are valid in the model's vocabulary but stand for other tokens."""
    message = rejected_message(
        f"--model.init_from={start}", "--model.config=null", f"--corpus.train={byte_level_corpus}"
    )
    assert "another tokenizer" in message
    assert str(start) in message
    assert str(byte_level_corpus) in message
    message = rejected_message(f"--corpus.eval.other={byte_level_corpus}")
    assert "corpus.eval.other" in message
    assert "another tokenizer" in message


def test_a_seed_that_torch_does_not_take_is_rejected(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback in the ranks."""
    assert main(["pretrain", "--config", str(config), f"--run.seed={2**64}", "--dry_run"]) == 2
    assert "'run.seed': should be less than" in capsys.readouterr().err


def test_an_empty_run_folder_is_rejected(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches `--run.dir=$UNSET`, which would fill the working directory with the files of a run."""
    assert main(["pretrain", "--config", str(config), "--run.dir="]) == 2
    assert "'run.dir': expected a path, found an empty text" in capsys.readouterr().err


def test_a_run_folder_with_a_nul_character_is_rejected(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback: YAML can write such a path, but no system can open it."""
    tree = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(tree | {"run": {"dir": "a\0b"}}))
    assert main(["pretrain", "--config", str(config)]) == 2
    expected = (
        f"{config}, line {1 + config.read_text().splitlines().index('run:') + 1}: 'run.dir': a path cannot contain"
    )
    assert expected in capsys.readouterr().err
