import shlex

from launcher.hosts.ssh import ssh_argv


def test_arguments_survive_the_shell_of_the_host() -> None:
    command = ["python", "-c", "print('$HOME')", ""]
    assert shlex.split(ssh_argv("node-1", command)[-1]) == command
