import base64
import json
import logging
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

import deepcloze
from experiment.config import load_config
from experiment.errors import StoppedError, UserError
from experiment.run_files.checkpoints import checkpoint_path, complete_checkpoints, mark_complete
from experiment.run_files.mirror import Mirror
from experiment.run_files.outcome_file import Outcome
from experiment.run_files.provenance import write_provenance
from experiment.run_files.run_folder import RunFolder, open_run_folder
from experiment.run_files.run_lock import lock_run
from launcher import launch
from launcher.autotune import TrialRunner
from launcher.cli import main
from launcher.hosts.hostfile import parse_hostfile
from launcher.hosts.machine import DeviceKind, Devices, Machine, launch_machine
from launcher.launch import launch_pretraining
from launcher.launch_plan import LaunchPlan, plan_launch
from launcher.options import PretrainOptions
from launcher.preflight.run import Report
from launcher.preflight.target import Target
from launcher.ranks.deepspeed_command import DeepSpeedCommand
from launcher.ranks.microbatch import scaled_microbatch
from launcher.supervision import supervisor
from launcher.supervision.attempt import LaunchSettings, Layout, Rendezvous
from launcher.supervision.launch_result import LaunchResult
from launcher.supervision.rank_processes import HeldRanks
from pretrain.config import ModelConfig, PretrainConfig
from pretrain.resume import ResumePlan
from pretrain.run import read_arguments

CONFIG = """
run: {dir: my-run}
model: {config: {model_type: bert}}
corpus: {train: corpus}
schedule: {steps: 10}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config file in the working directory, on a machine with two CPU cores."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr("launcher.hosts.machine.cpu_cores", lambda: 2)
    # Launches on other hosts refuse a path with spaces, which a clone may have.
    monkeypatch.setattr("launcher.launch_plan.sys", SimpleNamespace(executable="/usr/bin/python3"))
    Path("config.yaml").write_text(CONFIG)
    return "config.yaml"


@pytest.fixture(autouse=True)
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """Stands for `resolve`, which opens corpora and model; records its arguments."""
    seen: list[tuple[Any, int]] = []
    module = ModuleType("pretrain.resolve")

    def resolve(config: PretrainConfig, world_size: int) -> SimpleNamespace:
        logging.getLogger("pretrain.resolve").warning("something is odd")
        seen.append((config, world_size))
        folder = RunFolder(Path(config.run.dir).absolute())
        absolute = config.run.model_copy(update={"dir": str(folder.path)})
        resolved = config.model_copy(update={"run": absolute})
        offload = "nvme" if "nvme" in config.engine.ds_config else "none"
        deepspeed = SimpleNamespace(precision="fp16", zero_stage=1, offload=offload)
        facts = {"num_parameters": 1000, "identity": {}, "held_out": {}, "resume_plan": ResumePlan()}
        return SimpleNamespace(config=resolved, folder=folder, deepspeed=deepspeed, model_source=config.model, **facts)

    module.resolve = resolve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pretrain.resolve", module)
    return seen


def before_resolve(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Call `action` before each `resolve`."""
    resolve = sys.modules["pretrain.resolve"].resolve

    def resolve_later(*arguments: Any, **options: Any) -> SimpleNamespace:
        action()
        return resolve(*arguments, **options)

    monkeypatch.setattr(sys.modules["pretrain.resolve"], "resolve", resolve_later)


def test_a_dry_run_reads_a_run_that_is_active(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, or a checkpoint called damaged, because the run has deleted it in the meantime."""
    failures = iter([FileNotFoundError(2, "No such file", "state.json"), UserError("all 2 checkpoints are damaged")])

    def fail() -> None:
        if error := next(failures, None):
            raise error

    before_resolve(monkeypatch, fail)
    dry_run = PretrainOptions(config=config, dry_run=True, overrides={"run.dir": "active"})
    with pytest.raises(FileNotFoundError):
        launch_pretraining(dry_run)
    with lock_run(open_run_folder("active")):
        launch_pretraining(dry_run)


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands for the check of this machine's devices; records the settings that were checked."""
    seen: list[Any] = []
    module = ModuleType("pretrain.engine.deepspeed_settings")
    module.check_device_support = seen.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pretrain.engine.deepspeed_settings", module)
    return seen


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[LaunchSettings]:
    """Stands for the ranks; records what would be started."""
    seen: list[LaunchSettings] = []

    def supervise(launch: LaunchSettings) -> LaunchResult:
        seen.append(launch)
        return LaunchResult(Outcome.DONE)

    monkeypatch.setattr(launch, "supervise", supervise)
    return seen


@pytest.fixture(autouse=True)
def held(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for the ranks of this machine that wait for their launch; records their command lines, and their end."""
    seen: list[str] = []

    @contextmanager
    def held_ranks(command: DeepSpeedCommand, _: float) -> Iterator[HeldRanks]:
        seen.append(shlex.join(command.argv))
        try:
            yield HeldRanks(command, nullcontext)
        finally:
            seen.append("ended")

    monkeypatch.setattr(launch, "held_ranks", held_ranks)
    return seen


@pytest.fixture(autouse=True)
def failed_hosts(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Stands for preflight: the hosts in this set fail."""
    failed: set[str] = set()

    def check_hosts(target: Target, machine: Machine, only_failed: bool) -> Report:
        return Report({host: numbers for host, numbers in target.slots.items() if host not in failed}, "checked")

    monkeypatch.setattr(launch, "check_hosts", check_hosts)
    return failed


def first_command(launch: LaunchSettings) -> DeepSpeedCommand:
    """The command of the first attempt, on this machine."""
    return launch.held.command


def slots_of(command: DeepSpeedCommand) -> Any:
    """The slots of a launch on this machine, as DeepSpeed reads them."""
    (encoded,) = (word.partition("=")[2] for word in command.argv if word.startswith("--world_info="))
    return json.loads(base64.urlsafe_b64decode(encoded))


def test_a_plan_depends_on_the_given_machine_only(config: str, resolved: list[tuple[Any, int]]) -> None:
    """Catches a plan that reads the environment or the devices of the machine it is made on."""
    environ = {"CUDA_VISIBLE_DEVICES": "4,5,6"}
    gpus = Machine(Devices("cuda", (4, 5, 6)), environ=environ, find_port=lambda: 29501)
    plan = plan_launch(PretrainOptions(config=config, num_gpus=2), load_config(PretrainConfig, config), gpus)
    assert plan.slots == {"localhost": (4, 5)}
    command = plan.command(Layout(plan.slots))
    assert slots_of(command) == {"localhost": [4, 5]}
    assert "--master_port=29501" in command.argv
    assert command.environment == plan.added_environment
    assert list(command.files) == [plan.folder.logs / "launch.yaml"]
    assert resolved[0][1] == 2
    assert [path.name for path in Path.cwd().iterdir()] == ["config.yaml"]


def test_a_launch_and_its_process_may_begin_at_different_times(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a STOP file compared with the start of a shell that has prepared the launch, or time missing in the
    ledger."""
    seen: list[LaunchSettings] = []
    monkeypatch.setattr(launch, "supervise", lambda start: seen.append(start) or LaunchResult(Outcome.DONE))
    monkeypatch.setattr("experiment.run_files.goodput.process_start", lambda: 5.0)
    before = time.time()
    assert main(["pretrain", "--config", config, "--num_gpus=2"]) == 0
    assert before <= seen[0].checked_at <= time.time()
    assert seen[0].start_time == 5.0


def test_a_call_begins_when_it_is_made(config: str, launches: list[LaunchSettings]) -> None:
    """Catches a run that counts the hours of a notebook before it was called, and whose second attempt is taken for the
    first one."""
    before = time.time()
    for _ in range(2):
        deepcloze.pretrain(config, num_gpus=2)
    first, second = launches
    assert before <= first.start_time < second.start_time <= time.time()


def test_a_refused_launch_leaves_the_output_of_the_active_one(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run in the background whose output is lost, because a second launch was checked before the first one
    had locked the run folder."""
    monkeypatch.setattr(launch, "check_unlocked", lambda _: None)
    monkeypatch.setattr(launch, "supervise", supervisor.supervise)
    folder = open_run_folder("my-run")
    folder.launch_output.write_text("step 1")
    with lock_run(folder), pytest.raises(UserError, match="another deepcloze process is using"):
        launch_pretraining(PretrainOptions(config=config, num_gpus=2))
    assert folder.launch_output.read_text() == "step 1"


@pytest.mark.parametrize("dry_run", [True, False])
def test_only_a_dry_run_prints_warnings(config: str, caplog: pytest.LogCaptureFixture, dry_run: bool) -> None:
    """Catches warnings printed twice, by the launcher and by rank 0, and a dry run that hides them."""
    launch_pretraining(PretrainOptions(config=config, num_gpus=2, dry_run=dry_run))
    assert ("something is odd" in caplog.text) == dry_run


@pytest.mark.parametrize("lr", [{}, {"optimizer.lr": "5e-4"}])
@pytest.mark.parametrize("where", [{"num_gpus": 2}, {"hostfile": "hosts"}, {"autotune": True}])
def test_an_unset_rate_is_warned_of_once(
    config: str,
    launches: list[LaunchSettings],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: dict[str, Any],
    lr: dict[str, str],
) -> None:
    """Catches a warning that is lost because the ranks read a file in which all keys are set, or is printed by the
    launcher and by rank 0, or at each restart, and one about a rate that was chosen."""
    Path("hosts").write_text("192.0.2.1 slots=2\n192.0.2.2 slots=2\n")
    monkeypatch.setattr(launch, "autotune", lambda plan, _: plan)
    overrides = {"model.config": "null", "model.init_from": "start", **lr}
    launch_pretraining(PretrainOptions(config=config, overrides=overrides, **where))
    printed = capsys.readouterr().err.count("warning: optimizer.lr is 0.0005, for training from scratch")
    (started,) = launches

    def warnings_of_ranks(layout: Layout) -> list[str]:
        is_held = started.held is not None and not layout.restarted
        command = first_command(started) if is_held else started.command(layout, None)
        for file, text in command.files.items():
            file.write_text(text)
        return list(read_arguments(command.argv[command.argv.index("--config") :]).warnings(None))

    assert printed + len(warnings_of_ranks(Layout(started.slots))) == (not lr)
    assert warnings_of_ranks(Layout(started.slots, restarted=True)) == []


def test_ranks_get_the_users_config_and_overrides(config: str, launches: list[LaunchSettings], resolved: list[Any]):
    """Catches ranks that run another config than the validated one."""
    launch_pretraining(PretrainOptions(config=config, num_gpus=2, overrides={"schedule.steps": "20"}))
    (started,) = launches
    command = first_command(started)
    assert list(command.argv[-5:]) == [
        "--module",
        "launcher.ranks.start_rank",
        "--config",
        str(Path("config.yaml").absolute()),
        "--schedule.steps=20",
    ]
    assert started.folder.path == Path("my-run").absolute()
    assert started.folder.logs.is_dir()
    assert started.slots == {"localhost": (0, 1)}
    assert started.max_restarts == 0
    assert command.environment["DS_ACCELERATOR"] == "cpu"
    ((settings, world_size),) = resolved
    assert (settings.schedule.steps, world_size) == (20, 2)


def test_a_run_is_restored_before_its_plan(
    config: str, launches: list[LaunchSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run that does not continue on new hosts because the model that it began with was on the lost one."""
    lost = RunFolder(tmp_path / "lost")
    write_provenance(lost, {}, [])
    checkpoint = checkpoint_path(lost.checkpoints, 1)
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"step": 1}')
    mark_complete(checkpoint)
    mirror = Mirror(f"file://{tmp_path}/mirror")
    mirror.upload_run_files(lost)
    mirror.upload(checkpoint)
    overrides = {"checkpoint.mirror": mirror.url, "model.init_from": "gone", "model.config": "null"}
    launch_pretraining(PretrainOptions(config=config, overrides=overrides))
    assert complete_checkpoints(Path("my-run/checkpoints")) == [Path("my-run/checkpoints/step-00000001")]
    overrides |= {"run.dir": "other", "checkpoint.mirror": f"file://{tmp_path}/empty"}
    launch_pretraining(PretrainOptions(config=config, overrides=overrides))
    assert len(launches) == 2


def test_a_dry_run_prints_the_plan_and_starts_nothing(
    config: str,
    launches: list[LaunchSettings],
    held: list[str],
    resolved: list[Any],
    capsys: pytest.CaptureFixture[str],
):
    """Catches a dry run that starts or writes something, or prints something else than what would run."""
    launch_pretraining(PretrainOptions(config=config, num_gpus=2, dry_run=True, overrides={"run.dir": "2024 01"}))
    head, environment, command = capsys.readouterr().out.split("\n\n")
    assert yaml.safe_load(head)["run"]["dir"] == str(Path("2024 01").absolute())
    assert "TOKENIZERS_PARALLELISM=false" in environment or "TOKENIZERS_PARALLELISM" in os.environ
    argv = shlex.split(command, comments=True)
    assert argv[0] == sys.executable
    assert slots_of(DeepSpeedCommand(tuple(argv), {})) == {"localhost": [0, 1]}
    assert argv[-1] == "--run.dir=2024 01"
    assert len(resolved) == 1
    assert launches == held == []
    assert [path.name for path in Path.cwd().iterdir()] == ["config.yaml"]


def test_ranks_start_while_the_launch_is_checked(
    config: str, launches: list[LaunchSettings], held: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a start of seconds that waits for checks of seconds, and ranks that wait but are not the planned ones."""
    monkeypatch.setattr("launcher.hosts.machine.free_port", lambda: 29501)
    held_before = list[int]()
    before_resolve(monkeypatch, lambda: held_before.append(len(held)))
    launch_pretraining(PretrainOptions(config=config, num_gpus=2, overrides={"run.dir": "2024 01"}))
    assert held_before == [1]
    (started,) = launches
    assert held == [shlex.join(first_command(started).argv), "ended"]
    first, second = (command.argv for command in (first_command(started), started.command(Layout(started.slots), None)))
    assert first[: first.index("--config")] == second[: second.index("--config")]


def edit_during_checks(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the user write another run folder to the config file while the launch is checked."""
    before_resolve(monkeypatch, lambda: Path(config).write_text(CONFIG.replace("my-run", "next-run")))


def test_a_config_that_is_edited_during_the_checks_is_refused(
    config: str, launches: list[LaunchSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches ranks that train with values that nobody has checked, or in a run folder that is not locked."""
    edit_during_checks(config, monkeypatch)
    with pytest.raises(UserError, match=r"config\.yaml was changed while it was checked; run the same command again"):
        launch_pretraining(PretrainOptions(config=config))
    assert launches == []
    launch_pretraining(PretrainOptions(config=config))
    assert launches[0].folder.path == Path("next-run").absolute()


def test_a_config_that_is_edited_during_trials_is_ignored(
    config: str, launches: list[LaunchSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches ranks that read the file minutes after the checks."""
    edit_during_checks(config, monkeypatch)
    monkeypatch.setattr(launch, "autotune", lambda plan, _: plan)
    launch_pretraining(PretrainOptions(config=config, autotune=True))
    (started,) = launches
    (text,) = started.command(Layout(started.slots), None).files.values()
    assert yaml.safe_load(text)["run"]["dir"] == str(started.folder.path) == str(Path("my-run").absolute())


def test_no_rank_of_a_refused_launch_remains(config: str, held: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a mistake in the config that leaves ranks or a run folder."""

    def refuse(*_: object, **__: object) -> None:
        raise UserError("corpus.train: no such folder")

    monkeypatch.setattr(sys.modules["pretrain.resolve"], "resolve", refuse)
    with pytest.raises(UserError, match="no such folder"):
        launch_pretraining(PretrainOptions(config=config))
    assert len(held) == 2
    assert held[1] == "ended"
    assert [path.name for path in Path.cwd().iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("outcome", "error", "argument"),
    [
        (Outcome.STOPPED, StoppedError, "because"),
        (Outcome.REFUSED, SystemExit, 2),
        (Outcome.FAILED, SystemExit, "deepcloze: the run failed: because"),
    ],
)
def test_the_outcome_of_the_ranks_decides_how_the_command_ends(
    config: str, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, error: type[BaseException], argument: str | int
):
    """Catches a lost outcome: the command would exit with 0 for a run that is not done."""
    monkeypatch.setattr(launch, "supervise", lambda *_: LaunchResult(outcome, "because"))
    with pytest.raises(error) as raised:
        launch_pretraining(PretrainOptions(config=config))
    assert raised.value.args == (argument,)


@pytest.mark.parametrize(("free", "warned"), [(79_999, True), (80_000, False)])
def test_a_small_disk_is_reported_before_the_ranks_begin(
    config: str,
    launches: list[LaunchSettings],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: int,
    warned: bool,
) -> None:
    """Catches a run on this machine that trains until its third checkpoint, and stops for lack of space."""
    monkeypatch.setattr(launch.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    launch_pretraining(PretrainOptions(config=config, overrides={"checkpoint.keep_last": "4"}))
    assert len(launches) == 1
    assert ("for the planned checkpoints: free space, or lower" in capsys.readouterr().err) is warned


def test_other_hosts_get_the_resolved_config_and_the_environment(
    config: str, launches: list[LaunchSettings], monkeypatch: pytest.MonkeyPatch
):
    """Catches overrides that a remote shell would split, settings that do not reach other hosts, and logged secrets."""
    for name, value in {"GLOO_SOCKET_IFNAME": "eth7", "WANDB_API_KEY": "secret", "MY_TOKEN": "two words"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    Path(".deepspeed_env").write_text("NCCL_DEBUG=INFO\n")
    Path("hosts").write_text("192.0.2.1 slots=2\n192.0.2.2 slots=2\n")
    overrides = {"model.config": "{model_type: bert, hidden_size: 64}"}
    launch_pretraining(PretrainOptions(config=config, hostfile="hosts", env="MY_TOKEN", overrides=overrides))
    (started,) = launches
    folder = started.folder
    assert started.slots == {"192.0.2.1": (0, 1), "192.0.2.2": (0, 1)}
    assert started.max_restarts == 10
    sent = {"GLOO_SOCKET_IFNAME": "eth7", "WANDB_API_KEY": "secret", "MY_TOKEN": "two words"}
    assert {name: started.host_environment[name] for name in sent} == sent
    assert "secret" not in repr(started)

    command = started.command(Layout(started.slots), Rendezvous("run-1", "192.0.2.1", 4567))
    assert list(command.argv[-2:]) == ["--config", str(folder.logs / "launch.yaml")]
    assert {"--master_addr=192.0.2.1", "--master_port=4567"} <= set(command.argv)
    config_sent = yaml.safe_load(command.files[folder.logs / "launch.yaml"])
    assert (config_sent["run"]["dir"], config_sent["model"]["config"]["hidden_size"]) == (str(folder.path), 64)
    exported = command.files[Path(command.environment["DS_ENV_FILE"])].splitlines()
    assert {"DEEPCLOZE_LAUNCH=run-1", "NCCL_DEBUG=INFO", "TOKENIZERS_PARALLELISM=false"} <= set(exported)
    assert not {"WANDB_API_KEY", "GLOO_SOCKET_IFNAME"} & command.environment.keys(), "DeepSpeed logs what it exports"


def test_attempts_know_the_launcher(config: str, launches: list[LaunchSettings]) -> None:
    """Catches exit codes of MPICH's ranks that are read as those of pdsh."""
    launch_pretraining(PretrainOptions(config=config, launcher="mpich"))
    assert launches[0].launcher == "mpich"


def test_a_smaller_microbatch_reaches_the_ranks(config: str, launches: list[LaunchSettings]) -> None:
    """Catches a restart after running out of memory with the same microbatch, or with another global batch."""
    stages = "[{steps: 5, max_seq_length: 64, microbatch_tokens: 100}, {sequences: 4}]"
    overrides = {"batch.microbatch_tokens": "1000", "schedule.stages": stages}
    launch_pretraining(PretrainOptions(config=config, overrides=overrides))
    (started,) = launches
    assert started.max_halvings == 3
    (text,) = started.command(Layout(started.slots, 2), None).files.values()
    sent = yaml.safe_load(text)
    assert (sent["batch"]["microbatch_tokens"], sent["batch"]["sequences"]) == (250, 256)
    assert [stage["microbatch_tokens"] for stage in sent["schedule"]["stages"]] == [64, 250]


def test_a_restart_may_use_the_folder_of_its_launch(config: str, launches: list[LaunchSettings]) -> None:
    """Catches `run.resume: never`, which keeps a launch from restarting after a failure."""
    launch_pretraining(PretrainOptions(config=config, overrides={"run.resume": "never"}))
    (started,) = launches
    assert "--run.resume=never" in first_command(started).argv
    again = Layout(started.slots, restarted=True)
    (text,) = started.command(again, None).files.values()
    assert yaml.safe_load(text)["run"]["resume"] == "never", "nothing has begun: a mirror may hold another run"
    started.folder.metrics.parent.mkdir(parents=True, exist_ok=True)
    started.folder.metrics.touch()
    (text,) = started.command(again, None).files.values()
    assert yaml.safe_load(text)["run"]["resume"] == "auto"


def test_a_restart_has_the_config_of_its_launch(config: str, launches: list[LaunchSettings]) -> None:
    """Catches an edit for the next run that a restart of this one reads, with another run folder."""
    launch_pretraining(PretrainOptions(config=config))
    (started,) = launches
    Path("config.yaml").write_text(Path("config.yaml").read_text().replace("my-run", "next-run"))
    ((file, text),) = started.command(Layout(started.slots, restarted=True), None).files.items()
    assert file.is_relative_to(started.folder.path)
    assert yaml.safe_load(text)["run"]["dir"] == str(started.folder.path)


def test_a_profile_is_requested_from_the_ranks(config: str, launches: list[LaunchSettings]) -> None:
    """Catches a flag that the ranks do not get."""
    launch_pretraining(PretrainOptions(config=config, profile=True))
    (started,) = launches
    assert "--run.profile=true" in first_command(started).argv


def test_trials_precede_the_launch_but_not_a_dry_run(
    config: str, launches: list[LaunchSettings], held: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a choice that the run does not start with, and trials for a plan that is only printed."""
    chosen: list[LaunchPlan] = []

    def autotune(plan: LaunchPlan, _: object) -> LaunchPlan:
        assert launches == []
        chosen.append(replace(plan, config=scaled_microbatch(plan.config, 1)))
        return chosen[0]

    monkeypatch.setattr(launch, "autotune", autotune)
    launch_pretraining(PretrainOptions(config=config, autotune=True, dry_run=True))
    assert chosen == []
    launch_pretraining(PretrainOptions(config=config, autotune=True))
    assert held == [], "they would train with the size before the trials"
    (started,) = launches
    (text,) = started.command(Layout(started.slots), None).files.values()
    assert yaml.safe_load(text)["batch"]["microbatch_tokens"] == 16384


@pytest.mark.parametrize("source", ["checkpoint", "hub"])
def test_trials_of_a_resumed_run_need_no_model_that_is_gone(
    config: str, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Catches --autotune that refuses a run that resumes without it, and hosts that get a folder of this machine."""
    checkpoint = checkpoint_path(Path("my-run/checkpoints").absolute(), 1)
    resolve = sys.modules["pretrain.resolve"].resolve
    folder = {"checkpoint": str(checkpoint / "hf"), "hub": "/home/me/.cache/huggingface/hub/bert"}[source]

    def resolve_resumed(*arguments: Any) -> SimpleNamespace:
        run: SimpleNamespace = resolve(*arguments)
        run.resume_plan, run.model_source = ResumePlan(checkpoint, step=1), ModelConfig(init_from=folder)
        return run

    monkeypatch.setattr(sys.modules["pretrain.resolve"], "resolve", resolve_resumed)
    trials: list[LaunchSettings] = []

    def run_attempt(trial: LaunchSettings, *_: object) -> LaunchResult:
        trials.append(trial)
        return LaunchResult(Outcome.DONE)

    monkeypatch.setattr("launcher.autotune.run_attempt", run_attempt)
    options = PretrainOptions(config=config, overrides={"model.config": "null", "model.init_from": "bert@0123"})
    plan = plan_launch(options, load_config(PretrainConfig, config, options.overrides), launch_machine())
    TrialRunner(plan, deadline=math.inf).run([0])
    (text,) = trials[0].command(Layout(plan.slots), None).files.values()
    model = yaml.safe_load(text)["model"]
    assert (model["init_from"], plan.config.model.init_from) == ({"hub": "bert@0123"}.get(source, folder), "bert@0123")


def test_trials_are_refused_with_nvme_offload(config: str) -> None:
    """Catches swap files of killed trials that fill the disks of all hosts."""
    overrides = {"engine.ds_config": "bf16_zero3_nvme_offload.json"}
    with pytest.raises(UserError, match=r"--autotune: bf16_zero3_nvme_offload.json offloads to NVMe"):
        launch_pretraining(PretrainOptions(config=config, autotune=True, overrides=overrides))


@pytest.mark.parametrize("name", ["it's", "my$HOME", "100%n", "a;b"])
def test_paths_that_other_hosts_would_interpret_are_refused(config: str, name: str) -> None:
    """Catches ranks that look for their config at another path, and commands in the name of a folder."""
    Path("hosts").write_text("192.0.2.1 slots=1\n192.0.2.2 slots=1\n")
    remote = PretrainOptions(config=config, hostfile=str(Path("hosts").absolute()), dry_run=True)
    with pytest.raises(UserError, match=r"run\.dir: .* which the shells of other hosts interpret"):
        launch_pretraining(remote.model_copy(update={"overrides": {"run.dir": name}}))
    Path(name).mkdir()
    os.chdir(name)
    with pytest.raises(UserError, match="working directory: "):
        launch_pretraining(remote.model_copy(update={"config": "../config.yaml", "overrides": {"run.dir": "/runs"}}))
    launch_pretraining(PretrainOptions(config="../config.yaml", dry_run=True))


def test_spaces_that_deepspeed_does_not_quote_are_refused(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks in another folder, after 'cd: too many arguments', and a Python that is not found."""
    Path("hosts").write_text("192.0.2.1 slots=1\n192.0.2.2 slots=1\n")
    remote = PretrainOptions(config=str(Path(config).absolute()), hostfile=str(Path("hosts").absolute()), dry_run=True)
    launch_pretraining(remote.model_copy(update={"overrides": {"run.dir": "my run"}}))
    Path("two words").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir("two words")
        with pytest.raises(UserError, match=r"working directory: .*two words contains ' ', which"):
            launch_pretraining(remote.model_copy(update={"overrides": {"run.dir": "/runs"}}))
    monkeypatch.setattr("launcher.launch_plan.sys.executable", "/my envs/python")
    with pytest.raises(UserError, match="Python: /my envs/python contains ' ', which"):
        launch_pretraining(remote)


def test_an_unset_variable_is_refused(config: str, launches: list[LaunchSettings]) -> None:
    with pytest.raises(UserError, match="--env: MY_TOKEN is not set"):
        launch_pretraining(PretrainOptions(config=config, env="MY_TOKEN"))
    assert not Path("my-run").exists()


def test_hosts_that_fail_preflight_are_left_out_on_request(
    config: str, launches: list[LaunchSettings], resolved: list[tuple[Any, int]], failed_hosts: set[str]
) -> None:
    """Catches ranks on a host that failed, and a run that was resolved for other ranks than it has."""
    Path("hosts").write_text("192.0.2.1 slots=2\n192.0.2.2 slots=2\n192.0.2.3 slots=1\n")
    failed_hosts.add("192.0.2.2")
    options = PretrainOptions(config=config, hostfile="hosts")
    with pytest.raises(UserError, match=r"1 of 3 hosts failed: 192.0.2.2; --allow_missing leaves them out"):
        launch_pretraining(options)
    assert launches == []
    assert not Path("my-run").exists()
    launch_pretraining(options.model_copy(update={"allow_missing": True}))
    (started,) = launches
    assert started.slots == {"192.0.2.1": (0, 1), "192.0.2.3": (0,)}
    command = started.command(Layout(started.slots), None)
    assert "--include=192.0.2.1:0,1@192.0.2.3:0" in command.argv
    assert "192.0.2.2" not in command.files[started.folder.logs / "hostfile"]
    assert [world_size for _, world_size in resolved] == [5, 5, 3]
    failed_hosts |= {"192.0.2.1", "192.0.2.3"}
    with pytest.raises(UserError, match="3 of 3 hosts failed"):
        launch_pretraining(options.model_copy(update={"allow_missing": True}))


def test_if_only_this_machine_passes_it_runs_without_ssh(
    config: str, launches: list[LaunchSettings], failed_hosts: set[str], held: list[str]
) -> None:
    Path("hosts").write_text("localhost slots=2\n192.0.2.2 slots=2\n")
    failed_hosts.add("192.0.2.2")
    launch_pretraining(PretrainOptions(config=config, hostfile="hosts", allow_missing=True))
    (started,) = launches
    assert started.slots == {"localhost": (0, 1)}
    assert slots_of(started.command(Layout(started.slots), None)) == {"localhost": [0, 1]}
    assert held == [], "before preflight, the ranks were to run on two hosts"


def test_a_dead_machine_is_waited_for_before_preflight_only(
    config: str, launches: list[LaunchSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a launch that waits again when the ranks are about to start."""
    Path("hosts").write_text("192.0.2.1 slots=2\n192.0.2.2 slots=2\n")
    monkeypatch.setattr(launch, "check_unlocked", lambda _: 7)
    launch_pretraining(PretrainOptions(config=config, hostfile="hosts"))
    assert [started.dead_owner for started in launches] == [7]


def test_a_run_that_is_active_is_refused_before_it_is_read(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback for a checkpoint that the active run has just deleted."""
    monkeypatch.setattr(launch, "plan_launch", lambda *_: pytest.fail("read the run"))
    with lock_run(open_run_folder("my-run")), pytest.raises(UserError, match="another deepcloze process is using"):
        launch_pretraining(PretrainOptions(config=config))


def test_a_slurm_job_needs_no_hostfile(config: str) -> None:
    """Catches a job on several nodes of which one trains, and a hostfile for DeepSpeed that names other slots."""
    environ = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_GPUS_ON_NODE": "4"}
    machine = Machine(Devices("cpu", (0, 1)), environ=environ, find_port=lambda: 29501)
    options = PretrainOptions(config=config, include="n1@n3:1,2")
    plan = plan_launch(options, load_config(PretrainConfig, config), machine)
    assert plan.slots == {"n1": (0, 1, 2, 3), "n3": (1, 2)}
    hostfile = plan.folder.logs / "hostfile"
    command = plan.command(Layout(plan.slots))
    assert f"--hostfile={hostfile}" in command.argv
    assert list(parse_hostfile(command.files[hostfile]).items()) == [("n1", 4), ("n3", 3)]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_devices_of_this_machine_concern_a_launch_on_it_only(config: str, kind: DeviceKind, checked: list[Any]):
    """Catches hosts with GPUs that train on their CPUs, or fp16 that is refused, because of the launching machine."""
    environ = {"DS_ACCELERATOR": "cpu"} if kind == "cpu" else {}
    machine = Machine(Devices(kind, (0, 1)), environ=environ, find_port=lambda: 29501)
    loaded = load_config(PretrainConfig, config)
    Path("hosts").write_text("192.0.2.1 slots=2\n192.0.2.2 slots=2\n")
    remote = plan_launch(PretrainOptions(config=config, hostfile="hosts"), loaded, machine)
    assert checked == []
    added = {"TOKENIZERS_PARALLELISM", "PYTHONPATH", "PYTHONSAFEPATH"}
    assert remote.added_environment.keys() == added
    (exported,) = (
        text for path, text in remote.command(Layout(remote.slots)).files.items() if path.name == "worker.env"
    )
    assert {line.partition("=")[0] for line in exported.splitlines()} == added
    plan_launch(PretrainOptions(config=config), loaded, machine)
    assert [settings.precision for settings in checked] == ["fp16"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_ranks_start_exits_with_75(
    config: str, launches: list[LaunchSettings], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Catches a queue system that does not submit a run again because it was stopped while it was checked."""
    monkeypatch.setattr(launch, "plan_launch", lambda *_: os.kill(os.getpid(), number))
    assert main(["pretrain", "--config", config]) == 75
    assert launches == []
