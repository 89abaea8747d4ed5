import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiment.config import build_config
from experiment.errors import HostError, UserError
from experiment.run_files.checkpoints import checkpoint_path, mark_complete, read_state, replace_state, verify
from experiment.run_files.provenance import ancestors_of, write_origin, write_provenance
from experiment.run_files.run_folder import RunFolder
from pretrain.config import ModelConfig, PretrainConfig, RunConfig
from pretrain.restore import restore_run
from pretrain.resume import (
    ResumePlan,
    ResumePoint,
    check_fork,
    check_resume,
    find_resume_candidates,
    is_fork_of,
    locate_model,
    plan_resume,
    run_identity,
)
from pretrain.training_progress import TrainingProgress, fork_progress, progress_to_json

CONFIG = {"run": {"dir": "/runs/a"}, "model": {"config": {"model_type": "bert"}}, "corpus": {"train": "/data/a"}}
MODEL = {"model_type": "bert", "hidden_size": 24, "transformers_version": "5.0", "dtype": None}
NEW_MODEL = ModelConfig(config={"model_type": "bert"})
DS_CONFIG = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
STAGES = [{"steps": 3, "max_seq_length": 64}, {"sequences": 32}]


def identity(
    model: dict[str, Any] = MODEL,
    corpora: tuple[tuple[str, float], ...] = (("f1", 1.0),),
    special_tokens: tuple[tuple[int, ...], tuple[int, ...]] = ((2,), (3,)),
    ds_config: dict[str, Any] = DS_CONFIG,
    **changes: Any,
) -> dict[str, Any]:
    tree: dict[str, Any] = {**CONFIG, "schedule": {"steps": 10}}
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        tree[section] = tree.get(section, {}) | {key: value}
    return run_identity(build_config(PretrainConfig, tree), model, corpora, special_tokens, ds_config)


@pytest.mark.parametrize(
    ("now", "key"),
    [
        (identity(run__seed=1), "run.seed"),
        (identity(batch__sequences=64), "batch.sequences"),
        (identity(batch__max_seq_length=64), "batch.max_seq_length"),
        (identity(masking__rate=0.3), "masking.rate"),
        (identity(model=MODEL | {"hidden_size": 32}), "model.hidden_size"),
        (identity(model__freeze=["embeddings"], model__freeze_steps=5), "model.freeze"),
        (identity(model__ema_decay=0.99), "model.ema_decay"),
        (identity(optimizer__name="lamb"), "optimizer.name"),
        (identity(corpora=(("f2", 1.0),)), "corpus.train"),
        (identity(corpora=(("f1", 1.0), ("f2", 1.0))), "corpus.train"),
        (identity(special_tokens=((), ())), "tokenizer"),
        (identity(schedule__batch_warmup_steps=5), "schedule.batch_warmup_steps"),
        (identity(schedule__stages=STAGES), "schedule.stages"),
    ],
)
def test_changed_identity_cannot_resume(now: dict[str, Any], key: str) -> None:
    """Catches a run that resumes with other data, masks or parameters."""
    with pytest.raises(UserError) as rejected:
        check_resume(identity(), now, "RUN/checkpoints/step-00000010")
    assert f"another {key}" in str(rejected.value)
    assert "RUN/checkpoints/step-00000010" in str(rejected.value)


def test_a_checkpoint_without_special_tokens_and_deepspeed_json_can_resume() -> None:
    """Catches a run of an earlier version that cannot continue, or that reports changes."""
    earlier = identity()
    before = {
        key: value
        for key, value in earlier.items()
        if key != "corpus.special_tokens" and not key.startswith("engine.ds_config.")
    }
    assert len(before) < len(earlier)
    assert check_resume(before, identity(), "a checkpoint") == []


def test_an_edited_deepspeed_json_is_reported() -> None:
    """Catches another precision and ZeRO stage that a resumed run does not report."""
    now = identity(ds_config={"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}})
    assert check_resume(identity(), now, "a checkpoint") == [
        "engine.ds_config.bf16.enabled: true -> null",
        "engine.ds_config.fp16.enabled: null -> true",
        "engine.ds_config.zero_optimization.stage: 1 -> 2",
    ]


def test_a_new_run_needs_another_mirror_too() -> None:
    """Catches advice to start a new run in another folder, which resumes the same checkpoint from the mirror."""
    advice = r"in another run.dir and with another checkpoint.mirror: a new run.dir resumes from s3://bucket/a$"
    with pytest.raises(UserError, match=advice):
        check_resume(identity(), identity(run__seed=1, checkpoint__mirror="s3://bucket/a"), "step-00000010")
    with pytest.raises(UserError, match=r"in another run.dir$"):
        check_resume(identity(), identity(run__seed=1), "step-00000010")


@pytest.mark.parametrize(
    ("before", "now", "key"),
    [
        ({"corpora": (("f1", 1.0), ("f2", 1.0))}, {"corpora": (("f1", 1.0), ("f2", 2.0))}, "corpus.train"),
        ({"schedule__stages": STAGES}, {"schedule__stages": [STAGES[0] | {"steps": 4}, STAGES[1]]}, "schedule.stages"),
        ({"schedule__stages": STAGES}, {"schedule__stages": [STAGES[0], {"sequences": 31}]}, "schedule.stages"),
        (
            {"masking__rate": [0.3, 0.1], "masking__schedule": "linear"},
            {"masking__rate": [0.3, 0.1], "masking__schedule": "linear", "schedule__steps": 11},
            "schedule.steps",
        ),
    ],
)
def test_another_stream_cannot_resume(before: dict[str, Any], now: dict[str, Any], key: str) -> None:
    """Catches changed mixture weights or stages, and a changed run length where the masking rate depends on it."""
    with pytest.raises(UserError, match=f"another {key}"):
        check_resume(identity(**before), identity(**now), "a checkpoint")


@pytest.mark.parametrize(
    "now",
    [
        [STAGES[0] | {"microbatch_tokens": 512}, STAGES[1]],
        [STAGES[0], STAGES[1] | {"steps": 7}],
        [STAGES[0], STAGES[1] | {"max_seq_length": 128}],
    ],
)
def test_equivalent_stages_can_resume(now: list[dict[str, int]]) -> None:
    """Catches stages that are compared as written instead of by the stream they give."""
    assert check_resume(identity(schedule__stages=STAGES), identity(schedule__stages=now), "a checkpoint") == []


def test_stages_of_an_earlier_version_cannot_resume() -> None:
    """Catches a stage that continued no epochs when it was trained, and reads other sequences after a resume."""
    stages = [{"steps": 3, "sequences": 32}, {"steps": 3, "max_seq_length": 64}, {"max_seq_length": 64}]
    now = identity(schedule__stages=stages)
    before = now | {"schedule.stages": [stage[:3] for stage in now["schedule.stages"]]}
    assert [len(stage) for stage in now["schedule.stages"]] == [3, 3, 4]
    with pytest.raises(UserError, match=r"another schedule\.stages: .*continued"):
        check_resume(before, now, "a checkpoint")


@pytest.mark.parametrize(
    ("now", "key"),
    [
        (identity(optimizer__lr=1.0), "optimizer.lr"),
        (identity(optimizer__layer_decay=0.9), "optimizer.layer_decay"),
        (identity(schedule__steps=20), "schedule.steps"),
        (identity(batch__microbatch_tokens=4096), "batch.microbatch_tokens"),
        (identity(engine__ds_config="x.json"), "engine.ds_config"),
        (identity(model__activation_checkpointing=True), "model.activation_checkpointing"),
        (identity(run__log_every=3), "run.log_every"),
        (identity(checkpoint__keep_last=1), "checkpoint.keep_last"),
        (identity(corpus__eval={"more": "/data/b"}), "corpus.eval.more: null -> '/data/b'"),
    ],
)
def test_allowed_changes_are_reported(now: dict[str, Any], key: str) -> None:
    """Catches a harmless change that is rejected, and one that is not reported."""
    (line,) = [line for line in check_resume(identity(), now, "a checkpoint") if line.startswith(key)]
    assert "->" in line
    assert "None" not in line, "YAML has null"


def test_a_moved_run_resumes() -> None:
    """Catches a run that cannot resume, or reports changes, after its folder, its corpus or the installation moved, or
    with another version of transformers."""
    before = identity(engine__ds_config="/opt/python3.11/ds_configs/bf16_zero1.json")
    now = identity(run__dir="/elsewhere", corpus__train="/mnt/data/a", model=MODEL | {"transformers_version": "6.0"})
    assert check_resume(before, now, "a checkpoint") == []


@pytest.mark.parametrize(
    ("before", "now", "lines"),  # None: refused
    [
        ({"vision_config": {"size": 8}}, {"vision_config": {"size": 8, "use_head": True}, "pooling": "mean"}, 2),
        ({"reference_compile": True}, {}, 1),
        ({"vision_config": {"size": 8}}, {"vision_config": {"size": 9}}, None),
        ({"rope_scaling": None}, {"rope_scaling": {"factor": 2.0}}, None),
        ({"rope_parameters": {"theta": 1.0}}, {"rope_parameters": {"theta": 1.0, "factor": 2.0}}, None),
    ],
)
def test_fields_that_only_one_version_of_transformers_has(
    before: dict[str, Any], now: dict[str, Any], lines: int | None
) -> None:
    """Catches a run that cannot resume after an upgrade, although its user has changed nothing, and a changed model
    that is taken for an upgrade."""
    for check in (check_resume, check_fork):
        identities = identity(model=MODEL | before), identity(model=MODEL | now)
        if lines is not None:
            assert len(check(*identities, "a checkpoint")) == lines
        else:
            with pytest.raises(UserError, match="with another model"):
                check(*identities, "a checkpoint")


def test_a_changed_model_is_not_advised_to_fork() -> None:
    """Catches advice that leads to the next refusal."""
    with pytest.raises(UserError, match=r"start a new run with model\.init_from in another run\.dir"):
        check_resume(identity(), identity(model=MODEL | {"hidden_size": 32}), "a checkpoint")
    with pytest.raises(UserError, match=r"start a new run, or a fork of this one, in another run\.dir"):
        check_resume(identity(), identity(model__ema_decay=0.99), "a checkpoint")


def test_a_checkpoint_of_an_earlier_version_resumes() -> None:
    """Catches a run that a newer version, whose masking has one more key, cannot resume; another value still counts."""
    before = identity()
    del before["masking.unit"], before["model.freeze"], before["checkpoint.keep_last"]
    assert check_resume(before, identity(), "a checkpoint") == []
    with pytest.raises(UserError, match=r"another masking\.unit: the run was started with 'token', .* says 'word'"):
        check_resume(before, identity(masking__unit="word"), "a checkpoint")


def test_a_config_read_from_a_folder_is_the_same_model() -> None:
    """Catches a fork that is rejected because transformers added the class to the config.json that model.init_from
    names."""
    assert check_fork(identity(), identity(model=MODEL | {"architectures": ["BertForMaskedLM"]}), "a checkpoint") == []


def test_an_identity_survives_json() -> None:
    """Catches tuples and other values that differ after a round trip through a checkpoint."""
    assert check_resume(json.loads(json.dumps(identity())), identity(), "a checkpoint") == []


def test_a_fork_can_change_what_a_resume_cannot() -> None:
    """Catches a fork that cannot change the data, and one that loads its parent's state into another model."""
    now = identity(run__seed=1, batch__sequences=64, masking__rate=0.3, corpora=(("f2", 1.0),), optimizer__name="lamb")
    assert {line.partition(":")[0] for line in check_fork(identity(), now, "a checkpoint")} == {
        "run.seed",
        "batch.sequences",
        "masking.rate",
        "corpus.train",
        "optimizer.name",
    }
    frozen = {"config": {"model_type": "bert"}, "freeze": ["embeddings"], "freeze_steps": 5, "ema_decay": 0.9}
    assert len(check_fork(identity(), {**identity(), **identity_with_model(frozen)}, "a checkpoint")) == 3
    with pytest.raises(UserError, match=r"another model\.hidden_size.*init_from"):
        check_fork(identity(), identity(model=MODEL | {"hidden_size": 32}), "a checkpoint")


def test_a_fork_freezes_what_its_parent_froze() -> None:
    """Catches first updates that are several times too large: one step count for parameters with and without moments,
    which share a flat tensor unless their groups differ."""
    frozen = identity(model__freeze=["embeddings"], model__freeze_steps=100)
    for now in (identity(), identity(model__freeze=["embeddings", "layer.0"], model__freeze_steps=100)):
        with pytest.raises(UserError, match=r'than \["embeddings"\]: .* train from step model\.freeze_steps on'):
            check_fork(frozen, now, "a checkpoint")
    unfrozen = identity(model__freeze=["embeddings"], model__freeze_steps=4)
    assert check_fork(frozen, unfrozen, "a checkpoint") == ["model.freeze_steps: 100 -> 4"]
    assert len(check_fork(frozen, identity(optimizer__name="lamb"), "a checkpoint")) == 3, "it starts with new moments"


@pytest.mark.parametrize(("before", "warned"), [(2, True), (100, False)])
def test_a_fork_that_trains_what_its_parent_froze(
    tmp_path: Path, before: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a warning about the end of a freeze that the fork is for."""
    parent = make_run(tmp_path / "parent", (4,))
    state = checkpoint_path(parent / "checkpoints", 4) / "state.json"
    frozen = {"model__freeze": ["embeddings"], "model__freeze_steps": before}
    state.write_text(json.dumps(json.loads(state.read_text()) | {"identity": identity(**frozen)}))
    (state.parent / "COMPLETE").unlink()
    mark_complete(state.parent)
    plan(tmp_path / "new", str(parent), **frozen | {"model__freeze_steps": 4})
    assert ("model.freeze_steps: 4: is over" in caplog.text) == warned


def identity_with_model(settings: dict[str, Any]) -> dict[str, Any]:
    tree = {**CONFIG, "schedule": {"steps": 10}, "model": settings}
    return run_identity(build_config(PretrainConfig, tree), MODEL, [("f1", 1.0)], ((2,), (3,)), DS_CONFIG)


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


def plan(run: Path, resume: str, **changes: Any) -> ResumePlan:
    candidates = find_resume_candidates(RunConfig(dir=str(run), resume=resume), RunFolder(run))
    return plan_resume(candidates.choose(verify), identity(**changes))


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


@pytest.mark.parametrize("steps", [(4,), (2, 4)])
def test_damaged_checkpoints_of_a_run_that_may_be_mirrored(tmp_path: Path, steps: tuple[int, ...]) -> None:
    """Catches a user who loses a run because no message says that its mirror may have it."""
    run = make_run(tmp_path / "run", steps)
    for step in steps:
        (checkpoint_path(run / "checkpoints", step) / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"damaged.*\. Delete damaged checkpoints to resume from checkpoint\.mirror"):
        plan(run, "auto")


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


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"use_cache": False}, {"use_cache": True}),  # older versions changed it when they built the model
        ({"auto_map": {"AutoModelForMaskedLM": "modeling.Model"}}, {}),
    ],
)
def test_settings_without_an_effect_do_not_matter(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Catches runs that cannot be resumed because older checkpoints have other values in their identity."""
    old, new = identity(model=MODEL | before), identity(model=MODEL | now)
    assert check_resume(old, new, "a checkpoint") == []
    assert check_fork(old, identity(), "a checkpoint") == []


def test_only_big_bird_has_an_attention_type_without_effect() -> None:
    """Catches older runs of BigBird that cannot be resumed, and a Funnel that resumes with another attention."""

    def with_type(model_type: str, **attention_type: str) -> dict[str, Any]:
        return identity(model=MODEL | {"model_type": model_type} | attention_type)

    old, new = (with_type("big_bird", attention_type=kind) for kind in ("block_sparse", "original_full"))
    assert check_resume(old, new, "a checkpoint") == check_fork(old, with_type("big_bird"), "a checkpoint") == []
    old, new = (with_type("funnel", attention_type=kind) for kind in ("relative_shift", "factorized"))
    for check in (check_resume, check_fork):
        with pytest.raises(UserError, match=r"another model\.attention_type"):
            check(old, new, "a checkpoint")


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
