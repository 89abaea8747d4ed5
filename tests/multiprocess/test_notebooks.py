"""The notebooks in docs/ run as they are, in a kernel of their own."""

import os
import sys
from pathlib import Path

import nbformat
import pytest

from experiment.files import parse_json

NOTEBOOKS = Path(__file__).resolve().parents[2] / "docs" / "notebooks"


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.iterdir()), ids=lambda file: file.name)
def test_notebooks_are_saved_without_outputs(file: Path) -> None:
    """Catches outputs and metadata of an editor, which make the history unreadable."""
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in cells if cell.outputs or cell.execution_count is not None] == []


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cell that fails, and progress of ranks that a notebook does not show."""
    from nbclient import NotebookClient

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # ipykernel would not show what processes print
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # on busy cores, threads wait for each other
    printed = ""
    for name in ("first_run.ipynb", "compare_checkpoints.ipynb"):
        notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        printed += "".join(output.text for output in outputs if output.output_type == "stream")
    assert "step 200: docs loss " in printed, "from a rank"
    comparison = parse_json((tmp_path / "runs/comparison/compare.json").read_bytes())
    assert all(comparison[row]["package"]["mean"] > 1 / 3 for row in ("step 100", "step 400")), "there are six labels"
