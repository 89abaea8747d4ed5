import os
from pathlib import Path

import pytest

from experiment.run_folder import open_run_folder
from launcher.supervision.leftovers import remove_earlier_output


def test_a_launch_in_the_foreground_removes_the_output_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches `deepcloze logs` that shows what an earlier launch printed, and a launch that removes its own output."""
    folder = open_run_folder(tmp_path / "run")
    folder.launch_output.write_text("earlier")
    mine = folder.launch_output.stat()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", lambda descriptor: mine)
        remove_earlier_output(folder)
    assert folder.launch_output.exists()
    remove_earlier_output(folder)
    assert not folder.launch_output.exists()
    remove_earlier_output(folder)
    assert list(folder.logs.iterdir()) == []
