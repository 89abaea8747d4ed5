import subprocess
import sys

MODULES = (
    "config",
    "run_files.run_folder",
    "tracking",
    "tracking.rank_logs",
    "run_files.goodput",
    "run_files.checkpoints",
    "run_files.provenance",
    "results.report.pages",
    "results.sweep_summary",
)


def test_importing_them_takes_no_heavy_library() -> None:
    """Catches an import that makes `deepcloze --help` wait for torch, or starts wandb where it is not asked for."""
    code = (
        "import importlib, sys\n"
        f"for name in {MODULES!r}:\n"
        "    importlib.import_module(f'experiment.{name}')\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'deepspeed', 'wandb'} & sys.modules.keys()\n"
        "    assert not heavy, (name, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_status_imports_no_heavy_library() -> None:
    """Catches a `deepcloze status` that takes a second because it imports the configs of runs."""
    heavy = {"torch", "numpy", "pyarrow", "finetune.config"}
    code = f"import sys, launcher.status; print(sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
