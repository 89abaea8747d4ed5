from dataclasses import replace
from pathlib import Path

from deepspeed.launcher.runner import parse_args, parse_inclusion_exclusion

from launcher.command import LaunchSpec, deepspeed_argv

SPEC = LaunchSpec(
    python="/venv/bin/python",
    module="pretrain.run",
    config=Path("/runs/a config.yaml"),
    slots={"localhost": (0, 1)},
    device="cpu",
    master_port=29999,
    overrides={"schedule.steps": "10", "run.dir": "my runs/2024_01", "corpus.eval.my-corpus": "a,b"},
)


def parsed(spec: LaunchSpec):
    """DeepSpeed's own reading of the command line."""
    return parse_args(deepspeed_argv(spec)[3:])


def test_runs_deepspeed_with_this_interpreter():
    """Catches another environment's deepspeed, found on PATH, starting the ranks."""
    assert deepspeed_argv(SPEC)[:3] == ["/venv/bin/python", "-m", "deepspeed.launcher.runner"]


def test_the_ranks_get_config_and_overrides_unchanged():
    """Catches an override that is lost, split or taken by DeepSpeed's launcher for itself."""
    args = parsed(SPEC)
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


def test_a_cpu_run_counts_its_slots():
    """Catches slot numbers reaching DeepSpeed, which knows one slot on a CPU and refuses slot 2."""
    args = parsed(replace(SPEC, slots={"localhost": (0, 2)}))
    assert (args.num_gpus, args.include) == (2, "")


def test_a_local_gpu_run_names_its_gpus():
    """Catches a run on the first GPUs instead of the chosen ones."""
    args = parsed(replace(SPEC, slots={"localhost": (0, 2)}, device="cuda"))
    assert (args.num_gpus, args.include) == (-1, "localhost:0,2")


def test_a_local_run_reads_no_hostfile():
    """Catches a machine with a /job/hostfile, DeepSpeed's default, taking a local run elsewhere."""
    assert not Path(parsed(SPEC).hostfile).is_file()


def test_several_hosts_run_on_their_slots():
    """Catches slots that DeepSpeed reads differently from the hostfile."""
    spec = replace(SPEC, slots={"a": (0, 1), "b": (3,)}, hostfile=Path("/cluster/hosts"))
    args = parsed(spec)
    assert args.hostfile == "/cluster/hosts"
    assert parse_inclusion_exclusion({"a": 2, "b": 4}, args.include, args.exclude) == {"a": [0, 1], "b": [3]}
    assert not args.force_multi


def test_one_remote_host_is_not_taken_for_this_machine():
    """Catches a run meant for another machine starting here."""
    assert parsed(replace(SPEC, slots={"a": (0,)}, hostfile=Path("/cluster/hosts"))).force_multi
