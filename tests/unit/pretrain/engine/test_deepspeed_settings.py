import json
import tomllib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from experiment.config import load_config
from experiment.errors import UserError
from experiment.files import REPOSITORY
from pretrain.config import PretrainConfig
from pretrain.ds_configs import find_ds_config, preset_or_path
from pretrain.engine.deepspeed_settings import (
    Precision,
    check_device_support,
    load_settings,
    parse_settings,
    uses_zero1_optimizer,
    warn_of_emulation,
)
from pretrain.engine.deepspeed_version import TESTED

PRECISIONS: tuple[Precision, ...] = ("fp16", "bf16", "fp32")
FILES = sorted((REPOSITORY / "ds_configs").glob("*.json"))


def engine_config(raw: dict[str, Any]) -> dict[str, Any]:
    return parse_settings(raw, Path("own.json")).engine_config(grad_clip=1.0)


def rejection(path: Path, text: str) -> str:
    """The message with which a file is rejected; it names the file."""
    path.write_text(text)
    with pytest.raises(UserError) as rejected:
        load_settings(str(path))
    assert str(path) in str(rejected.value)
    return str(rejected.value)


def test_there_is_a_preset_for_each_precision_stage_and_offload() -> None:
    """Catches a deleted or renamed file that messages and recipes name."""
    kinds = [f"zero{stage}" for stage in range(4)]
    kinds += [f"zero{stage}_{device}_offload" for stage in (2, 3) for device in ("cpu", "nvme")]
    assert {path.stem for path in FILES} == {f"{precision}_{kind}" for precision in PRECISIONS for kind in kinds}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_deepspeed_accepts_the_preset(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches keys that DeepSpeed rejects, files that do not match their name, and DeepSpeed's default clipping."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    settings = load_settings(str(path))
    parsed = DeepSpeedConfig(settings.engine_config(grad_clip=0.7))
    precision, kind, *offload = path.stem.split("_")
    stage, device = int(kind[-1]), offload[0] if offload else "none"
    assert settings.precision == precision
    assert settings.requested_zero_stage == stage
    assert settings.offload == device
    runs_as = 1 if precision != "fp32" and stage == 0 else 3 if device == "nvme" else stage
    assert parsed.zero_optimization_stage == runs_as == settings.zero_stage
    found = parsed.zero_config.offload_optimizer
    assert (str(found.device) if found else "none") == device
    assert parsed.gradient_clipping == 0.7
    assert not parsed.timers_config.enabled, "it waits for the GPU at each microbatch"
    assert parsed.float16_config.enabled == (precision == "fp16")
    assert parsed.bfloat16_config.enabled == (precision == "bf16")
    if precision != "fp32":
        assert parsed.communication_data_type is not None
        # `Zero1Optimizer` does not use this setting: its sums are always fp32.
        assert parsed.grad_accum_dtype == (precision if uses_zero1_optimizer(runs_as, settings.offload) else "fp32")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_gradients_are_accumulated_in_fp32_by_default(precision: str) -> None:
    """Catches a user's file without these keys, or with null, with which DeepSpeed would accumulate in 16 bit."""
    own = {precision: {"enabled": True}, "zero_optimization": {"stage": 2}}
    default = engine_config(own)
    assert (default["communication_data_type"], default["data_types"]) == ("fp32", {"grad_accum_dtype": "fp32"})
    given = {"communication_data_type": precision, "data_types": {"grad_accum_dtype": precision}}
    merged = engine_config(own | given)
    assert {key: merged[key] for key in given} == given
    unset = {"communication_data_type": None, "data_types": {"grad_accum_dtype": None}}
    assert engine_config(own | unset) == default
    assert engine_config({precision: {"enabled": True}})["communication_data_type"] == "fp32", "at ZeRO 1 too"


def test_overlap_comm_is_off_where_nothing_is_reduced_during_a_backward_pass() -> None:
    """Catches a trace of DeepSpeed, which refuses it at ZeRO 0 and 1."""
    sections = [engine_config({"zero_optimization": {"stage": stage, "overlap_comm": True}}) for stage in range(4)]
    assert [each["zero_optimization"]["overlap_comm"] for each in sections] == [False, False, True, True]


def test_null_stands_for_a_key_that_is_not_set(tmp_path: Path) -> None:
    """Catches null that is rejected in some places only: by us or by DeepSpeed."""
    zero = {"stage": None, "compute_grad_norm": None, "reduce_bucket_size": None, "offload_optimizer": None}
    raw = {"zero_optimization": zero | {"offload_param": {"device": None, "nvme_path": None}}, "bf16": None}
    raw |= {"fp16": {"enabled": None, "loss_scale": None}, "data_types": {"buffer_dtype": None}, "optimizer": None}
    (tmp_path / "ds.json").write_text(json.dumps(raw))
    settings = load_settings(str(tmp_path / "ds.json"))
    assert (settings.precision, settings.zero_stage, settings.offload) == ("fp32", 0, "none")


@pytest.mark.parametrize("stage", range(4))
def test_defaults_that_published_files_spell_out_are_accepted(tmp_path: Path, stage: int) -> None:
    """Catches a run whose file was accepted before, and that cannot be resumed after an upgrade."""
    zero = {"stage": stage, "legacy_stage1": False}
    raw = {"zero_optimization": zero, "prescale_gradients": False, "gradient_predivide_factor": 1.0}
    raw |= {"wall_clock_breakdown": False, "fp16": {"enabled": False, "loss_scale": 0, "hysteresis": 0}}
    raw |= {"steps_per_print": 0} if stage < 2 else {}
    (tmp_path / "ds.json").write_text(json.dumps(raw))
    assert load_settings(str(tmp_path / "ds.json")).raw == raw


def test_engine_config_does_not_change_its_input() -> None:
    """Catches a second engine that is built from a config that the first one changed."""
    config: dict[str, Any] = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}
    before = json.dumps(config)
    engine_config(config)
    assert json.dumps(config) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not valid JSON"),
        ('{\n "bf16": {"enabled": true,}}', "line 2: not valid JSON"),
        ('{"bf16": {}, "bf16": {}}', "the key 'bf16' appears twice"),
        ('{"wall_clock_breakdown": true}', "'wall_clock_breakdown' is not supported"),
        (f'{{"steps_per_print": {"9" * 10_000}}}', "has 10,000 digits"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "expected a JSON object, found list"),
        ('{"train_batch_size": 8}', "'train_batch_size' is set by batch.sequences"),
        ('{"gradient_clipping": 1.0}', "'gradient_clipping' is set by optimizer.grad_clip"),
        ('{"optimizer": {"type": "Adam"}}', "'optimizer' is set by the section 'optimizer'"),
        ('{"zero_optimization": {"reduce_bucket_size": "auto"}}', "'zero_optimization.reduce_bucket_size' is \"auto\""),
        ('{"bf16": {"enabled": "off"}}', "'bf16.enabled' is \"off\", expected true or false"),
        ('{"zero_optimization": {"stage": 2, "compute_grad_norm": 0}}', "'compute_grad_norm' is 0"),
        ('{"gradient_predivide_factor": 2.0}', "'gradient_predivide_factor' is set by deepcloze itself"),
        ('{"zero_optimization": {"stage": 2}, "prescale_gradients": true}', "'prescale_gradients' is set by deepcloze"),
        ('{"sparse_gradients": false}', "unknown key 'sparse_gradients'"),
        (
            '{"zero_optimization": {"stage": 2, "legacy_stage1": true}}',
            "legacy_stage1' was removed from DeepSpeed",
        ),
        ('{"zero_optimization": {"stage": 4}}', "'zero_optimization.stage' is 4"),
        ('{"zero_optimization": {"round_robin_gradients": true}}', "round_robin_gradients"),
        (
            '{"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}',
            "zenflow' replaces the optimizer",
        ),
        ('{"zero_optimization": {"stage": 3, "zero_quantized_weights": true}}', "zero_quantized_weights' would train"),
        ('{"zero_optimization": {"stage": 3, "zero_quantized_gradients": true}}', "_gradients' would sum"),
        ('{"zero_optimization": {"stage3_module_granularity_threshold": 500}}', "_threshold' loses gradients at ZeRO"),
        ('{"zero_optimization": {"module_granularity_threshold": 500}}', "_threshold' loses gradients at ZeRO"),
        ('{"zero_optimization": {"leaf_module": {"classes": ["BertLayer"]}}}', "leaf_module' loses gradients"),
        ('{"fp16": {"enabled": true}, "bf16": {"enabled": true}}', "both 'fp16' and 'bf16'"),
        ('{"zero_optimization": {"stage": 1, "cpu_offload": true}}', "cpu_offload' is an old name; use 'offload_opt"),
        ('{"zero_optimization": {"stage": 3, "cpu_offload_param": true}}', 'use \'offload_param\': {"device": "cpu"}'),
        (
            '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}',
            "needs at least ZeRO stage 1, found stage 0",
        ),
        ('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}', "needs at least ZeRO stage 3"),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": 5}}}',
            "'zero_optimization.offload_optimizer.nvme_path' is 5",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, '
            '"offload_param": {"device": "nvme"}}}',
            "needs 'offload_optimizer' there, too",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/a"}, '
            '"offload_param": {"device": "nvme", "nvme_path": "/b"}}}',
            "'nvme_path' of 'offload_optimizer' and 'offload_param' differ",
        ),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "disk"}}}',
            "'offload_optimizer.device': Input should be 'none', 'cpu' or 'nvme', found 'disk'",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}',
            "'offload_optimizer.ratio'",
        ),
        ('{"zero_optimization": {"stage": 3, "offload_optimizer": "cpu"}}', "expected a JSON object"),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "super_offload": true}}}',
            "'zero_optimization.offload_optimizer.super_offload' splits the optimizer in two",
        ),
        ('{"torch_autocast": {"enabled": false}}', "'torch_autocast' scales gradients"),
        ('{"fp16": {"enabled": true, "loss_scale": 128}}', "'fp16.loss_scale' sets a constant scale"),
        ('{"bf16": {"enabled": true, "bf16_optimizer_states": true}}', "'bf16.bf16_optimizer_states' keeps master"),
        ('{"fp16": {"enabled": true, "hysteresis": 0}}', "'fp16.hysteresis' is 0, expected at least 1"),
        ('{"fp16": {"enabled": true, "initial_scale_power": 64}}', "initial_scale_power' is 64, expected from -63"),
        ('{"fp16": {"enabled": true, "initial_scale_power": -64}}', "initial_scale_power' is -64, expected from -63"),
        ('{"steps_per_print": 0, "zero_optimization": {"stage": 2}}', "'steps_per_print' is 0, expected a number"),
        ('{"steps_per_print": "x", "zero_optimization": {"stage": 3}}', "'steps_per_print' is \"x\", expected"),
        ('{"zero_optimization": {"stage": 2, "allgather_bucket_size": 3}}', "allgather_bucket_size' is 3, expected an"),
        ('{"fp16": {"fp16_master_weights_and_grads": true}}', "keeps master weights in 16 bits; remove it"),
        ('{"data_types": {"grad_accum_dtype": "bf16"}}', '\'data_types.grad_accum_dtype\' is "bf16", expected "fp32"'),
        (
            '{"bf16": {"enabled": true}, "data_types": {"grad_accum_dtype": "fp23"}}',
            '\'data_types.grad_accum_dtype\' is "fp23", expected "fp32" or "bf16"',
        ),
        ('{"data_types": {"grad_acum_dtype": "bf16"}}', "'data_types.grad_acum_dtype' is not supported, only"),
        ('{"bf16": {"enabled": true}, "data_types": {"buffer_dtype": "bf16"}}', "buffer_dtype' is not supported"),
        ('{"data_types": "fp32"}', "'data_types' is \"fp32\", expected a JSON object"),
        ('{"torch_autocast": {"enabled": true, "dtype": "float16"}}', "remove it and enable 'fp16' or 'bf16'"),
        ('{"zero_optimization": {"stage": 2, "compute_grad_norm": false}}', "'compute_grad_norm' is false"),
        ('{"zero_optimisation": {"stage": 3}}', "unknown key 'zero_optimisation'; did you mean 'zero_optimization'?"),
    ],
)
def test_invalid_files_are_rejected(tmp_path: Path, text: str, message: str) -> None:
    """Catches values that contradict the run's config, "auto" values that only other frameworks fill in, and values
    with which updates would be skipped endlessly, clipped wrongly, lack gradients, or fail with a trace."""
    assert message in rejection(tmp_path / "ds.json", text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"zero_optimization": {"stage": 1, "stge": 2}}', "stge"),
        ('{"bf16": {"enabled": "yess"}}', "yess"),
        ('{"communication_data_type": "fp33"}', "fp33"),
    ],
)
def test_values_that_deepspeed_rejects_are_rejected(tmp_path: Path, text: str, named: str) -> None:
    """Catches a trace from inside DeepSpeed, after the launch, for a misspelled value in the JSON."""
    assert named in rejection(tmp_path / "ds.json", text)


@pytest.mark.parametrize(
    "text", ['{"bf16": true}', '{"zero_optimization": 2}', '{"zero_optimization": {"stage": "2"}}']
)
def test_a_section_of_the_wrong_type_is_rejected(tmp_path: Path, text: str) -> None:
    """Catches a trace for a mistake in the JSON."""
    rejection(tmp_path / "ds.json", text)


def test_files_are_found_here_or_in_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches runs that start only in the repository's root, and a preset that shadows a user's file."""
    monkeypatch.chdir(tmp_path)
    assert find_ds_config("ds_configs/bf16_zero1.json") == REPOSITORY / "ds_configs" / "bf16_zero1.json"
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "bf16_zero1.json").write_text("{}")
    assert find_ds_config("ds_configs/bf16_zero1.json") == tmp_path / "ds_configs" / "bf16_zero1.json"
    with pytest.raises(UserError, match=r"engine\.ds_config: .*no preset 'mine\.json'.*bf16_zero1"):
        load_settings("mine.json")


def test_presets_are_recorded_by_name(tmp_path: Path) -> None:
    """Catches a RUN/config.yaml that breaks when deepcloze is installed elsewhere, and a file of the user taken for a
    preset."""
    assert preset_or_path(find_ds_config("ds_configs/bf16_zero1.json")) == "bf16_zero1"
    own = tmp_path / "ds_configs" / "bf16_zero1.json"
    assert preset_or_path(own) == str(own)


def test_an_unknown_preset_is_reported_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a message without the place of the mistake, and a config that can be read only where its JSON is."""
    monkeypatch.chdir(tmp_path)
    tree = "run: {dir: a}\nmodel: {config: {model_type: bert}}\ncorpus: {train: b}\nschedule: {steps: 1}\nengine:\n"
    for name in ("bf16_zero9", "fp32_zero1", "mine.json", "/elsewhere/mine"):
        (tmp_path / "run.yaml").write_text(f"{tree}  ds_config: {name}\n")
        if name == "bf16_zero9":
            with pytest.raises(UserError, match=r"run\.yaml, line 6: .*no preset 'bf16_zero9'; did you mean"):
                load_config(PretrainConfig, tmp_path / "run.yaml")
        else:
            assert load_config(PretrainConfig, tmp_path / "run.yaml").engine.ds_config == name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("has", [("fp32",), ("fp16", "fp32"), ("bf16", "fp32")], ids="+".join)
def test_an_unsupported_precision_is_rejected_with_the_preset_to_use(
    path: Path, has: tuple[Precision, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that fails in DeepSpeed or trains in an emulated precision, and a message that names a preset with
    another stage or offload, or one that does not exist or is not supported either."""
    from deepspeed.accelerator import get_accelerator

    for precision in ("fp16", "bf16"):
        monkeypatch.setattr(
            get_accelerator(), f"is_{precision}_supported", lambda precision=precision: precision in has
        )
    settings = load_settings(str(path))
    monkeypatch.setattr("pretrain.engine.deepspeed_settings.check_nvme", lambda _: None)  # tested in test_offload.py
    wanted, _, kind = path.stem.partition("_")
    if wanted in has:
        check_device_support(settings)
        return
    with pytest.raises(UserError, match=f"cannot train in {wanted}") as rejected:
        check_device_support(settings)
    instead = find_ds_config(str(rejected.value).partition("--engine.ds_config=")[2])
    assert instead.stem == f"{has[0]}_{kind}"
    check_device_support(load_settings(str(instead)))


@pytest.mark.parametrize(
    ("device", "built", "expected"),
    [
        ((8, 0), "sm_75 sm_80 sm_90", ""),
        ((8, 9), "sm_80 sm_90a", ""),
        ((12, 1), "sm_80 sm_90 compute_90", ""),
        ((9, 0), "gfx942", ""),
        (
            (7, 5),
            "sm_75 sm_80",
            "cannot train in bf16; use --engine.ds_config=ds_configs/fp16_zero1",
        ),
        (
            (7, 0),
            "sm_75 sm_80 compute_120",
            "capability 7.0; install torch from another index, such as .*/cu126",
        ),
        ((12, 0), "sm_80 sm_90", "capability 12.0; install torch from another index, such as .*/cu130"),
    ],
)
def test_an_older_gpu_is_told_what_it_can_run(
    device: tuple[int, int], built: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches bf16 on a GPU without native bf16, a message that names fp32 there, and a torch build without code for
    the GPU."""
    accelerator = SimpleNamespace(device_name=lambda: "cuda", is_fp16_supported=lambda: True)
    accelerator.is_bf16_supported = lambda: True  # also where it is emulated
    monkeypatch.setattr("pretrain.engine.deepspeed_settings.get_accelerator", lambda: accelerator)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: device >= (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", built.split)
    with pytest.raises(UserError, match=expected) if expected else nullcontext():
        check_device_support(load_settings("bf16_zero1"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the precisions of a CPU")
def test_a_cpu_that_emulates_bf16_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that is several times slower than in fp32 silently, and a warning where bf16 is fast."""
    for native, preset, expected in (
        (True, "bf16_zero2", []),
        (False, "fp32_zero2", []),
        (False, "bf16_zero2", ["--engine.ds_config=ds_configs/fp32_zero2.json"]),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native})
        caplog.clear()
        warn_of_emulation(load_settings(preset))
        assert [record.getMessage().split()[-1] for record in caplog.records] == expected


def test_preset_for_offload_at_a_stage_without_one_is_of_the_next_stage() -> None:
    """Catches a message that names a file that does not exist."""
    own = {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    assert parse_settings(own, Path("own.json")).preset("bf16", "cpu") == "ds_configs/bf16_zero2_cpu_offload.json"


def test_the_nvme_path_may_be_that_of_the_weights() -> None:
    """Catches a run that swaps to its own folder although the file names a disk."""
    weights = {"device": "nvme", "nvme_path": "/disk"}
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme"}, "offload_param": weights}
    settings = parse_settings({"zero_optimization": zero}, Path("ds.json"))
    assert settings.nvme_path == Path("/disk")


@pytest.mark.parametrize("version", ["0.19.6", "0.20.0", "0.20.1+cu130"])
def test_other_releases_of_deepspeed_are_rejected(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an AttributeError in the middle of a step, after an upgrade."""
    monkeypatch.setattr(deepspeed, "__version__", version)
    with pytest.raises(UserError) as rejected:
        load_settings("fp32_zero1")
    assert str(rejected.value).startswith(f"DeepSpeed {version} is installed, but ")
    assert f"pip install 'deepspeed{TESTED}'" in str(rejected.value)


@pytest.mark.parametrize("version", ["0.19.7", "0.19.8+unknown", "0.19.9.dev20261101"])
def test_tested_releases_of_deepspeed_are_accepted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rejected build from source."""
    monkeypatch.setattr(deepspeed, "__version__", version)
    load_settings("fp32_zero1")


def test_the_wheel_requires_the_tested_releases() -> None:
    """Catches a wheel that installs with a DeepSpeed that was never tried."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"deepspeed{TESTED}" in project["dependencies"]
