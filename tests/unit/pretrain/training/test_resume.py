import json
from typing import Any

import pytest

from experiment.errors import UserError
from pretrain.config import PretrainConfig
from pretrain.training.resume import check_resume, identity

CONFIG = {"run": {"dir": "/runs/a"}, "model": {"config": {"model_type": "bert"}}, "corpus": {"train": "/data/a"}}
MODEL = {"model_type": "bert", "hidden_size": 24, "transformers_version": "5.0", "dtype": None}


def who(model: dict[str, Any] = MODEL, fingerprint: str = "f1", **changes: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {**CONFIG, "schedule": {"steps": 10}}
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        tree[section] = tree.get(section, {}) | {key: value}
    return identity(PretrainConfig.model_validate(tree).model_dump(mode="json"), model, fingerprint)


@pytest.mark.parametrize(
    ("now", "key"),
    [
        (who(run__seed=1), "run.seed"),
        (who(batch__sequences=64), "batch.sequences"),
        (who(batch__max_seq_length=64), "batch.max_seq_length"),
        (who(masking__rate=0.3), "masking.rate"),
        (who(model=MODEL | {"hidden_size": 32}), "model.hidden_size"),
        (who(fingerprint="f2"), "corpus.train"),
    ],
)
def test_what_makes_it_another_run_is_refused(now: dict[str, Any], key: str) -> None:
    """Catches a run that goes on with other data, masks or parameters under the same name."""
    with pytest.raises(UserError) as refused:
        check_resume(who(), now, "RUN/checkpoints/step-00000010")
    assert f"another {key}" in str(refused.value)
    assert "RUN/checkpoints/step-00000010" in str(refused.value)


@pytest.mark.parametrize(
    ("now", "key"),
    [
        (who(optimizer__lr=1.0), "optimizer.lr"),
        (who(schedule__steps=20), "schedule.steps"),
        (who(batch__microbatch_tokens=4096), "batch.microbatch_tokens"),
        (who(engine__ds_config="x.json"), "engine.ds_config"),
        (who(run__log_every=3), "run.log_every"),
        (who(checkpoint__keep_last=1), "checkpoint.keep_last"),
        (who(corpus__eval={"more": "/data/b"}), "corpus.eval.more"),
    ],
)
def test_what_may_change_is_told(now: dict[str, Any], key: str) -> None:
    """Catches a harmless change that is refused, and one that nobody hears of."""
    (line,) = [line for line in check_resume(who(), now, "a checkpoint") if line.startswith(key)]
    assert "->" in line


def test_a_run_may_move() -> None:
    """Catches a run that cannot go on after its folder, its corpus or transformers changed place or version."""
    now = who(run__dir="/elsewhere", corpus__train="/mnt/data/a", model=MODEL | {"transformers_version": "6.0"})
    assert check_resume(who(), now, "a checkpoint") == []


def test_an_identity_survives_json() -> None:
    """Catches tuples and other values that compare unequal after a checkpoint was written and read."""

    assert check_resume(json.loads(json.dumps(who())), who(), "a checkpoint") == []
