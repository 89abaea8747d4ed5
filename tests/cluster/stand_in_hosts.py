"""Hosts that are this machine: a program `ssh` that runs the command here."""

import os
from pathlib import Path

import pytest

_SSH = """#!/bin/sh
# ssh -o … -o … HOST COMMAND
shift 4
case "$1" in
    missing*) echo "ssh: Could not resolve hostname $1: Name or service not known" >&2; exit 255;;
esac
{before}
eval "exec $2"
"""


def install_ssh(folder: Path, monkeypatch: pytest.MonkeyPatch, before: str = "") -> None:
    """Put the program first on PATH. `before`: shell commands that it runs first; $1 is the host."""
    folder.mkdir(exist_ok=True)
    (folder / "ssh").write_text(_SSH.format(before=before))
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
