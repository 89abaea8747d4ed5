import json
import shutil
import subprocess
from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.run_files.provenance import (
    ancestors_of,
    collect_provenance,
    git_state,
    read_origin,
    read_provenance,
    separate_copy,
    write_origin,
    write_provenance,
)
from experiment.run_files.run_folder import RunFolder, open_run_folder


def git(repository: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    done = subprocess.run(
        ["git", "-C", str(repository), *identity, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    path = tmp_path / "repository"
    path.mkdir()
    git(path, "init", "-q")
    (path / "file").write_text("1")
    git(path, "add", "file")
    git(path, "commit", "-q", "-m", "first")
    return path


def test_a_checkout_is_named_by_commit_and_changes(repository: Path) -> None:
    """Catches a run of modified code that is recorded as the commit."""
    commit = git(repository, "rev-parse", "HEAD")
    assert git_state(repository) == {"commit": commit, "dirty": False}
    (repository / "notes").write_text("untracked files change no code that git knows")
    assert git_state(repository) == {"commit": commit, "dirty": False}
    (repository / "file").write_text("2")
    assert git_state(repository) == {"commit": commit, "dirty": True}


def test_no_checkout_no_git_no_commit_are_none(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback for an installed copy, and the commit of another repository."""
    assert git_state(tmp_path) is None
    inside = repository / "copy"
    inside.mkdir()
    assert git_state(inside) is None
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    assert git_state(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert git_state(repository) is None


def test_an_attempt_says_what_ran_where_and_with_what() -> None:
    """Catches facts that go missing, and values that JSON cannot hold."""
    attempt = json.loads(json.dumps(collect_provenance(["deepcloze", "pretrain"], world_size=2)))
    assert attempt["command"] == ["deepcloze", "pretrain"]
    assert attempt["world_size"] == 2
    assert attempt["date"].endswith("+00:00")
    assert {"python", "torch", "deepspeed", "transformers"} <= attempt["versions"].keys()
    assert attempt["versions"]["torch"]
    assert attempt["hardware"]["cores"] >= 1
    assert attempt["hardware"]["memory_bytes"] > 1e8
    assert isinstance(attempt["hardware"]["gpus"], list)
    assert attempt["hardware"]["cpu"]


def test_the_first_attempt_is_kept_and_the_id_stays(tmp_path: Path) -> None:
    """Catches a resume that overwrites the first attempt, or takes a new id."""
    folder = open_run_folder(tmp_path)
    assert read_provenance(folder) is None
    run_id = write_provenance(folder, {"date": 1}, ancestors=[{"run_id": "parent"}])["run_id"]
    record = {"run_id": run_id, "ancestors": [{"run_id": "parent"}], "attempts": [{"date": 1}, {"date": 2}]}
    assert write_provenance(folder, {"date": 2}) == record
    assert read_provenance(folder) == record
    assert list(record) == list(json.loads(folder.provenance.read_text()))
    assert write_provenance(open_run_folder(tmp_path / "other"), {})["run_id"] != run_id
    write_provenance(folder, {"date": 3}, decontaminated={"books": ["1"]})
    assert (read_provenance(folder) or {})["decontaminated"] == {"books": ["1"]}


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"run_id": 1, "ancestors": [], "attempts": []}',
        '{"run_id": "a", "ancestors": [], "attempts": [1]}',
        '{"run_id": "a", "attempts": []}',
    ],
)
def test_a_damaged_file_is_rejected_rather_than_replaced(tmp_path: Path, damage: str) -> None:
    """Catches a history that is silently lost."""
    folder = open_run_folder(tmp_path)
    folder.provenance.write_text(damage)
    with pytest.raises(UserError, match=r"provenance\.json is damaged.* with checkpoints takes it from the newest one"):
        write_provenance(folder, {})
    assert folder.provenance.read_text() == damage


def test_a_foreign_model_is_identified_by_its_weights(tmp_path: Path) -> None:
    """Catches an ancestor that cannot be told from another one of the same name."""
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    (tmp_path / "config.json").write_text("{}")
    (ancestor,) = ancestors_of(tmp_path, "init_from")
    assert ancestor == {
        "relation": "init_from",
        "folder": str(tmp_path),
        "name": tmp_path.name,
        "weights": {"model.safetensors": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
    }


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/home/me/models/bert", "bert"),
        ("/home/me/.cache/huggingface/hub/models--gpt2/snapshots/607a", "models--gpt2/snapshots/607a"),
    ],
)
def test_a_model_folder_names_no_path(tmp_path: Path, folder: str, name: str) -> None:
    """Catches the user's folders in a model that is published, and an ancestor that loses its name on the Hub."""
    record = {"run_id": "a", "ancestors": [{"relation": "init_from", "folder": folder, "name": "x"}]}
    write_origin(tmp_path, RunFolder(Path("/home/me/runs/first")), record, step=3)
    ancestors = [{"relation": "init_from", "folder": name, "name": "x"}]
    assert read_origin(tmp_path) == {"run_id": "a", "folder": "first", "step": 3, "ancestors": ancestors}


def test_averaged_weights_are_told_from_those_of_their_step(tmp_path: Path) -> None:
    """Catches a run of which nobody can say afterwards which of the two it started from."""
    run = {"run_id": "a", "folder": "first", "step": 3}
    for name, expected in (("hf", run), ("hf-ema", run | {"averaged": True})):
        model = tmp_path / name
        model.mkdir()
        write_origin(model, RunFolder(Path("first")), {"run_id": "a", "ancestors": []}, step=3)
        exported = shutil.copytree(model, tmp_path / f"{name}-exported")
        (model / "deepcloze.json").write_text(json.dumps(run | {"ancestors": []}))  # as older versions wrote it
        for found in (model, exported):
            assert ancestors_of(found, "init_from") == [{"relation": "init_from", **expected}]


def test_a_damaged_origin_is_rejected(tmp_path: Path) -> None:
    """Catches ancestors that are silently lost, and a traceback."""
    assert read_origin(tmp_path) is None
    (tmp_path / "deepcloze.json").write_text('{"run_id": "a"}')
    with pytest.raises(UserError, match=r"deepcloze\.json is damaged"):
        read_origin(tmp_path)


def test_a_copied_run_gets_an_id_of_its_own(tmp_path: Path) -> None:
    """Catches two runs that log to one run of W&B and write to one mirror; and a moved run that becomes another one."""
    first, copy = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "copy")
    run_id = write_provenance(first, {"folder": str(first.path)}, [])["run_id"]
    assert separate_copy(first) is None
    assert separate_copy(copy) is None
    (tmp_path / "link").symlink_to(first.path)
    assert separate_copy(RunFolder(tmp_path / "link")) is None
    shutil.copytree(first.path, copy.path)
    first.provenance.write_text("damaged")
    assert separate_copy(copy) is None
    shutil.copy(copy.provenance, first.provenance)
    assert separate_copy(copy) == first.path
    own = write_provenance(copy, {"folder": str(copy.path)})["run_id"]
    assert own != run_id
    assert separate_copy(copy) is None
    moved = RunFolder(copy.path.rename(tmp_path / "moved"))
    assert separate_copy(moved) is None
    assert write_provenance(moved, {})["run_id"] == own
