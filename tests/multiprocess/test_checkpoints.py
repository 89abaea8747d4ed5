"""A checkpoint is complete or does not exist, whatever happens while it is written."""

import io
import itertools
import logging
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from experiment.config import build_config
from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer
from experiment.run_files.checkpoints import checkpoint_path, complete_checkpoints, last_usable, verify
from experiment.run_files.retention import Retention
from experiment.run_files.run_folder import RunFolder
from pretrain.config import PretrainConfig
from pretrain.resume import find_resume_candidates
from pretrain.training.checkpointer import verify_together
from pretrain.training.cpu_group import CpuGroup
from pretrain.world import World
from rank_pool import RankError, RankPool
from runs import Tree, build_engine, logged, pretrain_case, run_config, save_engine, saved_tensors, soak
from small_disk import SmallDisk


class Killed(BaseException):
    """In place of kill -9: once raised, every later change to the disk raises it again, so nothing is cleaned up."""


class _Killer:
    """Once armed, raises Killed at the n-th change to files in a folder and at every later one."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._left: int | None = None
        sys.addaudithook(self._on_event)

    def arm(self, changes: int) -> None:
        self._left = changes

    def disarm(self) -> None:
        self._left = None

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._left is None or not self._changes(event, arguments):
            return
        self._left -= 1
        if self._left < 0:
            raise Killed

    def _changes(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            path, _, flags = arguments
            # fsync opens the file: not a change, but a moment to be killed at.
            return self._folder in str(path) and (bool(flags & os.O_WRONLY) or "partial" in str(path))
        if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            # rmtree uses file descriptors, so its inner events name no folder.
            return event in ("os.remove", "os.rmdir") or self._folder in str(arguments[0])
        return False


def killed_saves_case(world: World, tree: Tree, folder: Path, every: int) -> int:
    """Save step 2 repeatedly, killed at every `every`-th change to the disk. Returns the changes of one save."""
    from pretrain.training.checkpoint_tensors import write_hugging_face_folder

    tokenizer = load_tokenizer(Path(tree["corpus"]["train"]) / "tokenizer")
    engine, model = build_engine(world, tree, seed=1)
    checkpoints, before = folder / "checkpoints", folder / "before"

    def write_model(weights: dict[str, Any], target: Path) -> None:
        own = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        write_hugging_face_folder(own, model, tokenizer, target)

    def save(step: int) -> None:
        save_engine(engine, checkpoints, step, write_model, Retention(1))

    save(1)
    shutil.copytree(checkpoints, before)
    killer = _Killer(checkpoints)
    for changes in itertools.count(0, every):
        killer.arm(changes)
        try:
            save(2)
        except Killed:
            survived = True
        else:
            survived = False
        killer.disarm()
        usable = last_usable(complete_checkpoints(checkpoints), verify)
        assert usable in (checkpoint_path(checkpoints, 1), checkpoint_path(checkpoints, 2)), changes
        for complete in complete_checkpoints(checkpoints):
            assert verify(complete) is None, (changes, complete)
        if not survived:
            assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"]
            engine.close()
            return changes
        if changes % (4 * every) == 0:  # leftovers do not disturb the next save
            save(2)
            assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"], changes
        shutil.rmtree(checkpoints)
        shutil.copytree(before, checkpoints)
    raise AssertionError


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.soak)])
def test_a_kill_while_saving_leaves_only_complete_checkpoints(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, every: int
) -> None:
    """Catches a COMPLETE file that is written too early, and deletions that are too early or in the wrong order."""
    (changes,) = pools[1].run(killed_saves_case, run_config(tmp_path, wordpiece_corpus), tmp_path, every)
    assert changes > 30, "the killer sees too few changes"


def full_disk_case(world: World, tree: Tree, full_on: int, where: str) -> str:
    """A run in which the disk of one rank is full when it saves."""
    from experiment.run_files import checkpoints as checkpoint_store
    from pretrain.training import checkpointer

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    module, name = (checkpoint_store, "write_text") if where == "best" else (checkpointer, "write_hugging_face_folder")
    original = getattr(module, name)
    if world.rank == full_on and where == "engine":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # bytes per file: less than a rank's shard
    elif world.rank == full_on:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        setattr(module, name, full)
    try:
        return pretrain_case(world, tree)
    finally:
        setattr(module, name, original)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("full_on", "where"), [(1, "engine"), (0, "hf"), *soak((0, "engine"))])
def test_a_full_disk_stops_all_ranks(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, full_on: int, where: str
) -> None:
    """Catches ranks that wait for the failed one until a timeout, and a partial checkpoint that stays."""
    tree = run_config(tmp_path, wordpiece_corpus, "fp32_zero2", schedule__steps=2)
    assert pools[2].run(full_disk_case, tree, full_on, where) == ["stopped", "stopped"]
    assert list((tmp_path / "checkpoints").iterdir()) == []
    log = RunFolder(tmp_path).rank_log(0).read_text(encoding="utf-8")
    assert f"no checkpoint can be written: rank {full_on}: " in log
    if where == "engine":
        assert pools[2].run(pretrain_case, tree) == ["done", "done"]
        assert logged(tmp_path, "step") == [1, 2]
        (saved,) = complete_checkpoints(tmp_path / "checkpoints")
        assert (saved.name, verify(saved)) == ("step-00000002", None)


def broken_save_case(world: World, tree: Tree) -> str:
    """A run in which a save has a bug on rank 0."""
    from pretrain.training import checkpointer

    def broken(*_: Any) -> None:
        raise KeyError("a bug")

    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 0:
            patch.setattr(checkpointer, "write_hugging_face_folder", broken)
        return pretrain_case(world, tree)


def test_a_bug_in_a_save_ends_all_ranks(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches ranks that wait until a timeout for one that has failed for another reason than the disk."""
    with pytest.raises(RankError) as caught:
        pools[2].run(broken_save_case, run_config(tmp_path, wordpiece_corpus, schedule__steps=2))
    assert "KeyError: 'a bug'" in str(caught.value)
    assert "RuntimeError: rank 0: KeyError: 'a bug'" in str(caught.value)


@pytest.mark.parametrize("pages", [12, *soak(60)])
def test_a_run_continues_when_a_full_disk_has_room_again(
    pools: dict[int, RankPool], wordpiece_corpus: Path, small_disk: SmallDisk, pages: int
) -> None:
    """Catches a save that damages the checkpoints before it, or leaves something that keeps the disk full."""
    run = small_disk.path / "run"
    tree = run_config(run, wordpiece_corpus, checkpoint__every_steps=1, schedule__steps=4)
    assert pools[2].run(pretrain_case, tree, 2) == ["stopped", "stopped"]
    small_disk.fill(leave=pages * 4096)
    assert pools[2].run(pretrain_case, tree) == ["stopped", "stopped"]
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000001", "step-00000002"]
    assert verify(checkpoint_path(run / "checkpoints", 2)) is None
    small_disk.free()
    assert pools[2].run(pretrain_case, tree) == ["done", "done"]
    log = RunFolder(run).rank_log(0).read_text(encoding="utf-8")
    assert log.count(f"resuming from {checkpoint_path(run / 'checkpoints', 2)}") == 2


def test_a_full_disk_while_writing_best_stops_all_ranks(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches an error on rank 0 alone, after a save, while the others hang in the next step."""
    tree = run_config(tmp_path, wordpiece_corpus, schedule__steps=2, corpus__eval={"held": str(heldout_corpus)})
    tree["evaluation"] = {"best_metric": "eval/held/loss"}
    assert pools[2].run(full_disk_case, tree, 0, "best") == ["stopped", "stopped"]
    assert pools[2].run(pretrain_case, tree) == ["done", "done"]
    assert (tmp_path / "checkpoints" / "best").read_text(encoding="utf-8") == "step-00000002\n"


@pytest.fixture(scope="module")
def three_checkpoints(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run of three steps, to be copied."""
    folder = tmp_path_factory.mktemp("three")
    tree = run_config(folder, wordpiece_corpus, checkpoint__every_steps=1, schedule__steps=3)
    assert pools[2].run(pretrain_case, tree) == ["done", "done"]
    return folder


def test_resuming_skips_damaged_checkpoints(
    pools: dict[int, RankPool], wordpiece_corpus: Path, three_checkpoints: Path, tmp_path: Path
) -> None:
    """Catches a run that loads flipped bits, or falls back and then repeats steps in metrics.jsonl."""
    tree = run_config(tmp_path, wordpiece_corpus, checkpoint__every_steps=1, schedule__steps=3)
    shutil.copytree(three_checkpoints, tmp_path, dirs_exist_ok=True)
    checkpoints = tmp_path / "checkpoints"
    before, losses = saved_tensors(checkpoint_path(checkpoints, 3)), logged(tmp_path)
    damaged_files = {3: "engine/rank-00001.safetensors", 2: "hf/model.safetensors"}
    for step, file in damaged_files.items():
        flip_byte(checkpoint_path(checkpoints, step) / file)
    assert pools[2].run(pretrain_case, tree) == ["done", "done"]
    log = RunFolder(tmp_path).rank_log(0).read_text(encoding="utf-8")
    assert f"resuming from {checkpoint_path(checkpoints, 1)}" in log
    for step, file in damaged_files.items():
        assert f"skipping damaged checkpoint {checkpoint_path(checkpoints, step)}: {file} has checksum" in log
    assert logged(tmp_path, "step") == [1, 2, 3]
    assert logged(tmp_path) == losses
    assert [verify(checkpoint_path(checkpoints, step)) for step in (1, 2, 3)] == [None, None, None]
    after = saved_tensors(checkpoint_path(checkpoints, 3))
    assert all(bool((after[key] == before[key]).all()) for key in before)


def chosen_case(world: World, tree: Tree) -> tuple[str, str]:
    """The checkpoint that a run would resume, or why it would not start, and what rank 0 logs."""
    hosts = CpuGroup(world, timedelta(seconds=60))
    config = build_config(PretrainConfig, tree)
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    logging.getLogger().addHandler(handler)
    try:
        candidates = hosts.from_rank0(lambda: find_resume_candidates(config.run, RunFolder(Path(config.run.dir))))
        point = candidates.choose(partial(verify_together, hosts))
    except UserError as error:
        return str(error), ""
    finally:
        logging.getLogger().removeHandler(handler)
    return point.checkpoint.name, logged.getvalue() if world.rank == 0 else ""


def damages(path: Path) -> Iterator[str]:
    """Damage a file in each way in turn, and restore it."""
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for name, damaged in (("truncated", content[:-2]), ("empty", b""), ("flipped", flipped)):
        path.write_bytes(damaged)
        yield name
    path.unlink()
    yield "removed"
    path.write_bytes(content)


@pytest.mark.parametrize("ranks", [2, *soak(1)])
def test_every_damaged_file_is_named(
    pools: dict[int, RankPool], wordpiece_corpus: Path, three_checkpoints: Path, tmp_path: Path, ranks: int
) -> None:
    """Catches a file of a checkpoint that no rank verifies, damage without a warning, and a run that starts over."""
    tree = run_config(tmp_path, wordpiece_corpus)
    shutil.copytree(three_checkpoints, tmp_path, dirs_exist_ok=True)
    *_, before, newest = checkpoints = complete_checkpoints(tmp_path / "checkpoints")
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        name = str(path.relative_to(newest))
        for damage in damages(path):
            chosen = pools[ranks].run(chosen_case, tree)
            assert {checkpoint for checkpoint, _ in chosen} == {before.name}, (name, damage)
            logged_by_rank0 = chosen[0][1]
            assert f"skipping damaged checkpoint {newest}: " in logged_by_rank0, (name, damage)
            assert name in logged_by_rank0.replace(str(newest), ""), (name, damage)
    for checkpoint in checkpoints:
        flip_byte(checkpoint / "engine" / "rank-00001.safetensors")
    assert all("all 3 checkpoints" in refusal for refusal, _ in pools[ranks].run(chosen_case, tree))
    for checkpoint in checkpoints:
        (checkpoint / "COMPLETE").unlink()
    assert all("no checkpoint in" in refusal for refusal, _ in pools[ranks].run(chosen_case, tree))


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 16
    path.write_bytes(content)


def test_retention_keeps_the_configured_checkpoints(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches retention keys that have no effect."""
    tree = run_config(tmp_path, wordpiece_corpus)
    pools[1].run(pretrain_case, tree | {"checkpoint": {"every_steps": 1, "keep_last": 2, "keep_every": 3}})
    found = [int(path.name.removeprefix("step-")) for path in complete_checkpoints(tmp_path / "checkpoints")]
    assert found == [3, 5, 6]


def test_a_damaged_checkpoint_that_a_resume_skipped_does_not_count(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a run with one good checkpoint in place of two, because it fell back behind a damaged one and has passed
    its step without saving there."""
    tree, every_step = run_config(tmp_path, wordpiece_corpus), {"every_steps": 1, "keep_last": 2}
    pools[1].run(pretrain_case, tree | {"checkpoint": every_step}, 4)
    flip_byte(checkpoint_path(tmp_path / "checkpoints", 4) / "engine" / "rank-00000.safetensors")
    pools[1].run(pretrain_case, tree | {"checkpoint": every_step | {"every_steps": None}}, 2)
    left = complete_checkpoints(tmp_path / "checkpoints")
    assert left == [checkpoint_path(tmp_path / "checkpoints", step) for step in (3, 5)]
    assert [verify(checkpoint) for checkpoint in left] == [None, None]
