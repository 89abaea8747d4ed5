"""This process and the processes of our modules that it starts.

They import the same code, whatever is installed or lies in the working directory.
"""

import contextlib
import logging
import os
import resource
import site
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from experiment.files import REPOSITORY

LAUNCH_VARIABLE = "DEEPCLOZE_LAUNCH"
"""Names the launch as RUN-ATTEMPT: both are hexadecimal. Only of a launch over several hosts."""

START_VARIABLE = "DEEPCLOZE_START"
"""Start of the attempt, as time.time(). Only on the machine of the launch."""

GATE_VARIABLE = "DEEPCLOZE_GATE"
"""A file. The ranks wait for it after their imports: meanwhile the launch checks the config. Only on the machine of the
launch."""

_DEVICE, _GPUS = "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"
_CPU = {_DEVICE: "cpu", _GPUS: "-1"}  # as `use_cpu` and `hide_gpus` set them; HIP ignores an empty value
_given: dict[str, str | None] = {}  # before that


def has_launcher() -> bool:
    """Return whether `deepcloze` has started this rank, and not `deepspeed` alone."""
    return START_VARIABLE in os.environ or LAUNCH_VARIABLE in os.environ


def module_command(module: str) -> tuple[str, ...]:
    """Return the command of a module as a program; start it with `own_environment`."""
    return (sys.executable, "-P", "-m", module)


def deepcloze_command(name: str, config: str, values: Mapping[str, object]) -> tuple[str, ...]:
    """Return the command line of a command that takes a config file. values: of flags and config keys."""
    flags = (f"--{key}={value}" for key, value in values.items())
    return (*module_command("launcher"), name, "--config", config, *flags)


def own_environment() -> dict[str, str]:
    environment = given_environment()
    return {**environment, "PYTHONPATH": python_path(environment)}


def use_cpu() -> None:
    """Let DeepSpeed, if this process imports it later, use the CPU, instead of looking for a GPU. Neither it nor torch
    says then that there is none."""
    _set(_DEVICE)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # warns of CUDA's compiler without a GPU


def hide_gpus() -> None:
    """Let torch find no GPU if DS_ACCELERATOR is cpu, by the user's choice. Call it before torch looks for one."""
    if given_environment().get(_DEVICE) == "cpu":
        _set(_GPUS)


def _set(name: str) -> None:
    if name not in _given or os.environ.get(name) != _CPU[name]:
        _given[name] = os.environ.get(name)
    os.environ[name] = _CPU[name]


def restore_devices() -> None:
    """Undo `use_cpu` and `hide_gpus`, in a process that is not ours: its child processes would inherit the choice."""
    while _given:
        name, value = _given.popitem()
        if os.environ.get(name) == _CPU[name]:  # nobody has changed it since
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def devices_restored() -> Iterator[None]:
    """Call `restore_devices` after the block, unless this process had chosen a device before, as commands do."""
    is_chosen = bool(_given)
    try:
        yield
    finally:
        if not is_chosen:
            restore_devices()


def given_environment() -> dict[str, str]:
    """Return the environment without the choice of `use_cpu`, which is not the user's: ranks on other hosts may have
    GPUs."""
    environment = dict(os.environ)
    if _DEVICE in _given and environment.get(_DEVICE) == "cpu":
        del environment[_DEVICE]
        if (value := _given[_DEVICE]) is not None:
            environment[_DEVICE] = value
    return environment


@contextlib.contextmanager
def variable_set(name: str, value: str) -> Iterator[None]:
    """Set an environment variable in the block, also for the processes that it starts."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def python_path(environ: Mapping[str, str]) -> str:
    """Return PYTHONPATH with the repository as its first entry. If deepcloze is installed in a site directory, only
    without empty entries: other packages there, such as backports, would hide modules of the standard library."""
    given = [entry for entry in environ.get("PYTHONPATH", "").split(":") if entry]
    if REPOSITORY in (Path(folder).resolve() for folder in (*site.getsitepackages(), site.getusersitepackages())):
        return ":".join(given)
    return ":".join([str(REPOSITORY), *(entry for entry in given if entry != str(REPOSITORY))])


def raise_limit_of_open_files() -> None:
    """Raise the soft limit, often 1024, to the hard limit: corpora, connections and hosts take file descriptors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some systems allow less than their hard limit says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
