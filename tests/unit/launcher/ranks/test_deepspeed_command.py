import sys
from dataclasses import replace
from pathlib import Path

import pytest
from deepspeed.launcher import launch
from deepspeed.launcher.runner import encode_world_info, parse_args, parse_inclusion_exclusion

from experiment.provenance import REPOSITORY
from launcher.options import Launcher
from launcher.ranks.deepspeed_command import DeepSpeedCommand, deepspeed_argv

ARGUMENTS = [
    "--config",
    "/runs/a config.yaml",
    "--schedule.steps=10",
    "--run.dir=my runs/2024_01",
    "--corpus.eval.my-corpus=a,b",
]
COMMAND = DeepSpeedCommand(slots={"localhost": (0, 1)}, arguments=tuple(ARGUMENTS), port=29999)
HOSTS = replace(COMMAND, slots={"a": (0, 1), "b": (3,)}, hostfile=Path("/cluster/hosts"))


def parsed(command: DeepSpeedCommand):
    """The command line as DeepSpeed parses it."""
    return parse_args(deepspeed_argv(command)[3:])


def parsed_locally(command: DeepSpeedCommand, monkeypatch: pytest.MonkeyPatch):
    """That of a launch on this machine."""
    monkeypatch.setattr("sys.argv", deepspeed_argv(command)[2:])
    return launch.parse_args()


@pytest.mark.parametrize(("command", "launcher"), [(COMMAND, "launch"), (HOSTS, "runner")])
def test_runs_deepspeed_with_this_interpreter(command: DeepSpeedCommand, launcher: str):
    """Catches a deepspeed of another environment, found on PATH."""
    assert deepspeed_argv(command)[:3] == [sys.executable, "-m", f"deepspeed.launcher.{launcher}"]


def test_the_ranks_get_config_and_overrides_unchanged(monkeypatch: pytest.MonkeyPatch):
    """Catches an override that is lost, split or consumed by DeepSpeed's launcher."""
    args = parsed_locally(COMMAND, monkeypatch)
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
    args = parsed_locally(replace(COMMAND, slots={"localhost": (0, 2)}), monkeypatch)
    assert args.world_info == encode_world_info({"localhost": [0, 2]})
    assert (args.node_rank, args.no_python, args.no_local_rank) == (0, False, False)


def test_several_hosts_run_on_their_slots():
    """Catches slots that DeepSpeed reads differently from the hostfile."""
    args = parsed(HOSTS)
    assert args.hostfile == "/cluster/hosts"
    assert parse_inclusion_exclusion({"a": 2, "b": 4}, args.include, args.exclude) == {"a": [0, 1], "b": [3]}
    assert not args.force_multi


def test_one_remote_host_is_not_taken_for_this_machine():
    """Catches a run for another machine that starts here."""
    assert parsed(replace(COMMAND, slots={"a": (0,)}, hostfile=Path("/cluster/hosts"))).force_multi


@pytest.mark.parametrize("launcher", ["slurm", "mpich"])
def test_a_launcher_without_modules_starts_a_file(launcher: Launcher) -> None:
    """Catches ranks that do not start: DeepSpeed adds `-m` for none of these, or for its own helper."""
    args = parsed(replace(COMMAND, slots={"a": (0,), "b": (0,)}, hostfile=Path("/cluster/hosts"), launcher=launcher))
    assert not args.module
    assert Path(args.user_script).samefile(REPOSITORY / "launcher" / "ranks" / "start_rank.py")
