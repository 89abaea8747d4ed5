import json
from typing import Any

import pytest

from experiment.config import build_config
from experiment.errors import UserError
from pretrain.config import PretrainConfig
from pretrain.run_identity import check_fork, check_resume, describe_changes, run_identity

CONFIG = {"run": {"dir": "/runs/a"}, "model": {"config": {"model_type": "bert"}}, "corpus": {"train": "/data/a"}}
MODEL = {"model_type": "bert", "hidden_size": 24, "transformers_version": "5.0", "dtype": None}
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
    assert check_resume(before, identity(), "a checkpoint") == {}


def test_an_edited_deepspeed_json_is_reported() -> None:
    """Catches another precision and ZeRO stage that a resumed run does not report."""
    now = identity(ds_config={"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}})
    assert describe_changes(check_resume(identity(), now, "a checkpoint")) == [
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
    assert check_resume(identity(schedule__stages=STAGES), identity(schedule__stages=now), "a checkpoint") == {}


def test_stages_of_an_earlier_version_cannot_resume() -> None:
    """Catches a stage that continued no epochs when it was trained, and reads other sequences after a resume; and
    advice to restore a value that has not changed."""
    stages = [{"steps": 3, "sequences": 32}, {"steps": 3, "max_seq_length": 64}, {"max_seq_length": 64}]
    now = identity(schedule__stages=stages)
    before = now | {"schedule.stages": [stage[:3] for stage in now["schedule.stages"]]}
    assert [len(stage) for stage in now["schedule.stages"]] == [3, 3, 4]
    with pytest.raises(UserError, match=r"another schedule\.stages: .*continued.*length stays: start a new run, or"):
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
    lines = describe_changes(check_resume(identity(), now, "a checkpoint"))
    (line,) = [line for line in lines if line.startswith(key)]
    assert "->" in line
    assert "None" not in line, "YAML has null"


def test_a_moved_run_resumes() -> None:
    """Catches a run that cannot resume, or reports changes, after its folder, its corpus or the installation moved, or
    with another version of transformers, or of deepcloze that has more alerts."""
    ds_config = "/opt/python3.11/ds_configs/bf16_zero1.json"
    before = identity(engine__ds_config=ds_config, tracking__alerts={"events": ["crash"]})
    now = identity(run__dir="/elsewhere", corpus__train="/mnt/data/a", model=MODEL | {"transformers_version": "6.0"})
    assert check_resume(before, now, "a checkpoint") == {}


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
    assert check_resume(before, identity(), "a checkpoint") == {}
    with pytest.raises(UserError, match=r"another masking\.unit: the run was started with 'token', .* says 'word'"):
        check_resume(before, identity(masking__unit="word"), "a checkpoint")


def test_a_config_read_from_a_folder_is_the_same_model() -> None:
    """Catches a fork that is rejected because transformers added the class to the config.json that model.init_from
    names."""
    assert check_fork(identity(), identity(model=MODEL | {"architectures": ["BertForMaskedLM"]}), "a checkpoint") == {}


def test_an_identity_survives_json() -> None:
    """Catches tuples and other values that differ after a round trip through a checkpoint."""
    assert check_resume(json.loads(json.dumps(identity())), identity(), "a checkpoint") == {}


def test_a_fork_can_change_what_a_resume_cannot() -> None:
    """Catches a fork that cannot change the data, and one that loads its parent's state into another model."""
    now = identity(run__seed=1, batch__sequences=64, masking__rate=0.3, corpora=(("f2", 1.0),), optimizer__name="lamb")
    assert set(check_fork(identity(), now, "a checkpoint")) == {
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
    assert describe_changes(check_fork(frozen, unfrozen, "a checkpoint")) == ["model.freeze_steps: 100 -> 4"]
    assert len(check_fork(frozen, identity(optimizer__name="lamb"), "a checkpoint")) == 3, "it starts with new moments"


def identity_with_model(settings: dict[str, Any]) -> dict[str, Any]:
    tree = {**CONFIG, "schedule": {"steps": 10}, "model": settings}
    return run_identity(build_config(PretrainConfig, tree), MODEL, [("f1", 1.0)], ((2,), (3,)), DS_CONFIG)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"use_cache": False}, {"use_cache": True}),  # older versions changed it when they built the model
        ({"auto_map": {"AutoModelForMaskedLM": "modeling.Model"}}, {}),
        ({"output_hidden_states": True}, {"output_hidden_states": False}),
        ({"output_attentions": True}, {"output_attentions": False}),
    ],
)
def test_settings_without_an_effect_do_not_matter(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Catches runs that cannot be resumed because older checkpoints have other values in their identity."""
    old, new = identity(model=MODEL | before), identity(model=MODEL | now)
    assert check_resume(old, new, "a checkpoint") == {}
    assert check_fork(old, identity(), "a checkpoint") == {}


def test_only_big_bird_has_an_attention_type_without_effect() -> None:
    """Catches older runs of BigBird that cannot be resumed, and a Funnel that resumes with another attention."""

    def with_type(model_type: str, **attention_type: str) -> dict[str, Any]:
        return identity(model=MODEL | {"model_type": model_type} | attention_type)

    old, new = (with_type("big_bird", attention_type=kind) for kind in ("block_sparse", "original_full"))
    assert check_resume(old, new, "a checkpoint") == check_fork(old, with_type("big_bird"), "a checkpoint") == {}
    old, new = (with_type("funnel", attention_type=kind) for kind in ("relative_shift", "factorized"))
    for check in (check_resume, check_fork):
        with pytest.raises(UserError, match=r"another model\.attention_type"):
            check(old, new, "a checkpoint")
