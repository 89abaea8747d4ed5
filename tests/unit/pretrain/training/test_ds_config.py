import json
import logging
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from experiment.errors import UserError
from pretrain.training.ds_config import REPOSITORY, find_ds_config, precision_of, read_ds_config
from pretrain.training.engine import check_ds_config, check_precision, merged_ds_config

FILES = sorted((REPOSITORY / "ds_configs").glob("*.json"))


def test_there_is_a_file_for_each_precision_and_stage() -> None:
    """Catches a file that was lost or renamed: messages and recipes name them."""
    expected = {f"{precision}_zero{stage}" for precision in ("fp16", "bf16", "fp32") for stage in range(4)}
    assert expected <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_deepspeed_understands_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches keys that DeepSpeed refuses, files that belie their name, and DeepSpeed's default clipping of 1.0."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    config = read_ds_config(path)
    parsed = DeepSpeedConfig(merged_ds_config(config, grad_clip=0.7))
    precision, stage = path.stem.split("_")[0], int(path.stem.split("_")[1][-1])
    assert precision_of(config) == precision
    assert config["zero_optimization"]["stage"] == stage
    runs_as = 1 if precision != "fp32" and stage == 0 else stage
    assert parsed.zero_optimization_stage == runs_as
    assert parsed.gradient_clipping == (0.7 if runs_as else 0.0)
    assert parsed.float16_config.enabled == (precision == "fp16")
    assert parsed.bfloat16_config.enabled == (precision == "bf16")
    if precision != "fp32":
        assert parsed.communication_data_type is not None
        assert parsed.grad_accum_dtype == "fp32"


def test_stage_0_in_16_bit_runs_as_stage_1_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Catches DeepSpeed's own 16-bit stage 0, which takes an optimizer step while it is built."""
    with caplog.at_level(logging.WARNING):
        merged = merged_ds_config({"bf16": {"enabled": True}}, 1.0)
    assert merged["zero_optimization"]["stage"] == 1
    assert "ZeRO 0 in bf16 runs as ZeRO 1" in caplog.text


def test_merging_changes_no_argument() -> None:
    """Catches a second engine that is built from what the first one made of the file."""
    config: dict[str, Any] = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}
    before = json.dumps(config)
    merged_ds_config(config, 1.0)
    assert json.dumps(config) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not valid JSON"),
        ('{\n "bf16": {"enabled": true,}}', "line 2: not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"train_batch_size": 8}', "'train_batch_size' is set by batch.sequences"),
        ('{"gradient_clipping": 1.0}', "'gradient_clipping' is set by optimizer.grad_clip"),
        ('{"optimizer": {"type": "Adam"}}', "'optimizer' is set by the section 'optimizer'"),
        ('{"zero_optimization": {"reduce_bucket_size": "auto"}}', "'zero_optimization.reduce_bucket_size' is \"auto\""),
        ('{"zero_optimization": {"stage": 4}}', "'zero_optimization.stage' is 4"),
        ('{"zero_optimization": {"round_robin_gradients": true}}', "round_robin_gradients"),
        ('{"fp16": {"enabled": true}, "bf16": {"enabled": true}}', "both 'fp16' and 'bf16'"),
        ('{"zero_optimisation": {"stage": 3}}', "unknown key 'zero_optimisation'; did you mean 'zero_optimization'?"),
    ],
)
def test_what_the_runs_own_config_decides_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """Catches two places that say different things of the batch size, and values that only other frameworks fill in."""
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read_ds_config(path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"zero_optimization": {"stage": 1, "stge": 2}}', "stge"),
        ('{"bf16": {"enabled": "yess"}}', "yess"),
        ('{"communication_data_type": "fp33"}', "fp33"),
    ],
)
def test_what_deepspeed_refuses_is_refused_in_words(tmp_path: Path, text: str, named: str) -> None:
    """Catches a trace from inside DeepSpeed, after the devices are taken, for a misspelt value in the JSON."""
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        check_ds_config(read_ds_config(path), path)
    assert named in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    "text", ['{"bf16": true}', '{"zero_optimization": 2}', '{"zero_optimization": {"stage": "2"}}']
)
def test_a_section_of_the_wrong_type_is_refused(tmp_path: Path, text: str) -> None:
    """Catches a trace for a user's mistake in the JSON."""
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError, match=str(path)):
        precision_of(read_ds_config(path))


def test_a_file_is_looked_for_here_and_in_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches runs that only start in the repository's root, and a user's file that the repository's shadows."""
    monkeypatch.chdir(tmp_path)
    assert find_ds_config("ds_configs/bf16_zero1.json") == REPOSITORY / "ds_configs" / "bf16_zero1.json"
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "bf16_zero1.json").write_text("{}")
    assert find_ds_config("ds_configs/bf16_zero1.json") == tmp_path / "ds_configs" / "bf16_zero1.json"
    with pytest.raises(UserError, match=r"no file 'mine\.json'.*bf16_zero1\.json"):
        find_ds_config("mine.json")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_precision_that_the_device_lacks_is_refused(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that dies in DeepSpeed, or trains on numbers the device emulates, without a word of what to use."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), f"is_{precision}_supported", lambda: False)
    other = {"fp16": "bf16_zero1.json", "bf16": "fp16_zero1.json"}[precision]
    with pytest.raises(UserError, match=f"cannot train in {precision}.*ds_configs/{other}"):
        check_precision({precision: {"enabled": True}})
    check_precision({})
