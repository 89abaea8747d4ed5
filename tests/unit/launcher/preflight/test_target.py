from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiment.config import build_config
from experiment.files import REPOSITORY
from experiment.run_files.run_folder import RunFolder
from launcher.hosts.machine import Devices, Machine
from launcher.preflight.target import Target, target_of_hosts, target_of_run
from launcher.ranks.placement import HostOptions
from pretrain.config import PretrainConfig


def machine(environ: dict[str, str]) -> Machine:
    return Machine(Devices("cpu", (0, 1)), environ=environ, find_port=lambda: 29500)


HOSTS = target_of_hosts({"a": (0,), "b": (0,), "c": (0,)}, machine({}), HostOptions())


def test_variables_in_deepspeed_env_come_from_there(tmp_path: Path) -> None:
    """Catches a launch that sends the variable of the shell too; and one on this machine alone that reads the file,
    which applies to other hosts."""
    path = tmp_path / ".deepspeed_env"
    path.write_text("OMP_NUM_THREADS=8\n")
    given = replace(machine({"OMP_NUM_THREADS": "1", "HF_HOME": "/hf"}), deepspeed_env_files=(path,))
    hosts = target_of_hosts({"a": (0,), "b": (0,)}, given, HostOptions())
    assert hosts.host_environment == {"HF_HOME": "/hf"}
    path.write_bytes(b"\xe9")
    target_of_hosts({"localhost": (0,)}, replace(given), HostOptions())


def run(folder: Path, first_step: int = 0, **sections: Any) -> Target:
    tree = {
        "run": {"dir": str(folder)},
        "model": {"config": {"model_type": "bert"}},
        "corpus": {"train": "/corpora/wiki"},
        "schedule": {"steps": 1000},
        "checkpoint": {"keep_last": 2},
        "engine": {"ds_config": "fp32_zero1"},
    }
    config = build_config(PretrainConfig, {**tree, **sections})
    return target_of_run(HOSTS, config, num_parameters=1000, folder=RunFolder(folder), first_step=first_step)


def test_the_files_that_ranks_read(tmp_path: Path) -> None:
    """Catches a corpus or model of the config that is not compared."""
    target = run(
        tmp_path,
        corpus={"train": [{"path": "/a"}, {"path": "/b"}], "eval": {"books": "/books", "same": "/a"}},
        model={"init_from": "/model", "added_tokens": "/tokenizer"},
    )
    assert list(map(str, target.files)) == [
        *("/a/manifest.json", "/b/manifest.json", "/books/manifest.json"),
        str(REPOSITORY / "ds_configs" / "fp32_zero1.json"),
        *("/model/config.json", "/tokenizer/tokenizer.json"),
    ]
    assert target.folder == tmp_path


EVALUATED = {"corpus": {"train": "/wiki", "eval": {"books": "/books"}}}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, 3 * 16_000),  # two that are kept while the third is written
        ({"model": {"config": {"model_type": "bert"}, "ema_decay": 0.99}}, 3 * 24_000),
        (EVALUATED, 3 * 16_000),  # no metric says which checkpoint is best
        ({**EVALUATED, "evaluation": {"best_metric": "eval/books/loss"}}, 4 * 16_000),
        ({"checkpoint": {"keep_last": 2, "keep_every": 200}}, 8 * 16_000),
        ({"checkpoint": {"keep_last": 2, "keep_every": 200}, "schedule": {"epochs": 3}}, 3 * 16_000),
    ],
)
def test_the_bytes_of_the_planned_checkpoints(tmp_path: Path, sections: dict[str, Any], expected: int) -> None:
    """Catches a run that fills its disk though preflight found room for it, and one that is refused though it fits."""
    assert run(tmp_path, **sections).checkpoint_bytes == expected


@pytest.mark.parametrize(
    ("present", "first_step", "options", "expected"),
    [
        ([300, 400], 400, {"keep_last": 2}, 1),  # the next one
        ([100, 200, 300, 400], 400, {"keep_last": 2}, 0),  # the run deletes two before
        ([100, 200, 300, 400], 200, {"keep_last": 2}, 1),  # the last two are damaged
        ([200, 400, 450, 500], 500, {"keep_last": 2, "keep_every": 200}, 1 + 3),  # of steps 600, 800 and 1,000
        ([450, 500], 500, {"keep_last": 2, "keep_every": 200}, 1 + 3),  # the others were moved away
        ([], 900, {"keep_last": 2, "keep_every": 200}, 3 + 1),  # a fork
        ([], 2000, {"keep_last": 2, "keep_every": 200}, 3),  # of a longer run, which is refused elsewhere
    ],
)
def test_checkpoints_that_are_there_need_no_room_again(
    tmp_path: Path, present: list[int], first_step: int, options: dict[str, int], expected: int
) -> None:
    """Catches a run that cannot resume on a disk where it needs no more room, as after `keep_last` was lowered; and
    room for milestones of steps that the run will never save."""
    for step in present:
        checkpoint = RunFolder(tmp_path).checkpoints / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "COMPLETE").touch()
    assert run(tmp_path, first_step, checkpoint=options).checkpoint_bytes == expected * 16_000


def test_the_hosts_that_meet() -> None:
    assert [HOSTS.peer_of(host) for host in HOSTS.slots] == ["b", "a", "a"]
    assert target_of_hosts({"a": (0,)}, machine({}), HostOptions()).peer_of("a") is None


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {}),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, {"GLOO_SOCKET_IFNAME": ("eth0",)}),
        ({"GLOO_SOCKET_IFNAME": "eth0,eth1"}, {"GLOO_SOCKET_IFNAME": ("eth0", "eth1")}),
        ({"NCCL_SOCKET_IFNAME": "=ib0"}, {"NCCL_SOCKET_IFNAME": ("ib0",)}),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, {}),
        ({"NCCL_SOCKET_IFNAME": "eth"}, {}),  # a prefix
    ],
)
def test_interfaces_that_are_named_exactly(environ: dict[str, str], expected: dict[str, tuple[str, ...]]) -> None:
    assert target_of_hosts({"a": (0,)}, machine(environ), HostOptions()).interfaces == expected
