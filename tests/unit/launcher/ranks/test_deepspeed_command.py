import sys
from pathlib import Path

import pytest
from deepspeed.launcher import launch
from deepspeed.launcher.runner import _parse_hostfile, encode_world_info, parse_args, parse_inclusion_exclusion

from experiment.files import REPOSITORY
from launcher.hosts.hostfile import Slots
from launcher.hosts.machine import Devices, Machine
from launcher.ranks.deepspeed_command import DeepSpeedCommand, command_on_hosts, command_on_this_machine
from launcher.ranks.placement import Launcher

ARGUMENTS = [
    "--config",
    "/runs/a config.yaml",
    "--schedule.steps=10",
    "--run.dir=my runs/2024_01",
    "--corpus.eval.my-corpus=a,b",
]
MACHINE = Machine(Devices("cpu", (0, 1)), environ={}, find_port=lambda: 29999)


def here(slots: Slots) -> DeepSpeedCommand:
    return command_on_this_machine(slots, ARGUMENTS, MACHINE)


def on_hosts(slots: Slots, launcher: Launcher = "pdsh") -> DeepSpeedCommand:
    return command_on_hosts(slots, ARGUMENTS, MACHINE, Path("/cluster"), launcher, {}, None)


LOCAL = here({"localhost": (0, 1)})
HOSTS = on_hosts({"a": (0, 1), "b": (3,)})


def parsed(command: DeepSpeedCommand):
    """The command line as DeepSpeed parses it."""
    return parse_args(list(command.argv[3:]))


def parsed_locally(command: DeepSpeedCommand, monkeypatch: pytest.MonkeyPatch):
    """That of a launch on this machine."""
    monkeypatch.setattr("sys.argv", list(command.argv[2:]))
    return launch.parse_args()


@pytest.mark.parametrize(("command", "launcher"), [(LOCAL, "launch"), (HOSTS, "runner")])
def test_runs_deepspeed_with_this_interpreter(command: DeepSpeedCommand, launcher: str):
    """Catches a deepspeed of another environment, found on PATH."""
    assert command.argv[:3] == (sys.executable, "-m", f"deepspeed.launcher.{launcher}")


def test_the_ranks_get_config_and_overrides_unchanged(monkeypatch: pytest.MonkeyPatch):
    """Catches an override that is lost, split or consumed by DeepSpeed's launcher."""
    args = parsed_locally(LOCAL, monkeypatch)
    assert args.module
    assert (args.training_script, args.training_script_args) == ("launcher.ranks.start_rank", ARGUMENTS)
    assert (args.master_addr, args.master_port) == ("127.0.0.1", 29999)


def test_ranks_on_hosts_get_config_and_overrides_unchanged():
    args = parsed(HOSTS)
    assert args.module
    assert (args.user_script, args.user_args) == ("launcher.ranks.start_rank", ARGUMENTS)
    assert args.master_port == 29999


def test_a_local_run_names_its_slots(monkeypatch: pytest.MonkeyPatch):
    """Catches a run on the first GPUs instead of the chosen ones."""
    args = parsed_locally(here({"localhost": (0, 2)}), monkeypatch)
    assert args.world_info == encode_world_info({"localhost": [0, 2]})
    assert (args.node_rank, args.no_python, args.no_local_rank) == (0, False, False)


def test_several_hosts_run_on_their_slots():
    """Catches slots that DeepSpeed reads differently from the hostfile."""
    args = parsed(HOSTS)
    assert args.hostfile == "/cluster/hostfile"
    hosts = _parse_hostfile(HOSTS.files[Path(args.hostfile)].splitlines())
    assert parse_inclusion_exclusion(hosts, args.include, args.exclude) == {"a": [0, 1], "b": [3]}
    assert not args.force_multi


def test_deepspeed_does_not_connect_to_a_host_itself():
    """Catches a start that hangs because the first host was lost after its guard had answered."""
    assert parsed(HOSTS).no_ssh_check


def test_one_remote_host_is_not_taken_for_this_machine():
    """Catches a run for another machine that starts here."""
    assert parsed(on_hosts({"a": (0,)})).force_multi


@pytest.mark.parametrize("launcher", ["slurm", "mpich"])
def test_a_launcher_without_modules_starts_a_file(launcher: Launcher) -> None:
    """Catches ranks that do not start: DeepSpeed adds `-m` for none of these, or for its own helper."""
    args = parsed(on_hosts({"a": (0,), "b": (0,)}, launcher))
    assert not args.module
    assert Path(args.user_script).samefile(REPOSITORY / "launcher" / "ranks" / "start_rank.py")
