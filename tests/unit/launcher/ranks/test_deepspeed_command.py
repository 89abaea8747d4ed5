from dataclasses import replace
from pathlib import Path

import pytest
from deepspeed.launcher.runner import parse_args, parse_inclusion_exclusion

from experiment.provenance import REPOSITORY
from launcher.options import Launcher
from launcher.ranks.deepspeed_command import DeepSpeedCommand, deepspeed_argv

COMMAND = DeepSpeedCommand(
    python="/venv/bin/python",
    module="pretrain.run",
    config=Path("/runs/a config.yaml"),
    slots={"localhost": (0, 1)},
    device="cpu",
    master_port=29999,
    overrides={"schedule.steps": "10", "run.dir": "my runs/2024_01", "corpus.eval.my-corpus": "a,b"},
)


def parsed(command: DeepSpeedCommand):
    """The command line as DeepSpeed parses it."""
    return parse_args(deepspeed_argv(command)[3:])


def test_runs_deepspeed_with_this_interpreter():
    """Catches a deepspeed of another environment, found on PATH."""
    assert deepspeed_argv(COMMAND)[:3] == ["/venv/bin/python", "-m", "deepspeed.launcher.runner"]


def test_the_ranks_get_config_and_overrides_unchanged():
    """Catches an override that is lost, split or consumed by DeepSpeed's launcher."""
    args = parsed(COMMAND)
    assert args.module
    assert args.user_script == "pretrain.run"
    assert args.user_args == [
        "--config",
        "/runs/a config.yaml",
        "--schedule.steps=10",
        "--run.dir=my runs/2024_01",
        "--corpus.eval.my-corpus=a,b",
    ]
    assert args.master_port == 29999


def test_a_module_without_a_config_gets_no_arguments():
    assert parsed(replace(COMMAND, config=None, overrides={})).user_args == []


def test_a_cpu_run_counts_its_slots():
    """Catches slot numbers reaching DeepSpeed, which knows one slot on a CPU and rejects slot 2."""
    args = parsed(replace(COMMAND, slots={"localhost": (0, 2)}))
    assert (args.num_gpus, args.include) == (2, "")


def test_a_local_gpu_run_names_its_gpus():
    """Catches a run on the first GPUs instead of the chosen ones."""
    args = parsed(replace(COMMAND, slots={"localhost": (0, 2)}, device="cuda"))
    assert (args.num_gpus, args.include) == (-1, "localhost:0,2")


def test_a_local_run_reads_no_hostfile():
    """Catches a machine with a /job/hostfile, DeepSpeed's default, taking a local run elsewhere."""
    assert not Path(parsed(COMMAND).hostfile).is_file()


def test_several_hosts_run_on_their_slots():
    """Catches slots that DeepSpeed reads differently from the hostfile."""
    command = replace(COMMAND, slots={"a": (0, 1), "b": (3,)}, hostfile=Path("/cluster/hosts"))
    args = parsed(command)
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
    assert Path(args.user_script).samefile(REPOSITORY / "pretrain" / "run.py")
