import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from experiment.errors import HostError, UserError
from experiment.files import checksum
from experiment.run_files import checkpoints as checkpoints_module
from experiment.run_files.checkpoints import (
    Verify,
    checkpoint_candidates,
    checkpoint_path,
    checkpoints_to_resume,
    complete_checkpoints,
    find_model_folder,
    last_usable,
    mark_complete,
    named_best,
    names_model_folder,
    read_state,
    replace_state,
    verify,
    verify_descriptions,
    write_best,
)
from experiment.run_files.retention import Retention, apply_retention, discard


def make(checkpoints: Path, *steps: int) -> list[Path]:
    """Checkpoints of these steps, complete."""
    made = []
    for step in steps:
        path = checkpoint_path(checkpoints, step)
        (path / "engine").mkdir(parents=True)
        (path / "engine" / "index.json").write_text("{}")
        (path / "engine" / "rank-00000.safetensors").write_bytes(bytes(range(256)) + bytes([step % 256]))
        (path / "state.json").write_text(f'{{"step": {step}}}\n')
        (path / "hf").mkdir()
        (path / "hf" / "config.json").write_text("{}")
        mark_complete(path)
        made.append(path)
    return made


def flip(path: Path, at: int = 100) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def newest_usable(checkpoints: Path) -> Path | None:
    candidates = complete_checkpoints(checkpoints)
    return last_usable(candidates, verify) if candidates else None


def steps(checkpoints: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in complete_checkpoints(checkpoints)]


def test_the_newest_is_the_one_of_the_largest_step(tmp_path: Path) -> None:
    """Catches an order by name, where step 100,000,000 comes before step 20."""
    make(tmp_path, 20, 3, 123_456_789)
    assert steps(tmp_path) == [3, 20, 123_456_789]
    assert newest_usable(tmp_path) == checkpoint_path(tmp_path, 123_456_789)


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    """Catches an error at the very first start of a run."""
    assert newest_usable(tmp_path / "checkpoints") is None


def test_a_folder_without_the_complete_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    """Catches partly written or deleted checkpoints, and other folders, taken for complete checkpoints."""
    (whole,) = make(tmp_path, 1)
    unmarked, aside = make(tmp_path, 2, 3)
    (unmarked / "COMPLETE").unlink()
    aside.rename(tmp_path / f".{aside.name}.partial")
    shutil.copytree(whole, tmp_path / "step-copy")
    (tmp_path / "best").write_text("step-00000001")
    assert complete_checkpoints(tmp_path) == [whole]
    assert newest_usable(tmp_path) == whole


@pytest.mark.parametrize("victim", ["engine/rank-00000.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone"])
def test_a_damaged_checkpoint_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, victim: str, damage: str
) -> None:
    """Catches a run that resumes from a damaged checkpoint, or falls back without a warning."""
    before, newest = make(tmp_path, 1, 2)
    file = newest / victim
    match damage:
        case "flipped":
            flip(file, at=5)
        case "truncated":
            file.write_bytes(file.read_bytes()[:-1])
        case "gone":
            file.unlink()
    problem = verify(newest)
    assert victim in problem
    with caplog.at_level(logging.WARNING):
        assert newest_usable(tmp_path) == before
    assert str(newest) in caplog.text
    assert victim in caplog.text


def test_a_checkpoint_that_is_deleted_while_it_is_verified(tmp_path: Path) -> None:
    """Catches a checkpoint that its run has deleted, as a fork or an evaluation reads it, called damaged."""
    (checkpoint,) = make(tmp_path, 10)

    def verify_late(path: Path) -> str | None:
        discard(path)
        return verify(path)

    with pytest.raises(UserError, match=rf"^{checkpoint} was deleted while it was read: .*; run the command again$"):
        last_usable([checkpoint], verify_late)


@pytest.mark.parametrize("victim", ["COMPLETE", "state.json"])
def test_an_error_of_the_disk_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, victim: str
) -> None:
    """Catches a good checkpoint that is skipped, and deleted by the next save, because a network file system failed for
    a moment."""
    _, newest = make(tmp_path, 1, 2)
    failures, opened = [errno.ESTALE, errno.EIO], Path.open

    def fail(path: Path, *args: Any, **options: Any) -> Any:
        if path == newest / victim and failures:
            raise OSError(failures[0], os.strerror(failures.pop(0)), str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", fail)
    assert last_usable(complete_checkpoints(tmp_path), lambda path: verify(path, waits=(0, 0))) == newest
    assert f"{newest / victim} cannot be read: Stale file handle; trying again in 0 s" in caplog.messages
    failures.append(errno.ESTALE)
    with pytest.raises(
        HostError, match=rf"^{newest / victim} cannot be read: Stale file handle. The checkpoint may be"
    ):
        last_usable(complete_checkpoints(tmp_path), lambda path: verify(path, waits=()))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_file_without_permission_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """Catches half a minute of attempts that cannot succeed, and the advice to try again."""
    (newest,) = make(tmp_path, 1)

    def deny(path: Path, *args: Any, **options: Any) -> Any:
        raise PermissionError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(UserError, match=rf"^{newest}/COMPLETE cannot be read: {os.strerror(number)}$") as caught:
        verify(newest, waits=(0,))
    assert not isinstance(caught.value, HostError)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.EIO, HostError), (errno.ESHUTDOWN, HostError), (errno.EACCES, UserError)]
)
def test_a_folder_that_cannot_be_listed_is_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[UserError]
) -> None:
    """Catches a run that starts over, and a checkpoint that is complete without its files, because a network disk did
    not answer for a moment."""
    found = make(tmp_path / "run" / "checkpoints", 1, 2)
    failures = fail_to_list(monkeypatch, OSError(number, os.strerror(number)))
    with pytest.raises(OSError, match=os.strerror(number)):
        complete_checkpoints(found[0].parent)
    with pytest.raises(OSError, match=os.strerror(number)):
        mark_complete(found[0])
    with pytest.raises(expected, match=rf"^{found[0].parent} cannot be listed: {os.strerror(number)}") as caught:
        checkpoints_to_resume(found[0].parent, waits=(0,))
    assert type(caught.value) is expected
    if expected is HostError:
        failures[1:] = []
        assert checkpoints_to_resume(found[0].parent, waits=(0, 0)) == found


def fail_to_list(monkeypatch: pytest.MonkeyPatch, error: OSError) -> list[OSError]:
    """Let listing folders fail, once for each item of the list that is returned."""
    failures = [error] * 1000

    def fail(function: Any) -> Any:
        def list_folder(*args: Any) -> Any:
            if failures:
                raise failures.pop()
            return function(*args)

        return list_folder

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, fail(getattr(os, name)))
    return failures


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null"])
def test_a_damaged_complete_file_is_damage(tmp_path: Path, text: str) -> None:
    """Catches a traceback, or an empty list of checksums that matches any folder."""
    before, newest = make(tmp_path, 1, 2)
    (newest / "COMPLETE").write_text(text)
    assert verify(newest) is not None
    assert newest_usable(tmp_path) == before


def test_if_all_checkpoints_are_damaged_the_run_does_not_start_over(tmp_path: Path) -> None:
    """Catches days of training silently thrown away."""
    for path in make(tmp_path, 1, 2):
        flip(path / "state.json", at=5)
    with pytest.raises(UserError, match=r"all 2 checkpoints in .* are damaged"):
        newest_usable(tmp_path)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (Retention(1), [60]),
        (Retention(3), [40, 50, 60]),
        (Retention(1, keep_every=20), [20, 40, 60]),
        (Retention(2, keep_every=30), [30, 50, 60]),
        (Retention(1, best=20), [20, 60]),
        (Retention(1, keep_every=30, best=60), [30, 60]),
        (Retention(1, uploading=40), [40, 60]),
        (Retention(9), [0, 10, 20, 30, 40, 50, 60]),
    ],
)
def test_retention(tmp_path: Path, keep: Retention, left: list[int]) -> None:
    """Catches a newest checkpoint that is deleted, one that is being uploaded, and milestones that are not kept; and
    initial weights, saved to rewind to, that are kept forever."""
    make(tmp_path, 0, 10, 20, 30, 40, 50, 60)
    (tmp_path / ".step-00000070.partial").mkdir()
    apply_retention(tmp_path, keep, newest=60)
    assert steps(tmp_path) == left
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in left]


def test_a_best_that_could_not_be_saved_leaves_the_one_before(tmp_path: Path) -> None:
    """Catches `checkpoints/best` that names nothing, and the best checkpoint there is that is deleted."""
    make(tmp_path, 10, 20, 40)
    write_best(tmp_path, 10)
    write_best(tmp_path, 30)
    apply_retention(tmp_path, Retention(1, best=30), newest=40)
    assert checkpoint_candidates(tmp_path / "best") == [checkpoint_path(tmp_path, 10)]
    assert steps(tmp_path) == [10, 40]


def test_known_checksums_are_not_computed_again(tmp_path: Path) -> None:
    """Catches rank 0 reading the shares of all ranks, and checksums that replace those of other files."""
    for name in ("known", "other"):
        (tmp_path / name).write_bytes(b"content")
    mark_complete(tmp_path, {"known": "of what was written"})
    listed = json.loads((tmp_path / "COMPLETE").read_text(encoding="utf-8"))
    assert listed == {"known": "of what was written", "other": checksum(tmp_path / "other")}


def test_a_checkpoint_is_not_complete_without_the_files_of_other_ranks(tmp_path: Path) -> None:
    """Catches a checkpoint whose shares are not verified, because a network disk did not list the files of another
    host yet."""
    (tmp_path / "other").write_bytes(b"content")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/engine/rank-00001\.safetensors"):
        mark_complete(tmp_path, {"engine/rank-00001.safetensors": "of what was written"})
    assert not (tmp_path / "COMPLETE").exists()


def test_which_checkpoint_a_path_means(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches an incomplete or damaged checkpoint that is loaded, an older one where a newer one is usable, and the
    newest where the best was asked for."""
    run = tmp_path / "run"
    oldest, newest, damaged, incomplete = make(run / "checkpoints", 20, 100, 150, 200)
    write_best(run / "checkpoints", 20)
    (incomplete / "COMPLETE").unlink()
    flip(damaged / "state.json", at=5)
    with caplog.at_level(logging.WARNING):
        assert find_model_folder(run) == newest / "hf"
    assert f"skipping damaged checkpoint {damaged}: state.json has checksum" in caplog.text
    assert find_model_folder(oldest) == find_model_folder(run / "checkpoints" / "best") == oldest / "hf"
    assert find_model_folder(run) == find_model_folder(newest) == find_model_folder(newest / "hf") == newest / "hf"
    with pytest.raises(UserError, match=r"step-00000150 is damaged: state\.json has checksum"):
        find_model_folder(damaged)
    with pytest.raises(UserError, match="step-00000200 is incomplete"):
        find_model_folder(incomplete)


def test_averaged_weights_have_one_name(tmp_path: Path) -> None:
    """Catches a run, a checkpoint or `best` that is taken for the averaged weights with which another run began, so
    that their scores are shown as those of the weights."""
    (checkpoint,) = make(tmp_path / "checkpoints", 20)
    write_best(tmp_path / "checkpoints", 20)
    for name in (tmp_path, checkpoint, tmp_path / "checkpoints" / "best"):
        assert names_model_folder(name, checkpoint / "hf")
        assert not names_model_folder(name, checkpoint / "hf-ema")
    assert names_model_folder(checkpoint / "hf-ema", checkpoint / "hf-ema")


def test_a_model_is_found_without_reading_the_state_of_the_optimizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches an evaluation that reads four times as much as it needs, and is refused for undamaged weights."""
    _, newest = make(tmp_path / "run" / "checkpoints", 10, 20)
    flip(newest / "engine" / "rank-00000.safetensors")
    for named in (tmp_path / "run", newest, newest / "hf"):
        assert find_model_folder(named) == newest / "hf"
    assert not caplog.messages
    flip(newest / "hf" / "config.json", at=1)
    with pytest.raises(UserError, match=r"step-00000020 is damaged: hf/config\.json has checksum"):
        find_model_folder(newest)


def test_a_path_without_a_checkpoint_is_rejected(tmp_path: Path) -> None:
    """Catches a traceback, or a missing folder that is looked up on the network as a model name."""
    with pytest.raises(UserError, match="bert-base does not exist"):
        find_model_folder(tmp_path / "bert-base")
    with pytest.raises(UserError, match="is neither a Hugging Face folder, a checkpoint nor a run"):
        find_model_folder(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="run has no complete checkpoint"):
        find_model_folder(tmp_path / "run")


def test_best_names_a_checkpoint(tmp_path: Path) -> None:
    """Catches a file `best` that is not updated, or taken for a checkpoint."""
    make(tmp_path, 10, 20)
    for step in (20, 10):
        write_best(tmp_path, step)
        assert checkpoint_candidates(tmp_path / "best") == [checkpoint_path(tmp_path, step)]
    assert steps(tmp_path) == [10, 20]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"step-00000099\n", b"..\n", b"a\0b", b"[]"])
def test_a_best_that_names_no_checkpoint_is_rejected(tmp_path: Path, content: bytes) -> None:
    """Catches a traceback, and a message that does not say what the file names."""
    make(tmp_path, 10)
    (tmp_path / "best").write_bytes(content)
    assert checkpoint_candidates(tmp_path / "best") == []
    with pytest.raises(UserError, match=r"best names '.*', which is not a complete checkpoint"):
        find_model_folder(tmp_path / "best")


def test_a_damaged_model_folder_of_a_checkpoint_is_rejected(tmp_path: Path) -> None:
    """Catches damaged weights that are exported or trained on because `hf` was named instead of its checkpoint."""
    (checkpoint,) = make(tmp_path, 10)
    flip(checkpoint / "state.json", at=5)
    assert find_model_folder(checkpoint / "hf") == checkpoint / "hf", "state.json is not part of it"
    flip(checkpoint / "hf" / "config.json", at=1)
    with pytest.raises(UserError, match=r"step-00000010 is damaged: hf/config\.json has checksum"):
        find_model_folder(checkpoint / "hf")


def test_a_checkpoint_with_the_name_of_another_step_is_rejected(tmp_path: Path) -> None:
    """Catches weights of another step than the folder says, after folders were renamed or restored in another order."""
    first, second = make(tmp_path / "run" / "checkpoints", 290, 300)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    for named in (first, first / "hf"):
        with pytest.raises(UserError, match=r"is damaged: its state\.json is of step 300"):
            find_model_folder(named)
    with pytest.raises(UserError, match="all 2 checkpoints"):
        find_model_folder(tmp_path / "run")
    first.rename(tmp_path / "mine")
    assert find_model_folder(tmp_path / "mine") == tmp_path / "mine" / "hf", "another name says nothing about the step"


def test_damaged_later_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    """Catches the loss of every usable checkpoint after a run fell back behind damaged ones and saved again."""
    make(tmp_path, 10, 20, 30, 40)
    for step in (30, 40):
        flip(checkpoint_path(tmp_path, step) / "state.json", at=5)
    make(tmp_path, 25)
    apply_retention(tmp_path, Retention(2), newest=25)
    assert newest_usable(tmp_path) == checkpoint_path(tmp_path, 25)
    assert {20, 25} <= set(steps(tmp_path))


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (Retention(1), [45, 50]),
        (Retention(2), [25, 45, 50]),
        (Retention(3), [20, 25, 45, 50]),
        (Retention(2, keep_every=10), [10, 20, 25, 45, 50]),
        (Retention(2, best=10), [10, 25, 45, 50]),
    ],
)
def test_damaged_checkpoints_that_a_run_has_passed_are_deleted(
    tmp_path: Path, keep: Retention, left: list[int]
) -> None:
    """Catches damaged checkpoints that count as kept once the run has saved a later one, so that further damage loses
    the run; and a damaged one that stays named the best."""
    make(tmp_path, 10, 20, 25, 30, 40, 45, 50)  # it had fallen back to 20; 50 is damaged too
    write_best(tmp_path, 40)
    apply_retention(tmp_path, keep, newest=45, before=25)
    assert steps(tmp_path) == left
    assert not (tmp_path / "best").exists()


def test_the_best_checkpoint_is_kept_although_its_save_seemed_to_fail(tmp_path: Path) -> None:
    """Catches the loss of a checkpoint whose rename took effect on a network file system, but returned an error."""
    make(tmp_path, 10, 20, 25, 30)
    write_best(tmp_path, 25)
    apply_retention(tmp_path, Retention(1, best=25), newest=30, before=20)
    assert steps(tmp_path) == [25, 30]
    assert named_best(tmp_path) == checkpoint_path(tmp_path, 25)


def test_a_checkpoint_is_renamed_before_it_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a kill during a deletion that leaves a complete-looking checkpoint without files, or leftovers."""
    make(tmp_path, 1, 2)
    rmtree = shutil.rmtree

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        apply_retention(tmp_path, Retention(1), newest=2)
    assert steps(tmp_path) == [2]
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    apply_retention(tmp_path, Retention(1), newest=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("stuck", ["rename", "rmtree"])
def test_a_checkpoint_that_cannot_be_deleted_is_retried_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stuck: str
) -> None:
    """Catches a run that ends, although its new checkpoint is written, because an old one is busy or immutable; and an
    old one that blocks the deletion of the others, or is never tried again."""
    make(tmp_path, 1, 2, 3)
    with monkeypatch.context() as patch:
        refuse(patch, stuck, "step-00000001")
        apply_retention(tmp_path, Retention(1), newest=3)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "step-00000001" in caplog.text
    assert "the next save tries again: Device or resource busy" in caplog.text
    assert 2 not in steps(tmp_path)
    assert newest_usable(tmp_path) == checkpoint_path(tmp_path, 3)
    apply_retention(tmp_path, Retention(1), newest=3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_folder_that_cannot_be_deleted_makes_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a save that fails because a damaged checkpoint of its step, or its own leftover, is busy."""
    (damaged,) = make(tmp_path, 1)
    leftover = tmp_path / ".step-00000001.partial"
    leftover.mkdir()
    with monkeypatch.context() as patch:
        refuse(patch, "rmtree", "step-00000001")
        discard(damaged)
        discard(leftover)
    assert not damaged.exists()
    assert not leftover.exists()
    assert len(caplog.records) == 2
    apply_retention(tmp_path, Retention(1), newest=1)
    assert list(tmp_path.iterdir()) == []


def refuse(patch: pytest.MonkeyPatch, method: str, name: str) -> None:
    """Let `Path.rename` or `shutil.rmtree` fail for folders whose name contains `name`."""
    owner = Path if method == "rename" else shutil
    real = getattr(owner, method)

    def busy(path: Path, *arguments: Any, **options: Any) -> Any:
        if name not in path.name:
            return real(path, *arguments, **options)
        if options.get("ignore_errors"):
            return None
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    patch.setattr(owner, method, busy)


def test_a_complete_file_that_is_a_folder_is_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a checkpoint that is skipped silently, so that the run starts over."""
    before, newest = make(tmp_path / "run" / "checkpoints", 1, 2)
    for path in (newest, before):
        (path / "COMPLETE").unlink()
        (path / "COMPLETE").mkdir()
    with pytest.raises(UserError, match=r"all 2 checkpoints .* are damaged"):
        newest_usable(before.parent)
    assert f"skipping damaged checkpoint {newest}: its COMPLETE file cannot be read" in caplog.text
    with pytest.raises(UserError, match="is damaged: its COMPLETE file cannot be read"):
        find_model_folder(newest)


def test_a_checkpoint_is_usable_while_its_state_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a kill that damages the newest checkpoint of a run, and a state without a checksum."""
    checkpoint = tmp_path / "step-00000001"
    checkpoint.mkdir()
    (checkpoint / "tensors").touch()
    (checkpoint / "state.json").write_text('{"is": "old"}')
    mark_complete(checkpoint)
    seen: list[tuple[str | None, str]] = []
    write_json = checkpoints_module.write_json

    def observed(*args: Any, **options: Any) -> None:
        write_json(*args, **options)
        seen.append((verify(checkpoint), read_state(checkpoint)["is"]))

    monkeypatch.setattr(checkpoints_module, "write_json", observed)
    replace_state(checkpoint, {"is": "new"})
    assert seen == [(None, "old"), (None, "new"), (None, "new")]
    (checkpoint / "state.json").write_text('{"is": "damaged"}')
    assert verify(checkpoint) is not None


@pytest.mark.parametrize("content", [None, "[]", "{}", '{"step": '])
@pytest.mark.parametrize("verify", [verify, verify_descriptions])
def test_a_state_without_a_checksum_is_damaged(tmp_path: Path, verify: Verify, content: str | None) -> None:
    """Catches a traceback for the newest checkpoint instead of a resume from the one before; a model can be used."""
    before, newest = make(tmp_path, 1, 2)
    checksums = json.loads((newest / "COMPLETE").read_text())
    del checksums["state.json"]
    (newest / "COMPLETE").write_text(json.dumps(checksums))
    assert last_usable([before, newest], verify) == newest
    (newest / "state.json").unlink()
    if content is not None:
        (newest / "state.json").write_text(content)
    assert last_usable([before, newest], verify) == before
    assert find_model_folder(newest / "hf") == newest / "hf"


def test_a_checkpoint_is_complete_only_when_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a COMPLETE file that a power cut leaves beside files whose content was not written yet."""
    files = [tmp_path / "state.json", tmp_path / "hf" / "config.json"]
    for path in files:
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    written = []

    def fsync(descriptor: int) -> None:
        written.append((Path(f"/proc/self/fd/{descriptor}").readlink(), (tmp_path / "COMPLETE").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    mark_complete(tmp_path)
    assert {(path, False) for path in files} <= set(written)
