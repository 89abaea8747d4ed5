import shlex

import pytest

from launcher.hosts.ssh import copy_command, ssh_argv


def test_arguments_survive_the_shell_of_the_host() -> None:
    command = ["python", "-c", "print('$HOME')", ""]
    assert shlex.split(ssh_argv("node-1", command)[-1]) == command


def test_no_connection_is_shared() -> None:
    """Catches a lost host that is noticed when TCP gives up: a connection that `ControlPersist` keeps open has neither
    our timeout, nor does it end with ssh."""
    assert "-o ControlPath=none" in " ".join(ssh_argv("node-1", ["true"]))


@pytest.mark.parametrize(
    ("folder", "command"),
    [("/venv", "rsync -a /venv/ node-1:/venv/"), ("/my venv", "rsync -a -s '/my venv'/ node-1:'/my venv'/")],
)
def test_a_folder_is_copied_to_the_same_path(folder: str, command: str) -> None:
    """Catches a path that the shell of the host splits."""
    assert copy_command(folder, "node-1") == command
