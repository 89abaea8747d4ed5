"""Hosts that are this machine: a program `ssh` that runs the command here."""

import os
from pathlib import Path

import pytest

_SSH = """#!/bin/sh
# ssh -o … [-o …] HOST COMMAND
while [ "$1" = -o ]; do shift 2; done
case "$1" in
    missing*) echo "ssh: Could not resolve hostname $1: Name or service not known" >&2; exit 255;;
esac
BEFORE
eval "exec $2"
"""

STAND_IN_GUARD = """
read -r request
echo 'deepcloze guard: {"node": "node", "address": "10.0.0.1", "port": 4567}'
while read -r line; do
    case "$line" in end) echo 'deepcloze guard: ended'; exit 0;; esac
done
exit 0
"""
"""Shell commands that answer the launcher like a guard."""


def install_ssh(folder: Path, monkeypatch: pytest.MonkeyPatch, before: str = "") -> None:
    """Put the program first on PATH. `before`: shell commands that it runs first; $1 is the host, $2 the command."""
    folder.mkdir(exist_ok=True)
    (folder / "ssh").write_text(_SSH.replace("BEFORE", before))
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
