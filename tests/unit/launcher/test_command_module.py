"""The command imports its own packages, whatever files the user has."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-P", "-c", "from deepcloze import run; run()", "config", "pretrain", "run.dir"]


def run_command(folder: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, path))}
    return subprocess.run(COMMAND, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_module_of_the_same_name_on_the_path_is_not_imported(tmp_path: Path) -> None:
    """Catches a user's file that is executed in place of a package."""
    for intruder in ("launcher.py", "pretrain/__init__.py", "finetune/data.txt", "experiment.py"):
        path = tmp_path / "mine" / intruder
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("print('executed')")
    done = run_command(tmp_path, tmp_path / "mine", ROOT)
    assert done.returncode == 0, done.stderr
    assert "executed" not in done.stdout


def test_worker_processes_import_the_same_packages(wordpiece: Path, tmp_path: Path) -> None:
    """Catches workers, which are other processes, that import a user's `pretrain.py`."""
    (tmp_path / "pretrain.py").write_text("raise SystemExit('executed')")
    (tmp_path / "text.txt").write_text("a b\nc d\n" * 50)
    flags = ["corpus", f"--tokenizer={wordpiece}", "--workers=2", "--source=text.txt", "--output=corpus"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"from deepcloze import run; import sys; sys.argv[1:] = {flags}; run()"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "corpus" / "manifest.json").is_file()


def test_files_in_the_working_directory_hide_nothing(tmp_path: Path) -> None:
    """Catches a user's `pretrain.py` that the command imports."""
    for name in ("launcher", "pretrain", "finetune", "experiment", "yaml", "torch"):
        (tmp_path / f"{name}.py").write_text("print('executed')")
    done = run_command(tmp_path, ROOT)
    assert done.returncode == 0, done.stderr
    assert "executed" not in done.stdout
