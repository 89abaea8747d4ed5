import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.files import REPOSITORY
from experiment.process import own_process
from launcher.hosts.guarded_hosts import Rendezvous
from launcher.hosts.machine import DeviceKind
from launcher.ranks.environment import (
    deepspeed_environment,
    exported_text,
    forwarded_environment,
    host_environment,
    launch_environment,
    remote_deepspeed_environment,
)

SITE = Path(sysconfig.get_path("purelib")).resolve()
LOADER = Path("/lib64/ld-linux-x86-64.so.2")


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(2, 1, "2"), (2, 2, "1"), (8, 3, "2"), (2, 5, "1")])
def test_ranks_share_the_cores(cores: int, ranks: int, threads: str):
    """Catches every rank using all cores, which makes two ranks slower than one; and no threads at all."""
    assert host_environment({}, cores, ranks, "cpu")["OMP_NUM_THREADS"] == threads


def test_a_cpu_run_sets_the_allocator_and_the_device():
    """Catches a missing setting on CPUs, or one that slows down the hosts of GPU runs."""
    cpu, gpu = (host_environment({}, 2, 2, device) for device in ("cpu", "cuda"))
    assert cpu["GLIBC_TUNABLES"].startswith("glibc.malloc.mmap_threshold=4294967296:")
    assert gpu == {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert launch_environment({}, "cpu")["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize("device", ["cuda", None])
def test_the_launch_decides_nothing_that_depends_on_the_devices_of_other_hosts(device: DeviceKind | None):
    """Catches a launch from a machine without GPUs that makes hosts with GPUs train on their CPUs."""
    assert launch_environment({}, device).keys() == {"TOKENIZERS_PARALLELISM", "PYTHONPATH", "PYTHONSAFEPATH"}


@pytest.mark.skipif(not LOADER.exists(), reason="another C library or processor")
def test_glibc_understands_the_allocator_setting():
    """Catches a misspelled tunable: glibc warns about a bad value but ignores an unknown name."""
    setting = host_environment({}, 2, 2, "cpu")["GLIBC_TUNABLES"]
    listed = subprocess.run(
        [LOADER, "--list-tunables"],
        env=os.environ | {"GLIBC_TUNABLES": setting},
        capture_output=True,
        text=True,
        check=True,
    )
    values = dict(line.split(":", 1) for line in listed.stdout.splitlines())
    for entry in setting.split(":"):
        name, value = entry.split("=")
        assert int(values[name].split()[0], 16) == int(value)


def test_user_settings_are_kept():
    """Catches the launcher overriding variables set by the user."""
    own = {
        "GLIBC_TUNABLES": "glibc.malloc.check=1",
        "OMP_NUM_THREADS": "7",
        "OMP_WAIT_POLICY": "active",
        "TOKENIZERS_PARALLELISM": "true",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    assert launch_environment(own, "cpu").keys() == {"PYTHONPATH", "PYTHONSAFEPATH"}
    assert host_environment(own, 8, 2, "cpu") == {}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, str(REPOSITORY)),
        ("", str(REPOSITORY)),
        ("/a:/b", f"{REPOSITORY}:/a:/b"),
        (f"/a:{REPOSITORY}", f"{REPOSITORY}:/a"),
    ],
)
def test_the_repository_is_imported_first(before: str | None, after: str):
    """Catches ranks that import a user's `pretrain.py`, or not ours from another folder, and a lost PYTHONPATH."""
    environ = {} if before is None else {"PYTHONPATH": before}
    added = launch_environment(environ, "cuda")
    assert added["PYTHONPATH"] == after
    assert added["PYTHONSAFEPATH"] == "1", "nothing from the working directory"


@pytest.mark.parametrize(("before", "after"), [(None, ""), ("/a::/b", "/a:/b"), (f"{SITE}:/a", f"{SITE}:/a")])
def test_a_wheel_does_not_put_other_packages_first(
    before: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches ranks that import a backport, such as of argparse, in place of the standard library, because it is
    installed beside deepcloze; and ranks that lose the folder because something on the path hides ours."""
    monkeypatch.setattr(own_process, "REPOSITORY", SITE)
    environ = {} if before is None else {"PYTHONPATH": before}
    assert launch_environment(environ, "cuda")["PYTHONPATH"] == after


def test_deepspeed_does_not_see_cuda_visible_devices():
    """Catches GPUs filtered twice: slots are numbered over the whole machine."""
    environ = {"CUDA_VISIBLE_DEVICES": "2,3", "HOME": "/home"}
    assert deepspeed_environment(environ, {"A": "1"}) == {"HOME": "/home", "A": "1"}


def test_variables_for_other_hosts():
    """Catches a network interface that is not forwarded (gloo then picks a wrong one), GPUs of this machine, and
    alerts that rank 0 cannot send from another host."""
    alerts = {f"DEEPCLOZE_{name}": "secret" for name in ("SMTP_PASSWORD", "WEBHOOK_URL", "APPRISE_URLS")}
    environ = {"GLOO_SOCKET_IFNAME": "eth1", "CUDA_VISIBLE_DEVICES": "3", "WANDB_API_KEY": "secret", "MINE": "a b"}
    environ |= {
        **alerts,
        "DEEPCLOZE_QUIET": "1",
        "DEEPCLOZE_RUN_SET": "1",
        "TORCHINDUCTOR_CACHE_DIR": "/scratch",
        "DEEPCLOZE_LAUNCH": "of another launch",
    }
    assert forwarded_environment(environ | {"HOME": "/home"}, ["MINE"]) == {
        "DEEPCLOZE_QUIET": "1",
        "DEEPCLOZE_RUN_SET": "1",
        "GLOO_SOCKET_IFNAME": "eth1",
        "MINE": "a b",
        "TORCHINDUCTOR_CACHE_DIR": "/scratch",
        "WANDB_API_KEY": "secret",
        **alerts,
    }
    with pytest.raises(UserError, match="--env: OTHER is not set"):
        forwarded_environment(environ, ["OTHER"])


def test_the_users_deepspeed_env_overrides_the_shell() -> None:
    """Catches OMP_NUM_THREADS=1 of a login profile in place of the number in the file, as `deepspeed` never has it."""
    environ = {"OMP_NUM_THREADS": "1", "NCCL_DEBUG": "WARN", "HF_HOME": "/hf"}
    text = "export OMP_NUM_THREADS = 8\n# HF_HOME=/other\nNCCL_DEBUG=INFO\n"
    assert forwarded_environment(environ, ["NCCL_DEBUG"], text) == {"HF_HOME": "/hf", "NCCL_DEBUG": "WARN"}


def test_ranks_of_mpi_and_srun_get_the_address_where_they_meet():
    """Catches ranks that cannot find each other."""
    rendezvous, launch = Rendezvous("run-1", "10.0.0.1", 29500), ["A=1", "DEEPCLOZE_LAUNCH=run-1"]
    assert exported_text({"A": "1"}, rendezvous, "pdsh", "").splitlines() == launch
    met = ["MASTER_ADDR=10.0.0.1", "MASTER_PORT=29500"]
    assert exported_text({"A": "1"}, rendezvous, "slurm", "").splitlines() == launch + met


def test_variables_that_deepspeed_exports_appear_in_no_command_line_unless_the_user_wants_it():
    """Catches secrets in command lines, and comments that break them."""
    user_text = "# A=1\nexport NCCL_DEBUG=INFO\n OMP_NUM_THREADS = 2\n\n"
    text = exported_text({"OMP_NUM_THREADS": "4"}, None, "pdsh", user_text)
    assert text.splitlines() == ["OMP_NUM_THREADS = 2", "NCCL_DEBUG=INFO"]
    secret = {"MLFLOW_TRACKING_PASSWORD": "secret", "UCX_TOKEN": "secret", "PYTHON_TOKEN": '"$(id)"'}
    environ = {**secret, "HOME": "/home", "PYTHONPATH": "/mine"}
    forwarded = forwarded_environment(environ, ["UCX_TOKEN", "PYTHONPATH"])
    assert forwarded == secret  # ranks get the PYTHONPATH of the launch, with the repository
    found = remote_deepspeed_environment(environ, {"PYTHONPATH": "/repository:/mine"}, forwarded)
    options = "-o ServerAliveInterval=5 -o ControlPath=none"
    assert found == {"HOME": "/home", "PYTHONPATH": "/repository:/mine", "PDSH_SSH_ARGS_APPEND": options}
    found = remote_deepspeed_environment({"PDSH_SSH_ARGS_APPEND": "-p 2222"}, {}, {})
    assert found == {"PDSH_SSH_ARGS_APPEND": f"-p 2222 {options}"}


def test_named_variables_are_kept_unless_deepspeed_exports_them() -> None:
    """Catches a launcher that does not find mpirun, or its libraries, because of --env=PATH,LD_LIBRARY_PATH, and a
    prefix that DeepSpeed has added."""
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.launcher.runner import EXPORT_ENVS

    exported = {f"{prefix}_X": "secret" for prefix in [*EXPORT_ENVS, *CUDA_Accelerator.export_envs(None)]}
    kept = {"PATH": "/opt/mpi/bin", "LD_LIBRARY_PATH": "/opt/mpi/lib"}
    environ = exported | kept
    found = remote_deepspeed_environment(environ, {}, forwarded_environment(environ, list(environ)))
    assert found.keys() == kept.keys() | {"PDSH_SSH_ARGS_APPEND"}


@pytest.mark.parametrize(
    ("own", "added"),
    [
        ({"NCCL_SOCKET_IFNAME": "eth0"}, {"GLOO_SOCKET_IFNAME": "ib0"}),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, {"NCCL_SOCKET_IFNAME": "=ib0"}),
    ],
)
def test_gloo_and_nccl_use_the_interface_unless_the_user_has_chosen_one(own: dict[str, str], added: dict[str, str]):
    """Catches a choice of the user that is ignored."""
    assert host_environment(own, 2, 2, "cuda", "ib0").items() >= added.items()
    assert not host_environment(own, 2, 2, "cuda", "ib0").keys() & own.keys()
    assert not {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} & host_environment({}, 2, 2, "cuda").keys()
