import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_run_identity import CONFIG, identity

from experiment.config import build_config
from experiment.errors import HostError, UserError
from experiment.run_files.checkpoints import checkpoint_path, mark_complete, read_state, replace_state, verify
from experiment.run_files.provenance import ancestors_of, write_origin, write_provenance
from experiment.run_files.retention import discard
from experiment.run_files.run_folder import RunFolder
from pretrain.config import ModelConfig, PretrainConfig, RunConfig
from pretrain.restore import restore_run
from pretrain.resume import (
    ResumePlan,
    ResumePoint,
    find_resume_candidates,
    is_fork_of,
    locate_model,
    plan_resume,
)
from pretrain.schedule_config import ScheduleConfig
from pretrain.training.learning_rate import learning_rate
from pretrain.training_progress import TrainingProgress, fork_progress, progress_to_json

BF16, ZERO_2 = {"enabled": True}, {"zero_optimization": {"stage": 2}}
NEW_MODEL = ModelConfig(config={"model_type": "bert"})


def change_identity(checkpoint: Path, **changes: Any) -> None:
    state = checkpoint / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"identity": identity(**changes)}))
    (checkpoint / "COMPLETE").unlink()
    mark_complete(checkpoint)


@pytest.mark.parametrize(("before", "warned"), [(2, True), (100, False)])
def test_a_fork_that_trains_what_its_parent_froze(
    tmp_path: Path, before: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a warning about the end of a freeze that the fork is for."""
    parent = make_run(tmp_path / "parent", (4,))
    frozen = {"model__freeze": ["embeddings"], "model__freeze_steps": before}
    change_identity(checkpoint_path(parent / "checkpoints", 4), **frozen)
    plan(tmp_path / "new", str(parent), **frozen | {"model__freeze_steps": 4})
    assert ("model.freeze_steps: 4: is over" in caplog.text) == warned


def make_run(
    path: Path,
    steps: tuple[int, ...],
    relation: str | None = None,
    parent: Path | None = None,
    model: ModelConfig = NEW_MODEL,
) -> Path:
    """A run with checkpoints of these steps, descended from step 4 of `parent`. `model`: section of its config."""
    folder = RunFolder(path)
    ancestors = ancestors_of(checkpoint_path(parent / "checkpoints", 4) / "hf", relation) if parent and relation else []
    run_id = write_provenance(folder, {}, ancestors)["run_id"]
    for step in steps:
        checkpoint = checkpoint_path(folder.checkpoints, step)
        (checkpoint / "hf").mkdir(parents=True)
        write_origin(checkpoint / "hf", folder, {"run_id": run_id, "ancestors": ancestors}, step)
        config = {"model": model.model_dump(mode="json"), "corpus": {"train": "/data/a"}}
        progress = progress_to_json(TrainingProgress(step=step, tokens=100 * step))
        state = {"identity": identity(), "config": config, "progress": progress, "provenance": {"ancestors": ancestors}}
        (checkpoint / "state.json").write_text(json.dumps(state))
        mark_complete(checkpoint)
    return path


def plan(run: Path, resume: str, mirror: str | None = None, **changes: Any) -> ResumePlan:
    candidates = find_resume_candidates(RunConfig(dir=str(run), resume=resume), RunFolder(run), mirror)
    return plan_resume(candidates.choose(verify), identity(**changes))


@pytest.mark.parametrize(
    ("key", "edited"),
    [
        ("optimizer.lr", {"optimizer__lr": 2e-4}),
        ("health.spike_factor", {"health__spike_factor": 5.0}),
        ("engine.ds_config.bf16.enabled", {"ds_config": ZERO_2}),
    ],
)
def test_a_run_of_a_set_resumes_from_its_mirror_with_its_config_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, edited: dict[str, Any]
) -> None:
    """Catches a point of a sweep that was removed to train it with an edited config, and has the results of the old one
    from its mirror; and one that is refused because it is computed in another way."""
    run, mirrored = make_run(tmp_path / "run", (4,)), {"checkpoint__mirror": "s3://bucket/sweep/run"}
    assert plan(run, "auto", **mirrored, **edited).resumes
    monkeypatch.setenv("DEEPCLOZE_RUN_SET", "1")
    same: dict[str, Any] = {
        "batch__microbatch_tokens": 256,
        "health__hang_seconds": 60,
        "ds_config": {**ZERO_2, "bf16": BF16},
    }
    assert plan(run, "auto", **mirrored, **same).resumes
    with pytest.raises(UserError, match=rf"was trained with another {key}: .* and s3://bucket/sweep/run too"):
        plan(run, "auto", **mirrored, **edited)


@pytest.mark.parametrize(("number", "expected"), [(errno.EIO, HostError), (errno.EACCES, UserError)])
def test_checkpoints_that_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[UserError]
) -> None:
    """Catches a run that starts over at step 0, or takes another run from its mirror, after an error of the disk."""
    run = make_run(tmp_path / "run", (4,))
    mirrored = {**CONFIG, "run": {"dir": str(run)}, "schedule": {"steps": 1}}
    mirrored |= {"checkpoint": {"mirror": f"file://{tmp_path}/bucket"}}

    def fail(*_: Any) -> list[str]:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "listdir", fail)
    monkeypatch.setattr("experiment.run_files.checkpoints.time.sleep", lambda _: None)
    message = rf"^{run}/checkpoints cannot be listed: {os.strerror(number)}"
    with pytest.raises(expected, match=message):
        plan(run, "auto")
    with pytest.raises(expected, match=message):
        restore_run(build_config(PretrainConfig, mirrored), lambda: None)


def test_what_a_fork_loads(tmp_path: Path) -> None:
    """Catches moments of another optimizer, and bad steps that are skipped in another stream."""
    parent = make_run(tmp_path / "parent", (4,))
    cases: list[tuple[dict[str, Any], bool, bool]] = [
        ({"optimizer__lr": 1.0, "masking__rate": 0.3, "schedule__steps": 20}, True, True),
        ({"optimizer__name": "lamb"}, False, True),
        ({"batch__sequences": 64}, True, False),
        ({"schedule__batch_warmup_steps": 3}, True, False),
        ({"corpora": (("f2", 1.0),)}, True, False),
    ]
    for changes, moments, same_stream in cases:
        planned = plan(tmp_path / "new", str(parent), **changes)
        assert (planned.load_optimizer_state, planned.same_stream) == (moments, same_stream)
    kept = TrainingProgress(step=4, tokens=9, tokens_by_corpus={"f1": 9}, bad_steps=(2, 6))
    progress = replace(kept, seconds=5.0, grad_norms=(1.0,), interval_masked=3, evaluated=True)
    assert fork_progress(progress, same_stream=True) == kept
    assert fork_progress(progress, same_stream=False) == replace(kept, bad_steps=())


@pytest.mark.parametrize(("steps", "warned"), [(0, False), (4, True), (5, False)])
def test_a_fork_that_begins_after_the_warmup(
    tmp_path: Path, steps: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a warmup for the new data that never happens, silently."""
    parent = make_run(tmp_path / "parent", (4,))
    plan(tmp_path / "new", str(parent), schedule__warmup_steps=steps)
    assert ("schedule.warmup_steps: 4: is over: it counts from step 0" in caplog.text) == warned


@pytest.mark.parametrize(("before", "warned"), [(4, True), (100, False)])
def test_a_fork_does_not_warm_up_again(
    tmp_path: Path, before: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a longer warmup that looks like a second one, and a warning about the first one that continues."""
    parent = make_run(tmp_path / "parent", (4,))
    change_identity(checkpoint_path(parent / "checkpoints", 4), schedule__warmup_steps=before)
    plan(tmp_path / "new", str(parent), schedule__warmup_steps=8)
    message = "schedule.warmup_steps: 8: does not warm up again: it counts from step 0, so 50.0% of it are done"
    assert (message in caplog.text) == warned
    schedule = ScheduleConfig.model_validate({"steps": 20, "warmup_steps": 8})
    assert learning_rate(schedule, 2.0, 4, 20, 0.0) == 2.0 * 5 / 8


def test_paths_that_name_a_checkpoint(tmp_path: Path) -> None:
    """Catches a fork of another checkpoint than the path names."""
    parent, new = make_run(tmp_path / "parent", (2, 4)), tmp_path / "new"
    (parent / "checkpoints" / "best").write_text("step-00000002\n")
    (tmp_path / "link").symlink_to(checkpoint_path(parent / "checkpoints", 2))
    names = {
        parent: 4,
        checkpoint_path(parent / "checkpoints", 2): 2,
        parent / "checkpoints" / "best": 2,
        tmp_path / "link": 2,
    }
    for name, step in names.items():
        expected = ResumePlan(
            checkpoint_path(parent / "checkpoints", step), step, fork=True, forked_at=step, forked_tokens=100 * step
        )
        assert plan(new, str(name)) == expected
    (checkpoint_path(parent / "checkpoints", 4) / "state.json").write_text("{}")
    assert plan(new, str(parent)).checkpoint == checkpoint_path(parent / "checkpoints", 2)
    with pytest.raises(UserError, match=r"step-00000004 is damaged: state\.json has checksum \w+, expected \w+$"):
        plan(new, str(checkpoint_path(parent / "checkpoints", 4)))


@pytest.mark.parametrize(
    ("mirror", "advice"),
    [
        ("s3://bucket/run", r"Delete damaged checkpoints to resume from checkpoint\.mirror"),
        (None, "Restore checkpoints from a copy"),
    ],
)
@pytest.mark.parametrize("steps", [(4,), (2, 4)])
@pytest.mark.parametrize("incomplete", [False, True])
def test_damaged_checkpoints_of_a_run_that_may_be_mirrored(
    tmp_path: Path, incomplete: bool, steps: tuple[int, ...], mirror: str | None, advice: str
) -> None:
    """Catches a user who loses a run because no message says that its mirror may have it, or because a message says so
    without a mirror."""
    run = make_run(tmp_path / "run", steps)
    for checkpoint in (checkpoint_path(run / "checkpoints", step) for step in steps):
        if incomplete:
            (checkpoint / "COMPLETE").unlink()
        else:
            (checkpoint / "state.json").write_text("{}")
    with pytest.raises(UserError, match=rf"damaged.*\. {advice}, or choose another run\.dir to start over$"):
        plan(run, "auto", mirror)


@pytest.mark.parametrize("gone", ["missing", "empty", "dangling"])
@pytest.mark.parametrize("resume", ["auto", "parent"])
def test_a_run_whose_checkpoints_are_gone_does_not_start_over(tmp_path: Path, gone: str, resume: str) -> None:
    """Catches a run that deletes its metrics and trains from its first step, because a disk is not mounted."""
    parent = make_run(tmp_path / "parent", (4,))
    run = make_run(tmp_path / "run", (), *("fork", parent) if resume == "parent" else ())
    folder = RunFolder(run)
    folder.saved.touch()
    if gone == "empty":
        folder.checkpoints.mkdir()
    elif gone == "dangling":
        folder.checkpoints.symlink_to(tmp_path / "unmounted")
    message = f"^there is no checkpoint in {run}/checkpoints, but this run has saved some.* or delete {run}$"
    with pytest.raises(UserError, match=message):
        plan(run, str(parent) if resume == "parent" else "auto")


def test_a_run_that_has_saved_nothing_starts_over(tmp_path: Path) -> None:
    """Catches a crash before the first checkpoint after which the same command is refused."""
    parent = make_run(tmp_path / "parent", (4,))
    run, fork = make_run(tmp_path / "run", ()), make_run(tmp_path / "fork", (), "fork", parent)
    for _ in range(2):
        assert plan(run, "auto").checkpoint is None
        assert plan(fork, str(parent)).fork
        write_provenance(RunFolder(run), {"step": 0})
        write_provenance(RunFolder(fork), {"step": 4})


@pytest.mark.parametrize(("field", "nested"), [("momentum", False), ("median", True)])
@pytest.mark.parametrize("fork", [False, True])
def test_a_checkpoint_of_a_newer_version_is_rejected(tmp_path: Path, field: str, nested: bool, fork: bool) -> None:
    """Catches a TypeError in the ranks, which spends all restarts."""
    run = make_run(tmp_path / "run", (4,))
    checkpoint = checkpoint_path(run / "checkpoints", 4)
    state = read_state(checkpoint)
    (state["progress"]["standing"] if nested else state["progress"])[field] = 1
    replace_state(checkpoint, state)
    with pytest.raises(UserError) as error:
        plan(*(tmp_path / "new", str(run)) if fork else (run, "auto"))
    newer = "a newer version of deepcloze wrote its progress"
    assert str(error.value) == f"{checkpoint}: {newer}: unknown field '{field}'"


def test_a_model_without_the_state_of_a_run_cannot_be_forked(tmp_path: Path) -> None:
    """Catches a trace for a seed of fine-tuning, or a checkpoint of which only the model was copied."""
    model = tmp_path / "seed-1" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    mark_complete(model.parent)
    with pytest.raises(UserError, match=rf"'run\.resume': expected .*'{model.parent}' has no complete checkpoint"):
        plan(tmp_path / "new", str(model.parent))


def test_a_fork_resumes_and_no_other_run_is_overwritten(tmp_path: Path) -> None:
    """Catches a fork that forks again after its first checkpoint, and one into the folder of another run."""
    parent, other = make_run(tmp_path / "parent", (2, 4)), make_run(tmp_path / "other", (4,))
    fork = make_run(tmp_path / "fork", (6,), "fork", parent)
    own = ResumePlan(checkpoint_path(fork / "checkpoints", 6), 6, forked_at=4)
    assert plan(fork, str(parent)) == plan(fork, "auto") == own
    assert plan(fork, str(tmp_path / "deleted")) == own, "the parent is no longer needed"
    for run in (other, parent, make_run(tmp_path / "continued", (6,), "init_from", parent)):
        with pytest.raises(UserError, match="is not a fork of"):
            plan(run, str(parent))
    with pytest.raises(UserError, match="is not a fork of"):
        plan(fork, str(other))


def test_a_parent_that_deletes_the_checkpoint_meanwhile(tmp_path: Path) -> None:
    """Catches a traceback after a fork has chosen its checkpoint."""
    parent = make_run(tmp_path / "parent", (4,))
    point = ResumePoint(checkpoint_path(parent / "checkpoints", 4), fork=True)
    discard(point.checkpoint)
    message = f"^{point.checkpoint} was deleted while it was read: .*; run the command again$"
    with pytest.raises(UserError, match=message):
        locate_model(NEW_MODEL, point)
    with pytest.raises(UserError, match=message):
        plan_resume(point, identity())


@pytest.mark.parametrize(("resume", "why"), [("sometimes", "does not exist"), ("", "has no complete checkpoint")])
def test_a_path_without_a_checkpoint_is_rejected(tmp_path: Path, resume: str, why: str) -> None:
    """Catches a misspelled path that starts a new run."""
    with pytest.raises(UserError, match=rf"'run\.resume': expected auto, never.*{why}"):
        plan(tmp_path / "run", resume or str(tmp_path))


def test_a_fork_of_a_copied_run(tmp_path: Path) -> None:
    """Catches a fork that cannot resume because its parent, a copy, has checkpoints of two ids."""
    parent = make_run(tmp_path / "parent", (2,))
    first = ancestors_of(checkpoint_path(parent / "checkpoints", 2) / "hf", "fork")
    RunFolder(parent).provenance.unlink()
    make_run(parent, (4,))
    for ancestors in (first, ancestors_of(checkpoint_path(parent / "checkpoints", 4) / "hf", "fork")):
        assert is_fork_of(ancestors, str(parent))
    other = make_run(tmp_path / "other", (2,))
    assert not is_fork_of(first, str(other))


def test_never_needs_an_unused_folder(tmp_path: Path) -> None:
    """Catches a second run in the folder of a first one."""
    assert plan(tmp_path / "new", "never") == plan(tmp_path / "new", "auto") == ResumePlan()
    with pytest.raises(UserError, match="already holds a run"):
        plan(make_run(tmp_path / "run", (4,)), "never")


@pytest.mark.parametrize("positions", [80, None])
def test_a_resume_takes_the_model_from_its_checkpoint(tmp_path: Path, positions: int | None) -> None:
    """Catches a resume that needs the model that it was initialized from, by any of its names, or that continues with
    the newest checkpoint of another run."""
    parent = make_run(tmp_path / "parent", (2, 4))
    (parent / "checkpoints" / "best").write_text("step-00000004\n")
    checkpoint = checkpoint_path(parent / "checkpoints", 4)
    (checkpoint / "hf" / "config.json").touch()
    frozen: dict[str, Any] = {"freeze": ("embeddings",), "freeze_steps": 5}
    began_with = ModelConfig(init_from=str(checkpoint / "hf"), max_positions=positions, **frozen)
    run = make_run(tmp_path / "run", (6,), model=began_with)
    point = ResumePoint(checkpoint_path(run / "checkpoints", 6), fork=False)
    own = ModelConfig(init_from=str(point.checkpoint / "hf"), **frozen)
    best = parent / "checkpoints" / "best"
    for after in (lambda: best.write_text("step-00000002\n"), lambda: shutil.rmtree(parent), lambda: None):
        for name in (parent, best, checkpoint, checkpoint / "hf"):
            named = began_with.model_copy(update={"init_from": str(name)})
            assert locate_model(named, point) == (began_with, own), name
        after()


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"hidden_dropout_prob": 0.3}},
        {"max_positions": 90},
        {"added_tokens": "/added"},
    ],
)
def test_another_model_is_compared_with_the_run(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Catches a resume that ignores a changed key of the model because its checkpoint has one already."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").touch()
    began_with = ModelConfig(init_from=str(base), max_positions=80)
    run = make_run(tmp_path / "run", (6,), model=began_with)
    point = ResumePoint(checkpoint_path(run / "checkpoints", 6), fork=False)
    now = began_with.model_copy(update=changes)
    assert locate_model(now, point) == (now, now)
    shutil.rmtree(base)
    with pytest.raises(UserError, match=r"model\.init_from: .* does not exist"):
        locate_model(now, point)


def test_a_model_has_several_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that is refused because its config names the same model by another path."""
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "config.json").touch()
    (tmp_path / "link").symlink_to("base")
    for began_with in ("../base", "../link"):
        monkeypatch.chdir(tmp_path / "a")
        first, _ = locate_model(ModelConfig(init_from=began_with), None)
        run = make_run(tmp_path / began_with.replace("/", "-"), (6,), model=first)
        point = ResumePoint(checkpoint_path(run / "checkpoints", 6), fork=False)
        monkeypatch.chdir(tmp_path / "b")
        for name in (began_with, str(tmp_path / "base"), str(tmp_path / "link")):
            assert locate_model(ModelConfig(init_from=name), point)[0] == first, name


@pytest.mark.parametrize(("began_with", "now"), [("base", "other"), (None, "other"), ("base", None)])
def test_a_run_continues_from_the_model_it_began_with(tmp_path: Path, began_with: str | None, now: str | None) -> None:
    """Catches a model that seems to be used, and is recorded, but whose weights are not loaded: the run, or its fork,
    continues those of its checkpoint."""
    for name in ("base", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    first, changed = (
        ModelConfig(init_from=str(tmp_path / name)) if name else ModelConfig(config={"model_type": "bert"})
        for name in (began_with, now)
    )
    point = ResumePoint(checkpoint_path(make_run(tmp_path / "run", (6,), model=first) / "checkpoints", 6), fork=False)
    with pytest.raises(
        UserError, match=rf"another model\.init_from: .* with {shown(first)}, .* says {shown(changed)}\."
    ):
        locate_model(changed, point)
    assert locate_model(first, point)[0] == first
    forked = replace(point, fork=True)
    if now is None:  # the config of the model is there in its place
        assert locate_model(changed, forked) == (changed, changed)
    else:
        with pytest.raises(UserError, match=r"cannot be forked with .* remove run\.resume to start from the weights"):
            locate_model(changed, forked)
    assert locate_model(first, forked)[0] == first
    (point.checkpoint / "hf" / "config.json").touch()
    parent = ModelConfig(init_from=str(tmp_path / "run"))
    assert locate_model(parent, forked)[0].init_from == str(point.checkpoint / "hf"), "the weights that it has anyway"


def shown(model: ModelConfig) -> str:
    return "null" if model.init_from is None else f"'{model.init_from}'"


def test_a_model_that_is_gone_may_be_in_the_mirror(tmp_path: Path) -> None:
    """Catches a `deepcloze validate` on new hosts that seems to say that a mirrored run cannot continue there."""
    gone = ModelConfig(init_from=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"does not exist.*\nif s3://b/run holds this run, `deepcloze pretrain` first"):
        locate_model(gone, None, "s3://b/run")
    with pytest.raises(UserError, match=r"does not exist: expected [^\n]*$"):
        locate_model(gone, None)


def test_a_model_by_url_is_rejected() -> None:
    """Catches a URL that is taken for a folder that does not exist."""
    with pytest.raises(
        UserError, match=r"^model.init_from: s3://b/run is a URL: copy it to a disk .* --checkpoint s3:"
    ):
        locate_model(ModelConfig(init_from="s3://b/run"), None)
