"""`deepcloze plan`, from the command line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import pretrain.resolve
from experiment.errors import UserError
from experiment.run_files.run_folder import open_run_folder
from experiment.run_files.run_lock import lock_run
from launcher.cli import main
from launcher.hosts.machine import Devices, Machine, free_port
from pretrain.plan.cost import Device
from pretrain.resolve import ResolvedRun

pytestmark = pytest.mark.usefixtures("memory_measured_once")


@pytest.fixture
def config(tmp_path: Path, wordpiece_corpus: Path) -> Path:
    path = tmp_path / "run.yaml"
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {
            "config": {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        },
        "corpus": {"train": str(wordpiece_corpus)},
        "batch": {"sequences": 64, "max_seq_length": 64, "microbatch_tokens": 512},
        "schedule": {"epochs": 2, "warmup_steps": 3},
        "engine": {"ds_config": "ds_configs/bf16_zero3.json"},
    }
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def plan(capsys: pytest.CaptureFixture[str], config: Path, *flags: str) -> dict[str, Any]:
    assert main(["plan", "--config", str(config), "--json", *flags]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


H100 = ("--device", "H100", "--memory_gib", "80")


def test_plans_thousands_of_gpus(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan that needs the hosts or the devices, and warnings that are missing."""
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"node{number} slots=8\n" for number in range(512)), encoding="utf-8")
    found = plan(capsys, config, "--hostfile", str(hostfile), *H100, "--schedule.warmup_steps=1000", "--optimizer.lr=5")
    assert (found["hosts"], found["ranks"], found["zero_stage"], found["fits"]) == (512, 4096, 3, True)
    assert found["steps"] == found["stages"][0]["steps"] == 23
    text = "\n".join(found["warnings"])
    for expected in (
        "too small for a GPU",
        "fewer than the 4,096 ranks",
        "warmup_steps is 1,000",
        "lr is 5: usual",
    ):
        assert expected in text
    assert found["cost"]["seconds"] > 0
    assert found["cost"]["kwh"] is None
    assert not (tmp_path / "run").exists()


def test_plans_a_run_that_is_active(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a checkpoint called damaged because the run has deleted it in the meantime."""
    resolve = pretrain.resolve.resolve
    failures = iter([UserError("the checkpoint is damaged")])

    def resolve_later(*arguments: Any, **options: Any) -> ResolvedRun:
        if error := next(failures, None):
            raise error
        return resolve(*arguments, **options)

    monkeypatch.setattr(pretrain.resolve, "resolve", resolve_later)
    with lock_run(open_run_folder(tmp_path / "run")):
        assert plan(capsys, config)["steps_done"] == 0


def test_warns_of_the_device_of_other_machines(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a plan for the CPU of a login node, or of a laptop, in place of the GPUs of the hosts."""
    cpu = Machine(Devices("cpu", (0, 1)), {}, free_port)
    monkeypatch.setattr("launcher.plan_command.launch_machine", lambda: cpu)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("192.0.2.1 slots=1\n192.0.2.2 slots=1\n", encoding="utf-8")
    remote = ("--hostfile", str(hostfile))
    warning = "planned for this machine's device, cpu; name the one to plan for as --device"
    for flags, warns in (
        (remote, True),
        ((*remote, *H100), False),
        (("--num_gpus=2",), False),
        (("--num_gpus=3",), True),
        (("--num_gpus=3", *H100), False),
    ):
        assert main(["plan", "--config", str(config), "--json", *flags]) == 0
        assert (warning in capsys.readouterr().err) == warns, flags


def test_warns_of_a_gpu_that_nvidia_smi_does_not_list(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a plan for the CPU of a machine with GPUs: in a container without nvidia-smi, or if it is slow."""
    monkeypatch.setattr("launcher.plan_command.launch_machine", lambda: Machine(Devices("cuda", (0,)), {}, free_port))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["plan", "--config", str(config), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["device"] == {"name": "unknown GPU", "memory": None, "watts": None}
    assert "device, unknown GPU; name the one to plan for as --device" in printed.err
    assert main(["plan", "--config", str(config), "--json", *H100]) == 0
    assert "planned for this machine" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("devices", "name"),
    [
        (Devices("cpu", (0, 1), "torch cannot use it"), "cpu"),
        (Devices("cuda", (0,), "CUDA_VISIBLE_DEVICES=MIG-1: expected GPU numbers"), "A100 MIG"),
    ],
)
def test_needs_no_gpu_of_this_machine(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, devices: Devices, name: str
) -> None:
    """Catches a config that is refused because of the GPU of a machine on which it may never run, and a plan for this
    machine, or `deepcloze validate`, that does not say what would keep the run from starting here."""
    monkeypatch.setattr("launcher.plan_command.launch_machine", lambda: Machine(devices, {}, free_port))
    monkeypatch.setattr("launcher.run_sets.validation.launch_machine", lambda: Machine(devices, {}, free_port))
    monkeypatch.setattr("pretrain.plan.cost.local_gpu", lambda: Device("A100 MIG", None, None))
    for command, planned_for in ((["plan", "--json", *H100], "H100"), (["plan", "--json"], name), (["validate"], None)):
        assert main([*command, "--config", str(config), "--engine.ds_config=fp32_zero1"]) == 0
        printed = capsys.readouterr()
        assert (f"warning: {devices.problem}" in printed.err) == (planned_for != "H100")
        assert planned_for is None or json.loads(printed.out)["device"]["name"] == planned_for


def test_warns_of_what_this_cpu_lacks(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a plan that does not say why this machine is slow, and one that says it of other devices."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delattr(torch.cuda, "is_bf16_supported")  # it takes the device
    for architecture, features, flags, expected in (
        ("x86_64", ("avx512_f", "avx512_bf16"), (), []),
        ("x86_64", (), (), ["only emulates bf16", "no AVX-512"]),
        ("aarch64", (), (), ["only emulates bf16"]),
        ("x86_64", (), ("--engine.ds_config=ds_configs/fp32_zero1.json",), ["no AVX-512"]),
        ("x86_64", (), H100, []),
    ):
        capabilities = dict.fromkeys(features, True) | {"architecture": architecture}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        text = "\n".join(plan(capsys, config, "--num_gpus=1", *flags)["warnings"])
        assert [part for part in ("only emulates bf16", "no AVX-512") if part in text] == expected


def test_states_what_it_assumes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches figures of the user that are ignored, and a report without the defaults."""
    cheap = plan(capsys, config, "--num_gpus=8", *H100, "--mfu=0.5", "--price=2", "--watts=700", "--bandwidth=50")
    assert cheap["cost"]["price"] == pytest.approx(2 * cheap["cost"]["device_hours"])
    assert cheap["cost"]["kwh"] == pytest.approx(0.7 * cheap["cost"]["device_hours"])
    slow = plan(capsys, config, "--num_gpus=8", *H100, "--mfu=0.25", "--bandwidth=25")
    assert slow["cost"]["seconds"] == pytest.approx(2 * cheap["cost"]["seconds"])
    assert main(["plan", "--config", str(config), "--num_gpus=8", *H100]) == 0
    printed = capsys.readouterr().out
    for expected in ("8 × H100", "MFU 40%", "25 GB/s", "989.5 TFLOP/s", "it fits", "energy unknown (--watts)"):
        assert expected in printed


def test_a_device_without_a_known_peak(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan without costs that does not say which names it knows."""
    assert main(["plan", "--config", str(config), "--num_gpus=8", "--device=h800"]) == 0
    expected = "unknown: state the device's peak as --peak_tflops; known for V100S, V100-PCIE, V100, A100, H100 PCIe"
    assert expected in capsys.readouterr().out


def test_the_machine_with_the_most_ranks_counts(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches host memory for the mean of machines with different numbers of slots."""
    needed = []
    for slots in ((4, 4), (2, 6)):
        hostfile = tmp_path / "hosts"
        hostfile.write_text("".join(f"node{number} slots={each}\n" for number, each in enumerate(slots)))
        zero = plan(capsys, config, "--hostfile", str(hostfile), *H100)["zero"]
        needed.append(zero["3"]["checkpoint_memory"])
    assert needed[0] < needed[1]


@pytest.mark.parametrize(
    ("device", "ds_config", "flat"),
    [
        ("H100", "bf16_zero3", True),
        ("H100", "fp32_zero3", False),
        ("Tesla V100-SXM2-32GB", "fp16_zero3", False),
        ("cpu", "bf16_zero3", False),
    ],
)
def test_plans_the_rows_of_the_device(
    config: Path, capsys: pytest.CaptureFixture[str], device: str, ds_config: str, flat: bool
) -> None:
    """Catches packed rows, and a warning of padding, for a GPU that computes flat ones, and flat ones for others."""
    flags = ("--device", device, f"--engine.ds_config=ds_configs/{ds_config}.json")
    (stage,) = plan(capsys, config, "--num_gpus=1", *flags)["stages"]
    assert (stage["batch"]["largest"]["rows"] == 1) == flat


def test_a_gpu_without_bf16_is_rejected_as_for_a_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a run that is said to fit on GPUs that cannot train it."""
    assert main(["plan", "--config", str(config), "--num_gpus=1", "--device=Tesla T4"]) == 2
    expected = "engine.ds_config: Tesla T4 cannot train in bf16; use --engine.ds_config=ds_configs/fp16_zero3.json"
    assert expected in capsys.readouterr().err


def test_large_figures_have_no_exponent(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches device hours such as 4.608e+04."""
    slow = ("--device=cpu", "--peak_tflops=1e-9", "--watts=700", "--price=1")
    assert main(["plan", "--config", str(config), "--num_gpus=8", *slow]) == 0
    (cost,) = (line for line in capsys.readouterr().out.splitlines() if "device hours" in line)
    assert re.search(r"\d,\d{3} device hours; \d[\d,]* kWh", cost), cost


def test_a_model_type_with_unknown_flops(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback, and advice to state a peak, which is known and does not help."""
    monkeypatch.setattr("pretrain.plan.plan.flops_model", lambda model: None)
    assert main(["plan", "--config", str(config), "--num_gpus=8", *H100]) == 0
    printed = capsys.readouterr().out
    assert "forward and backward: unknown for this model type; packed\n" in printed
    assert printed.partition("time and cost\n")[2].splitlines()[1] == "  unknown for this model type"


def test_a_time_budget_that_ends_before_the_last_stage(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan of all steps of the first stage, for which the time does not suffice."""
    stages = "[{steps: 1000000}, {max_seq_length: 64}]"
    flags = ("--schedule.epochs=null", "--num_gpus=8", f"--schedule.stages={stages}", *H100)
    steps = [plan(capsys, config, *flags, f"--schedule.budget={budget}")["budget_steps"] for budget in ("1s", "2s")]
    assert 0 < steps[0] < 1_000_000
    assert steps[1] == pytest.approx(2 * steps[0], abs=1)


def test_a_time_budget_includes_the_stages_before_the_last(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan that takes the communication of the last stage for that of all: it is the same for each step, in
    the first stage with 64 sequences, in the last one with one."""
    common = ("--num_gpus=8", *H100)
    first = plan(capsys, config, *common, "--schedule.epochs=null", "--schedule.steps=1000000")["cost"]
    stages = "[{steps: 1000000}, {sequences: 1}]"
    budget = f"--schedule.budget={round(first['seconds']) + 1}s"
    both = plan(capsys, config, *common, "--schedule.epochs=null", f"--schedule.stages={stages}", budget)["cost"]
    assert both["computing"] == pytest.approx(first["computing"], rel=0.1)


def test_a_time_budget_of_less_than_a_step(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan of no step: a run takes one."""
    flags = ("--schedule.epochs=null", "--schedule.budget=1s", "--num_gpus=8", *H100, "--peak_tflops=1e-6")
    found = plan(capsys, config, *flags)
    assert found["budget_steps"] == 1
    assert found["budget_tokens"] == found["stages"][0]["mean"]["tokens"]


def test_a_time_budget(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan that does not say how far a budget reaches, and a table that is wider than a terminal."""
    flags = ("--schedule.epochs=null", "--schedule.budget=1h", "--num_gpus=8", *H100)
    found = plan(capsys, config, *flags)
    assert found["steps"] is found["tokens"] is None
    assert found["cost"]["seconds"] == pytest.approx(3600)
    assert found["budget_tokens"] == found["budget_steps"] * found["stages"][0]["mean"]["tokens"] > 0
    assert main(["plan", "--config", str(config), *flags]) == 0
    printed = capsys.readouterr().out
    steps, tokens = found["budget_steps"], float(f"{found['budget_tokens']:.3g}")
    assert f"in all about {steps:,} steps, {tokens:,.0f} tokens, in 1h" in printed
    _, _, table = printed.partition("for checkpoints\n")
    assert max(map(len, table.partition("communication")[0].splitlines())) < 80


def test_says_what_does_not_fit(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a run that is said to fit into memory that it exceeds."""
    found = plan(capsys, config, "--num_gpus=8", "--device=H100", "--memory_gib=3.3")
    assert found["fits"] is False
    assert found["zero"]["3"]["memory"]["buffers"] > 1e9
    assert "use ZeRO 1" in found["warnings"][0]


@pytest.mark.parametrize(
    ("flags", "warns"),
    [
        (("--batch.microbatch_tokens=128",), True),  # ZeRO 3 gathers the weights and reduces gradients four times
        ((), False),  # once
        (("--num_gpus=1", "--batch.microbatch_tokens=128"), False),
        (("--batch.microbatch_tokens=128", "--engine.ds_config=ds_configs/bf16_zero3_nvme_offload.json"), False),
    ],
)
def test_advises_against_zero_3_where_zero_1_communicates_less(
    config: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], warns: bool
) -> None:
    """Catches advice that the figures of the plan contradict, or that names a stage which cannot offload to NVMe."""
    found = plan(capsys, config, "--num_gpus=8", *H100, *flags)
    sent = {stage: each["sent_per_step"] for stage, each in found["zero"].items()}
    assert (sent["3"] > sent.get("1", sent["3"])) == warns
    assert any("ZeRO 1 communicates less and fits too" in warning for warning in found["warnings"]) == warns


def test_a_gpu_keeps_a_reserve(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a run that is said to fit because all of the memory on the data sheet is counted."""
    stage_1 = ("--num_gpus=8", "--device=H100", "--engine.ds_config=ds_configs/bf16_zero1.json")
    found = plan(capsys, config, *stage_1, "--memory_gib=80")
    total, (low, high) = found["zero"]["1"]["memory"]["total"], found["zero"]["1"]["with_reserve"]
    assert low - total == int(0.005 * 80 * 2**30) + 1.5 * 2**30
    assert high - total == int(0.01 * 80 * 2**30) + 3 * 2**30
    for gib, fits in ((3.2, True), (3.0, None), (1.4, False)):
        found = plan(capsys, config, *stage_1, f"--memory_gib={gib}")
        assert found["fits"] is fits
        assert any("it may not fit" in warning for warning in found["warnings"]) == (fits is None)
    assert main(["plan", "--config", str(config), *stage_1, "--memory_gib=3"]) == 0
    printed = capsys.readouterr().out
    assert "it may NOT fit" in printed
    assert "reserve: 1.51 to 3.03 GiB" in printed


def test_a_missing_corpus_is_rejected_as_for_a_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, or a plan without data."""
    assert main(["plan", "--config", str(config), "--corpus.train=nowhere"]) == 2
    assert "corpus.train: nowhere is not a corpus" in capsys.readouterr().err.replace(str(Path.cwd()) + "/", "")


def test_a_number_of_ranks_takes_no_filter(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan for more ranks than `pretrain` would start."""
    assert main(["plan", "--config", str(config), "--num_gpus=8", "--include=localhost:0,1"]) == 2
    assert "--num_gpus" in capsys.readouterr().err


def test_corpora_by_url_are_copied(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan that cannot read the corpora of the run, or differs with where they are."""
    tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    tree["corpus"] = {"train": f"file://{tree['corpus']['train']}", "cache": str(tmp_path / "cache")}
    by_url = tmp_path / "by-url.yaml"
    by_url.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert plan(capsys, by_url, *H100) == plan(capsys, config, *H100)
    assert list(tmp_path.glob("cache/*/*/*.arrow"))
    assert main(["plan", "--config", str(config), "--corpus.train=s3://bucket/text"]) == 2
    assert "s3://bucket/text is a URL: set 'cache' to a folder on a local disk" in capsys.readouterr().err
