"""`deepcloze pretrain`: check, place the ranks, launch, and report how it ended."""

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from experiment.config import dump_config, load_config
from experiment.errors import StoppedError
from experiment.files import write_text
from experiment.run_folder import Outcome, RunFolder, open_run_folder
from launcher.command import LaunchSpec, deepspeed_argv
from launcher.environment import launcher_environment, remote_environment_file, worker_environment
from launcher.hostfile import read_hostfile
from launcher.placement import cpu_cores, find_devices, free_port, only_this_machine, place_ranks
from launcher.supervisor import Ending, run_attempt

_ROOT = Path(__file__).resolve().parent.parent


def launch_pretraining(
    config: str,
    overrides: Mapping[str, str],
    *,
    hostfile: str | None = None,
    num_gpus: int | None = None,
    include: str | None = None,
    exclude: str | None = None,
    oversubscribe: bool = False,
    dry_run: bool = False,
) -> None:
    """Pretrain as the config file says, one process per slot, and return when the run is done.

    `dry_run` prints the resolved config, the additions to the environment and the command, and starts nothing.

    Raises UserError for whatever is wrong before the ranks start, StoppedError for a run that ended early but can go
    on, and SystemExit for one that failed (with a message) or that the ranks refused (rank 0 prints why).
    """
    from pretrain.config import PretrainConfig

    settings = load_config(PretrainConfig, config, overrides)
    hosts = read_hostfile(hostfile) if hostfile is not None else None
    devices = find_devices(os.environ)
    slots = place_ranks(devices, hosts, num_gpus, include, exclude, oversubscribe)
    added = worker_environment(os.environ, cpu_cores(), max(map(len, slots.values())), devices.kind, _ROOT)
    if devices.kind == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed checks what the ranks will compute on, and prints no guess

    from pretrain.resolve import check_start

    with contextlib.nullcontext() if dry_run else _left_to_rank_0():
        check_start(settings, sum(map(len, slots.values())))

    local = only_this_machine(slots)
    folder = RunFolder(Path(settings.run.dir).absolute())
    spec = LaunchSpec(
        python=sys.executable,
        module="pretrain.run",
        # Another host's shell would read the overrides once more, so they travel in a file there.
        config=Path(config).absolute() if local else folder.logs / "launch.yaml",
        overrides=overrides if local else {},
        slots=slots,
        device=devices.kind,
        master_port=free_port(),
        hostfile=None if local or hostfile is None else Path(hostfile).absolute(),
    )
    argv = deepspeed_argv(spec)
    if dry_run:
        print(_described(dump_config(settings), argv, added))
        return

    open_run_folder(folder.path)
    environment = launcher_environment(os.environ, added)
    if not local:
        write_text(spec.config, dump_config(settings))
        environment["DS_ENV_FILE"] = str(_write_remote_environment(folder, added))
    _conclude(run_attempt(folder, argv, environment, slots))


@contextlib.contextmanager
def _left_to_rank_0() -> Iterator[None]:
    """Warnings are not printed meanwhile: rank 0 checks the same and says them once more."""
    logger = logging.getLogger("pretrain")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _conclude(ending: Ending) -> None:
    """The ending as `deepcloze` reports it: nothing, or what it raises."""
    match ending.outcome:
        case Outcome.DONE:
            return
        case Outcome.STOPPED:
            raise StoppedError(ending.message)
        case Outcome.REFUSED:
            sys.exit(ending.outcome.exit_code)  # rank 0 has printed the message
        case Outcome.FAILED:
            sys.exit(f"deepcloze: the run failed: {ending.message}")


def _described(config: str, argv: list[str], added: Mapping[str, str]) -> str:
    variables = "\n".join(f"{name}={shlex.quote(value)}" for name, value in added.items())
    return f"# config\n{config}\n# added to the environment\n{variables}\n\n# command\n{shlex.join(argv)}"


def _write_remote_environment(folder: RunFolder, added: Mapping[str, str]) -> Path:
    """The file that DeepSpeed exports to other hosts, in the place of the user's own, whose lines it takes over."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    users = [path for path in (Path.home() / name, Path.cwd() / name) if path.is_file()]
    path = folder.logs / "worker.env"
    text = "\n".join(user.read_text(encoding="utf-8") for user in users)
    write_text(path, remote_environment_file(os.environ, added, text))
    return path
