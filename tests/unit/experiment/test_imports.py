import subprocess
import sys
from importlib.metadata import version

import pytest
from packaging.version import Version


@pytest.mark.parametrize(
    "module",
    [
        "config",
        "run_folder",
        "tracking",
        "tracking.rank_logs",
        "goodput",
        "checkpoints",
        "provenance",
        "results.report",
        "results.sweep_summary",
    ],
)
def test_importing_it_takes_no_heavy_library(module: str) -> None:
    """Catches an import that makes `deepcloze --help` wait for torch, or starts wandb where it is not asked for."""
    heavy = {"torch", "transformers", "datasets", "deepspeed", "wandb"}
    code = f"import sys, experiment.{module}; print(sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(Version(version("deepspeed")) < Version("0.19.8"), reason="DeepSpeed before 0.19.8 imports scipy")
def test_a_rank_imports_no_scipy() -> None:
    """Catches an eighth of the time of a rank's imports that is spent on what only object detection uses."""
    rank = [sys.executable, "-X", "importtime", "-m", "pretrain.run"]
    done = subprocess.run(rank, capture_output=True, text=True, check=False)
    assert "--config FILE is missing" in done.stderr
    assert "| torch\n" in done.stderr
    assert "scipy" not in done.stderr


def test_status_imports_no_heavy_library() -> None:
    """Catches a `deepcloze status` that takes a second because it imports the configs of runs."""
    heavy = {"torch", "numpy", "pyarrow", "finetune.config"}
    code = f"import sys, launcher.status; print(sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
