"""Commands on other hosts over ssh.

User, port, key and jump hosts come from the user's ssh configuration, as for pdsh.
"""

import shlex
import subprocess
from collections.abc import Sequence
from typing import IO

CONNECT_SECONDS = 10
SSH_FAILED = 255
"""The exit code of ssh if it cannot connect, or loses the connection."""
CONNECTION_OPTIONS = "-o ServerAliveInterval=5 -o ControlPath=none"
"""Let ssh end 15 to 20 s after a host has disappeared; by default, it may stay for hours. A shared connection
(`ControlMaster`) would keep the options it was opened with, and the output of ssh open after ssh was killed."""

# Lines that ssh prints after the server's reason, such as "Too many authentication failures".
_AFTER_THE_REASON = ("Connection closed by", "Connection reset by", "Disconnected from")


def ssh_argv(host: str, command: Sequence[str]) -> list[str]:
    """Return the argv that runs a command on a host. ssh asks for nothing: where it would, it fails with
    `SSH_FAILED`."""
    options = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", *CONNECTION_OPTIONS.split())
    return ["ssh", *options, host, shlex.join(command)]


def start_ssh(
    host: str, command: Sequence[str], stdin: int, stdout: int, stderr: int | IO[bytes]
) -> "subprocess.Popen[bytes]":
    """Start ssh with a command for a host, in a process group of its own: Ctrl-C does not reach it. To end it, kill the
    group: what ssh has started, such as a ProxyCommand, has the output of ssh open."""
    argv = ssh_argv(host, command)
    return subprocess.Popen(argv, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True)


def quoted_for_host(path: str) -> str:
    """Quote a path in a command of ssh that a person runs: for the shell here, and for the one of the host."""
    return shlex.quote(shlex.quote(path))


def copy_command(folder: str, host: str) -> str:
    """Return the command that copies a folder to a host, for a person to run."""
    quoted = shlex.quote(folder)
    option = "" if quoted == folder else " -s"  # before 3.2.4, the shell of the host splits the path otherwise
    return f"rsync -a{option} {quoted}/ {host}:{quoted}/"


def last_reason(output: str, default: str = "no message") -> str:
    """Return the last line that ssh printed, with the one before it if that has the reason; `default` if it printed
    nothing."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    count = 2 if lines and lines[-1].startswith(_AFTER_THE_REASON) else 1
    return "; ".join(lines[-count:]) or default
