"""The command line of ssh to other hosts.

User, port, key and jump hosts come from the user's ssh configuration, as for pdsh.
"""

import shlex
from collections.abc import Sequence

CONNECT_SECONDS = 10
SSH_FAILED = 255
"""The exit code of ssh if it cannot connect, or loses the connection."""
KEEP_ALIVE = "-o ServerAliveInterval=5"
"""Lets ssh end 15 to 20 s after a host has disappeared; without this option, it may stay for hours."""


def ssh_argv(host: str, command: Sequence[str], connect_seconds: int = CONNECT_SECONDS) -> list[str]:
    """Return the argv that runs a command on a host. ssh asks for nothing: where it would, it fails with
    `SSH_FAILED`."""
    options = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={connect_seconds}", *KEEP_ALIVE.split())
    return ["ssh", *options, host, shlex.join(command)]
