import os
import socket
from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.process import own_process
from experiment.process.cpu_cores import cpu_cores
from launcher.hosts.hostfile import is_this_machine
from launcher.hosts.machine import (
    DeviceKind,
    Devices,
    Machine,
    find_devices,
    free_port,
    guess_device,
    launch_machine,
)
from launcher.ranks.environment import forwarded_environment
from launcher.ranks.placement import PlacementOptions, place_ranks


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback in a container whose user is only a number."""

    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert launch_machine().deepspeed_env_text == ""


def test_a_home_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a launch that is refused for a file which it may not need, such as in a home of another user."""
    monkeypatch.setenv("HOME", f"/{300 * 'x'}")  # an error for root too
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert launch_machine().deepspeed_env_text == ""


@pytest.mark.parametrize("given", [None, "cpu", "cuda"])
def test_other_hosts_do_not_use_the_cpu_because_this_one_does(monkeypatch: pytest.MonkeyPatch, given: str | None):
    """Catches a sweep from a machine without GPUs whose second run, or whose child processes, tell hosts with GPUs to
    use their CPUs, and a choice of the user that they do not get."""
    monkeypatch.setattr(own_process, "_given", {})
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # restored at the end
    if given is None:
        monkeypatch.delenv("DS_ACCELERATOR")
    else:
        monkeypatch.setenv("DS_ACCELERATOR", given)
    monkeypatch.setattr("launcher.hosts.machine.find_devices", lambda _: Devices("cpu", (0, 1)))
    for _ in range(2):
        assert forwarded_environment(launch_machine().environ, []).get("DS_ACCELERATOR") == given
        assert own_process.own_environment().get("DS_ACCELERATOR") == given
        assert os.environ["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize(("accelerator", "visible"), [("cpu", "-1"), ("cuda", "0,1")])
def test_gpus_are_hidden_where_the_cpu_is_chosen(monkeypatch: pytest.MonkeyPatch, accelerator: str, visible: str):
    """Catches fine-tuning that uses a GPU with DS_ACCELERATOR=cpu, and one that does not use the GPUs chosen."""
    monkeypatch.setattr(own_process, "_given", {})
    monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    own_process.hide_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


def test_recognizes_this_machine(monkeypatch: pytest.MonkeyPatch):
    """Catches a remote host mistaken for this machine, also where sockets can be bound to addresses of others.
    192.0.2.0/24 is reserved for documentation."""

    class AnyAddress(socket.socket):  # net.ipv4.ip_nonlocal_bind=1
        def bind(self, address: object) -> None:
            pass

    monkeypatch.setattr(socket, "socket", AnyAddress)
    assert is_this_machine("localhost")
    assert is_this_machine(socket.gethostname())
    assert is_this_machine("127.0.0.1")
    assert is_this_machine("127.0.1.1")  # of the own name on Debian
    assert not is_this_machine("192.0.2.1")


def test_ds_accelerator_selects_the_cpu():
    """Catches DS_ACCELERATOR=cpu being ignored on a machine with GPUs."""
    devices = find_devices({"DS_ACCELERATOR": "cpu"})
    assert devices == Devices("cpu", tuple(range(cpu_cores())))


def test_gpus_keep_the_numbers_of_cuda_visible_devices(monkeypatch: pytest.MonkeyPatch):
    """Catches a run on GPUs that the user or the queue did not assign: DeepSpeed ignores the variable."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpus = {"DS_ACCELERATOR": "cuda"}
    assert find_devices(gpus) == Devices("cuda", (0, 1))
    assert find_devices({**gpus, "CUDA_VISIBLE_DEVICES": "6, 3"}) == Devices("cuda", (6, 3))
    unnumbered = find_devices({**gpus, "CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2"})
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=MIG-1,MIG-2: expected GPU numbers"):
        place_ranks(unnumbered, PlacementOptions())
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=MIG-1,MIG-2: expected GPU numbers"):
        place_ranks(unnumbered, PlacementOptions(), {"localhost": 2})


@pytest.mark.parametrize(("installed", "kind"), [("/usr/bin/nvidia-modprobe", "cuda"), (None, "cpu")])
def test_devices_that_are_made_on_first_use_are_found(
    monkeypatch: pytest.MonkeyPatch, installed: str | None, kind: DeviceKind
):
    """Catches a run on the CPU because no program has used the GPUs since the machine started, and an import of torch
    on machines without a driver."""
    import torch

    monkeypatch.setattr("launcher.hosts.machine.guess_device", lambda environ: "cpu")
    monkeypatch.setattr("shutil.which", lambda name: installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_devices({}).kind == kind
    assert find_devices({"DS_ACCELERATOR": "cpu"}).kind == "cpu"


def test_gpus_without_numbers_do_not_concern_a_launch_over_other_hosts(monkeypatch: pytest.MonkeyPatch):
    """Catches a launch that is refused because of GPUs that it does not use."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    hosts = {"192.0.2.1": 2, "192.0.2.2": 2}
    assert place_ranks(launch_machine().devices, PlacementOptions(), hosts) == {
        "192.0.2.1": (0, 1),
        "192.0.2.2": (0, 1),
    }


def test_gpus_that_torch_cannot_use_are_a_problem_of_ranks_here(monkeypatch: pytest.MonkeyPatch):
    """Catches a run on the CPU of a machine with GPUs, because its driver does not fit torch, and a launch over other
    hosts that is refused because of it."""
    import torch

    monkeypatch.setattr("launcher.hosts.machine.guess_device", lambda environ: "cuda")
    monkeypatch.setattr("launcher.hosts.machine.unusable_gpus", lambda environ: "torch cannot use it")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    devices = find_devices({})
    with pytest.raises(UserError, match="torch cannot use it"):
        place_ranks(devices, PlacementOptions())
    assert place_ranks(devices, PlacementOptions(), {"192.0.2.1": 1, "192.0.2.2": 1}).keys() == {
        "192.0.2.1",
        "192.0.2.2",
    }


@pytest.mark.parametrize(
    ("names", "kind"), [((), "cpu"), (("nvidia0", "nvidiactl"), "cuda"), (("kfd",), "cuda"), (("null", "tty0"), "cpu")]
)
def test_a_gpu_is_found_without_torch(tmp_path: Path, names: tuple[str, ...], kind: DeviceKind):
    """Catches the allocator settings of a CPU on hosts with GPUs, or none on hosts without."""
    for name in names:
        (tmp_path / name).touch()
    assert guess_device({}, tmp_path) == kind
    assert guess_device({"DS_ACCELERATOR": "cpu"}, tmp_path) == "cpu"
    assert guess_device({"DS_ACCELERATOR": "cuda"}, tmp_path) == "cuda"


def test_a_free_port_can_be_listened_on():
    """Catches a port in use, on which the ranks would wait for each other in vain."""
    with socket.socket() as server:
        server.bind(("", free_port()))
        server.listen()


def test_an_environment_file_that_is_not_text_is_rejected(tmp_path: Path) -> None:
    """Catches a traceback."""
    path = tmp_path / ".deepspeed_env"
    path.write_bytes("A=1\nNAME=café".encode("latin-1"))
    given = Machine(Devices("cpu", (0,)), {}, free_port, (path,))
    with pytest.raises(UserError, match=r"deepspeed_env:2: not UTF-8 text \(byte 0xe9 at column 9\); convert the file"):
        given.deepspeed_env_text  # noqa: B018 (read on first use)


def test_an_environment_file_is_read_once(tmp_path: Path) -> None:
    """Catches a restart that fails, or differs, because the user has deleted or edited the file since the launch."""
    path = tmp_path / ".deepspeed_env"
    path.write_text("A=1")
    machine = Machine(Devices("cpu", (0,)), {}, free_port, (path,))
    assert machine.deepspeed_env_text == "A=1"
    path.unlink()
    assert machine.deepspeed_env_text == "A=1"
