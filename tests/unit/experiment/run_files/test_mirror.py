"""Checkpoints in object storage."""

import json
from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.files import write_json
from experiment.models.model_names import local_model
from experiment.run_files.checkpoints import (
    complete_checkpoints,
    find_model_folder,
    mark_complete,
    replace_state,
    verify,
    write_best,
)
from experiment.run_files.mirror import Mirror
from experiment.run_files.provenance import read_provenance, write_provenance
from experiment.run_files.retention import Retention
from experiment.run_files.run_folder import RunFolder, check_run_folder
from experiment.storage import StorageError, exists, list_files, read_bytes, write_bytes


def save(folder: RunFolder, step: int) -> Path:
    checkpoint = folder.checkpoints / f"step-{step:08d}"
    for name in ("engine/rank-00000.safetensors", "hf/config.json", "hf/model.safetensors"):
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text(json.dumps({"name": name, "step": step}))
    write_json(checkpoint / "state.json", {"step": step})
    mark_complete(checkpoint)
    return checkpoint


def mark_again(checkpoint: Path) -> Path:
    (checkpoint / "COMPLETE").unlink()
    mark_complete(checkpoint)
    return checkpoint


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with checkpoints of steps 1 to 4; the second is the best."""
    folder = RunFolder(tmp_path / "run")
    for step in (1, 2, 3, 4):
        save(folder, step)
    (folder.checkpoints / "best").write_text("step-00000002\n")
    folder.metrics.write_text('{"step": 1}\n')
    write_provenance(folder, {}, [])
    return folder


def mirrored(url: str, run: RunFolder) -> Mirror:
    """A mirror of the run."""
    made = Mirror(f"{url}/runs/first")
    for checkpoint in complete_checkpoints(run.checkpoints):
        made.upload(checkpoint)
    made.upload_run_files(run)
    made.write_best("step-00000002")
    return made


@pytest.fixture
def mirror(tmp_path: Path, run: RunFolder) -> Mirror:
    """A mirror in a folder, whose files take less time than objects of a server."""
    return mirrored(f"file://{tmp_path}/bucket", run)


def names(*steps: int) -> list[str]:
    return [f"step-{step:08d}" for step in steps]


def test_an_empty_run_folder_gets_the_newest_and_the_best(bucket: str, run: RunFolder, tmp_path: Path) -> None:
    """Catches a run that starts over on a new host, or loses its best checkpoint, metrics or identity; and one whose
    folder has an incomplete copy of a checkpoint."""
    mirror, folder = mirrored(bucket, run), RunFolder(tmp_path / "restored")
    (folder.checkpoints / "step-00000004" / "hf").mkdir(parents=True)
    write_bytes(f"{mirror.url}/run/metrics.jsonl", b'{"step": 1}\n\xff')  # cut off by a kill
    mirror.restore(folder, lambda: None)
    assert [path.name for path in complete_checkpoints(folder.checkpoints)] == names(2, 4)
    assert [verify(path) for path in complete_checkpoints(folder.checkpoints)] == [None, None]
    assert (folder.checkpoints / "best").read_text() == "step-00000002\n"
    assert folder.metrics.read_bytes() == b'{"step": 1}\n\xff'
    assert folder.provenance.exists()
    assert not list(folder.checkpoints.glob(".*"))


def test_an_interrupted_restore_is_repeated(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that has its newest checkpoint, and forever lacks its best one, its metrics or its identity."""
    from experiment.run_files import mirror as module

    read = module.read_bytes

    complete = mirror.complete()
    for failing in ("best", *names(2, 4)):

        def fail(url: str, failing: str = failing) -> bytes:
            if failing in url:
                raise OSError("the host is lost")
            return read(url)

        folder = RunFolder(tmp_path / failing)
        with monkeypatch.context() as patch:
            patch.setattr(mirror, "complete", lambda: complete)
            patch.setattr(module, "read_bytes", fail)
            with pytest.raises(OSError, match="the host is lost"):
                mirror.restore(folder, lambda: None)
        assert complete_checkpoints(folder.checkpoints) == [], failing
        mirror.restore(folder, lambda: None)
        assert [path.name for path in complete_checkpoints(folder.checkpoints)] == names(2, 4)
        assert folder.metrics.exists()


def test_a_restore_without_provenance_starts(bucket: str, run: RunFolder, tmp_path: Path) -> None:
    """Catches a config.yaml that is taken for a user's: of a run that was lost before its first upload, or after an
    interrupted copy."""
    mirror, folder = Mirror(f"{bucket}/run"), RunFolder(tmp_path / "restored")
    run.config.write_text("run: {}")
    mirror.upload_config(run)
    mirror.restore(folder, lambda: None)
    assert folder.config.exists()
    assert not folder.provenance.exists()
    check_run_folder(folder, "pretraining run")


def test_the_mirror_knows_whose_run_it_has(bucket: str, run: RunFolder, tmp_path: Path) -> None:
    """Catches a mirror in which two runs mix, one that refuses its own run, and an outage that is taken for a free
    mirror."""
    mirror = Mirror(f"{bucket}/run")
    mirror.upload_run_files(run)
    assert mirror.provenance() == read_provenance(run)
    other = RunFolder(tmp_path / "other")
    for check in (run, other):
        write_provenance(check, {}, [])
    mirror.check_owner(run)
    message = f"^checkpoint.mirror: {mirror.url} belongs to another run .* than {other.path}; choose another"
    with pytest.raises(UserError, match=message):
        mirror.check_owner(other)
    with pytest.raises(UserError, match="belongs to another run"):
        mirror.check_owner(RunFolder(tmp_path / "without provenance"))
    for content in (b"damaged", b"{}", b"[]"):
        write_bytes(f"{mirror.url}/run/provenance.json", content)
        assert mirror.provenance() is None
        mirror.check_owner(other)
    with pytest.raises(StorageError, match="there is no bucket"):
        Mirror("s3://no-such-bucket/run").check_owner(other)


def test_a_checkpoint_without_marker_does_not_exist(mirror: Mirror, run: RunFolder, tmp_path: Path) -> None:
    """Catches an upload that was interrupted and is taken for a checkpoint."""
    checkpoint = save(run, 5)
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.name != "COMPLETE":
            write_bytes(f"{mirror.url}/step-00000005/{path.relative_to(checkpoint)}", path.read_bytes())
    assert list(mirror.complete()) == names(1, 2, 3, 4)
    mirror.upload(checkpoint)
    assert list(mirror.complete()) == names(1, 2, 3, 4, 5)


def test_the_marker_comes_last_and_goes_first(mirror: Mirror, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a moment at which a checkpoint has its marker but lacks a file."""
    checkpoint = run.checkpoints / "step-00000004"
    (checkpoint / "hf" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        mirror.upload(checkpoint)
    assert list(mirror.complete()) == names(1, 2, 3)
    from experiment.run_files import mirror as module

    deleted: list[str] = []
    original = module.delete
    monkeypatch.setattr(module, "delete", lambda url: deleted.append(url) or original(url))
    mirror.delete("step-00000003")
    assert deleted == [f"{mirror.url}/step-00000003/COMPLETE", f"{mirror.url}/step-00000003"]
    assert not [name for name in list_files(mirror.url) if "step-00000003" in name]


def test_only_changed_files_are_copied_again(mirror: Mirror, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches gigabytes that are copied because an evaluation was added, and a file that is left out."""
    from experiment.run_files import mirror as module

    checkpoint, copied, original = run.checkpoints / "step-00000004", [], module.upload
    monkeypatch.setattr(module, "upload", lambda file, url: copied.append(url) or original(file, url))
    known = mirror.complete()[checkpoint.name]
    replace_state(checkpoint, {"step": 4, "evaluated": True})
    mirror.upload(checkpoint, known)
    assert copied == [f"{mirror.url}/{checkpoint.name}/state.json"]
    assert read_bytes(copied[0]) == (checkpoint / "state.json").read_bytes()
    assert mirror.complete()[checkpoint.name] == (checkpoint / "COMPLETE").read_bytes()
    mirror.upload(checkpoint, b"damaged")
    assert len(copied) == 1 + 4


def test_waiting_for_the_disk_shows_progress(mirror: Mirror, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that is killed as hung while a slow disk writes a large checkpoint that was just copied."""
    seen = list[str]()
    monkeypatch.setattr("os.fsync", lambda descriptor: seen.append("synced"))
    assert mirror.repair(run.checkpoints / "step-00000004", lambda: seen.append("progress"))
    assert seen[-4:] == ["synced", "progress"] * 2


def test_damaged_checkpoints_are_skipped(
    mirror: Mirror, run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches damage in object storage that reaches a run, and a copy without its state from which none can resume."""
    (run.checkpoints / "step-00000004" / "state.json").unlink()
    mirror.upload(mark_again(run.checkpoints / "step-00000004").rename(run.checkpoints / "step-00000005"))
    write_bytes(f"{mirror.url}/step-00000004/hf/config.json", b"damaged")
    folder = RunFolder(tmp_path / "restored")
    mirror.restore(folder, lambda: None)
    assert [path.name for path in complete_checkpoints(folder.checkpoints)] == names(2, 3)
    assert f"step-00000004: {mirror.url}/step-00000004/hf/config.json is damaged: found checksum" in caplog.text
    assert f"step-00000005: {mirror.url}/step-00000005 is damaged: its state.json is missing" in caplog.text
    for step in (1, 2, 3):
        write_bytes(f"{mirror.url}/step-{step:08d}/COMPLETE", b"{}")
    again = RunFolder(tmp_path / "again")
    with pytest.raises(UserError, match=r"^all 5 checkpoints in .* are damaged$"):
        mirror.restore(again, lambda: None)
    assert not again.metrics.exists(), "another mirror may be named"
    assert not again.provenance.exists()


def test_a_damaged_best_checkpoint_is_not_needed(mirror: Mirror, tmp_path: Path) -> None:
    """Catches a run that cannot resume from the newest checkpoint because an older one is damaged."""
    write_bytes(f"{mirror.url}/step-00000002/hf/config.json", b"damaged")
    folder = RunFolder(tmp_path / "restored")
    mirror.restore(folder, lambda: None)
    assert complete_checkpoints(folder.checkpoints) == [folder.checkpoints / "step-00000004"]
    assert not (folder.checkpoints / "best").exists()


@pytest.mark.parametrize(
    ("damaged", "left", "best"),
    [(None, (1, 2, 4), "step-00000002\n"), (2, (1, 4), None), (4, (1, 2, 3), "step-00000003\n")],
)
def test_a_folder_that_was_behind_has_the_checkpoints_of_the_mirror(
    mirror: Mirror, tmp_path: Path, damaged: int | None, left: tuple[int, ...], best: str | None
) -> None:
    """Catches abandoned checkpoints that take the place of those of the same steps, as the best one and later in the
    mirror; and the loss of them all if the mirror's are damaged."""
    folder, complete = RunFolder(tmp_path / "behind"), mirror.complete()
    save(folder, 1)
    for step in (2, 3):
        replace_state(save(folder, step), {"step": step, "is": "abandoned"})
    write_best(folder.checkpoints, 3)
    if damaged is not None:
        write_bytes(f"{mirror.url}/step-{damaged:08d}/hf/config.json", b"damaged")
    mirror.restore(folder, lambda: None, is_ahead=True)
    found = complete_checkpoints(folder.checkpoints)
    assert [path.name for path in found] == names(*left)
    assert all((path / "COMPLETE").read_bytes() == complete[path.name] for path in found) == (damaged != 4)
    named = folder.checkpoints / "best"
    assert (named.read_text() if named.exists() else None) == best


def test_nothing_is_restored_from_an_empty_mirror(bucket: str, tmp_path: Path) -> None:
    Mirror(f"{bucket}/empty").restore(RunFolder(tmp_path / "restored"), lambda: None)
    assert not (tmp_path / "restored").exists()


def test_retention(mirror: Mirror) -> None:
    """Catches a mirror that grows forever, or loses the best checkpoint."""
    keep = Retention(keep_last=1, best=2)
    assert mirror.apply_retention(names(1, 2, 3, 4), keep, newest=4, drop_later=False) == names(1, 3)
    assert list(mirror.complete()) == names(2, 4)


def test_models_by_url(mirror: Mirror, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a model that is copied whole, copied twice, or not copied again after it has changed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = local_model(f"{mirror.url}/step-00000003")
    assert folder == local_model(f"{mirror.url}/step-00000003/hf/") == find_model_folder(folder)
    assert json.loads((folder / "config.json").read_text())["step"] == 3
    assert not (folder.parent / "engine").exists()
    newest = local_model(mirror.url)
    assert json.loads((newest / "config.json").read_text())["step"] == 4
    (newest / "model.safetensors").write_text("damaged")
    assert find_model_folder(local_model(mirror.url)) == newest
    assert local_model(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match=f"^{mirror.url}/x: expected a checkpoint with a COMPLETE file, or a mirror"):
        local_model(f"{mirror.url}/x")


def test_files_elsewhere_are_not_written(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a COMPLETE file that makes a command write outside of its folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_bytes(f"{mirror.url}/step-00000004/COMPLETE", b'{"../../x": "1"}')
    assert exists(f"{mirror.url}/step-00000004/COMPLETE")
    assert read_bytes(f"{mirror.url}/best") == b"step-00000002\n"
    with pytest.raises(StorageError, match=r"COMPLETE is damaged: '../../x' is not in this folder$"):
        local_model(f"{mirror.url}/step-00000004")
