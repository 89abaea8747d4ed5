"""The command imports its own packages, whatever files the user has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-P", "-c", "from deepcloze import run; run()", "config", "pretrain", "run.dir"]


def run_command(folder: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, path))}
    return subprocess.run(COMMAND, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("intruder", ["launcher.py", "pretrain/__init__.py", "finetune/data.txt", "experiment.py"])
def test_a_hidden_package_is_named(tmp_path: Path, intruder: str) -> None:
    """Catches a user's file that is executed, and a traceback in place of its name."""
    path = tmp_path / "mine" / intruder
    path.parent.mkdir(parents=True)
    path.write_text("print('executed')")
    done = run_command(tmp_path, tmp_path / "mine", ROOT)
    if intruder == "finetune/data.txt":  # a folder without Python files hides no package
        assert done.returncode == 0, done.stderr
        return
    name = Path(intruder).parts[0]
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"deepcloze: {tmp_path / 'mine' / name} hides deepcloze's own package '")
    assert "Traceback" not in done.stderr


def test_files_in_the_working_directory_hide_nothing(tmp_path: Path) -> None:
    """Catches a user's `pretrain.py` that the command imports."""
    for name in ("launcher", "pretrain", "finetune", "experiment", "yaml", "torch"):
        (tmp_path / f"{name}.py").write_text("print('executed')")
    done = run_command(tmp_path, ROOT)
    assert done.returncode == 0, done.stderr
    assert "executed" not in done.stdout
