from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.run_files.run_folder import RunFolder, check_not_moved, check_run_folder, open_run_folder


def test_opening_creates_the_folder_and_makes_its_path_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run folder that moves when the working directory changes."""
    monkeypatch.chdir(tmp_path)
    folder = open_run_folder("deep/run")
    monkeypatch.chdir("/")
    assert folder.path == tmp_path / "deep" / "run"
    assert folder.logs.is_dir()
    assert not folder.metrics.exists()
    assert open_run_folder(folder.path) == folder


def test_a_folder_that_cannot_be_created_is_rejected(tmp_path: Path) -> None:
    """Catches a traceback if run.dir names a file."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"run\.dir: cannot create the run folder .*file"):
            open_run_folder(path)


def test_a_folder_without_write_permission_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that fails only at its first checkpoint."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="not writable"):
        open_run_folder(tmp_path)


def test_the_config_of_a_moved_run_is_refused(tmp_path: Path) -> None:
    """Catches a run that starts again, from nothing, in the folder that it was moved from."""
    old, new = tmp_path / "old", tmp_path / "my runs" / "new"
    (old / "logs").mkdir(parents=True)
    (old / "config.yaml").touch()
    check_not_moved(old / "config.yaml", (), RunFolder(old))
    (old / "provenance.json").touch()
    check_not_moved(old / "config.yaml", (), RunFolder(old))
    new.parent.mkdir()
    old.rename(new)
    with pytest.raises(UserError, match=rf"run that was in {old}, .* --run.dir='{new}'$"):
        check_not_moved(new / "config.yaml", (), RunFolder(old))
    (new / "logs").rename(tmp_path / "logs")
    check_not_moved(new / "config.yaml", (), RunFolder(old))  # as in a mirror
    (tmp_path / "logs").rename(new / "logs")
    check_not_moved(new / "config.yaml", {"run.dir": str(tmp_path / "another")}, RunFolder(tmp_path / "another"))


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_files_of_a_user_are_not_replaced(tmp_path: Path, name: str) -> None:
    """Catches a run that writes its own config over that of the user in the same folder, or empties other metrics; and
    one that rejects its own folder, or a copy of it."""
    folder = RunFolder(tmp_path)
    (tmp_path / name).write_text("of a user")
    check_run_folder(folder, None)  # a sweep has folders below this one
    for kind in ("pretraining run", "fine-tuning run"):
        with pytest.raises(UserError, match=rf"^run\.dir: {tmp_path} holds a {name} that no run has written; move it"):
            check_run_folder(folder, kind)
    for own in ("provenance.json", "logs/restored", "checkpoints/step-00000001/COMPLETE"):
        (tmp_path / own).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / own).touch()
        check_run_folder(folder, "pretraining run")
        (tmp_path / own).unlink()
