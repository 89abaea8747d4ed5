from pathlib import Path

import pytest

from pretrain.config import HealthConfig
from pretrain.training.health import Fault, HealthLimits, UnhealthyError
from pretrain.training.recovery import Recovery, Response

LIMITS = HealthLimits(max_consecutive=4, max_rewinds=2)
BATCH = Path("RUN/health/step")


def recovery(policy: str) -> Recovery:
    return Recovery(HealthConfig.model_validate({"policy": policy}), LIMITS)


def fault(step: int) -> Fault:
    return Fault(step, loss=float("nan"), grad_norm=float("nan"), median=None)


@pytest.mark.parametrize("policy", ["stop", "skip", "rewind"])
def test_the_response_is_the_policy(policy: str) -> None:
    """Catches a policy that is mixed up with another one."""
    assert recovery(policy).respond(fault(3), BATCH, (), saved_step=2) is Response[policy.upper()]


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_consecutive_bad_steps_are_limited(policy: str) -> None:
    """Catches a run that skips every batch because its weights are broken, a limit that is off by one, and bad steps
    further back that count."""
    assert recovery(policy).respond(fault(9), BATCH, (1, 2, 3, 5, 7, 8), saved_step=6) is Response[policy.upper()]
    with pytest.raises(UnhealthyError, match=r"step 9: the loss is nan(?s:.*)the last 4 steps were all bad") as error:
        recovery(policy).respond(fault(9), BATCH, (6, 7, 8), saved_step=5)
    assert str(BATCH) in str(error.value)


def test_rewinds_to_the_same_checkpoint_are_limited() -> None:
    """Catches a run that rewinds endlessly, and rewinds to other checkpoints that count."""
    rewinding = recovery("rewind")
    for step in (3, 5):
        assert rewinding.respond(fault(step), BATCH, (), saved_step=2) is Response.REWIND
    for step in (7, 9):
        assert rewinding.respond(fault(step), BATCH, (3, 5), saved_step=6) is Response.REWIND
    with pytest.raises(UnhealthyError, match="rewound to step 6 2 times"):
        rewinding.respond(fault(11), BATCH, (3, 5, 7, 9), saved_step=6)


def test_skips_apart_are_not_limited() -> None:
    """Catches a limit on rewinds that ends a run under the policy skip."""
    skipping, bad_steps = recovery("skip"), list(range(1, 100, 2))
    for known, step in enumerate(bad_steps):
        assert skipping.respond(fault(step), BATCH, bad_steps[:known], saved_step=None) is Response.SKIP
