import errno
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiment.errors import AgreedFailureError
from experiment.run_files.run_folder import RunFolder
from pretrain.config import HealthConfig
from pretrain.training import health
from pretrain.training.health import (
    MAX_DUMPS,
    MIN_NORMS,
    NORM_WINDOW,
    BadBatchWriter,
    Fault,
    Recovery,
    append_norm,
    count_consecutive,
    diagnose,
    norm_limit,
)
from pretrain.world import World

WHAT = "step 9: the loss is nan\n  its batch: RUN/health/step"


def test_the_norm_limit_is_a_multiple_of_the_median() -> None:
    """Catches spikes in the first, irregular steps, and a mean instead of the median, which one outlier would move."""
    assert norm_limit([1.0] * (MIN_NORMS - 1), 10.0) == math.inf
    assert norm_limit([1.0] * MIN_NORMS, 10.0) == 10.0
    assert norm_limit([1.0] * MIN_NORMS + [9.0] * (MIN_NORMS - 1), 10.0) == 10.0
    assert norm_limit([0.0] * MIN_NORMS, 10.0) == math.inf, "a limit of 0 would veto every update"


def test_old_norms_leave_the_window() -> None:
    """Catches a median over the whole run, which hides spikes when gradients have become small."""
    norms: tuple[float, ...] = ()
    for norm in [100.0] * NORM_WINDOW + [1.0] * NORM_WINDOW:
        norms = append_norm(norms, norm)
    assert norms == (1.0,) * NORM_WINDOW


@pytest.mark.parametrize(
    ("loss", "norm", "scaled", "message"),
    [
        (math.nan, math.nan, False, "the loss is nan"),
        (math.inf, math.nan, True, "the loss is inf"),
        (2.5, math.inf, False, "the gradient norm is inf, the loss 2.5"),
        (2.5, math.nan, False, "the gradient norm is nan"),
        (2.5, 42.0, False, "42, 21 times the median of the recent steps (2)"),
        (2.5, 42.0, True, "21 times"),
    ],
)
def test_faults_name_the_cause(loss: float, norm: float, scaled: bool, message: str) -> None:
    """Catches a message that names the consequence (NaN gradients) instead of the cause."""
    fault = diagnose(7, loss, norm, [1.0, 2.0, 3.0], scaled)
    assert isinstance(fault, Fault)
    assert str(fault).startswith("step 7: ")
    assert message in str(fault)


@pytest.mark.parametrize(
    ("losses", "where"),
    [
        ([[1.0], [2.0, math.nan], [3.0]], "b, rank 1"),
        ([[], [math.inf, -math.inf], [math.nan]], "b, rank 1 and 1 more"),
        ([[math.nan], [math.nan], [math.nan]], ""),
        ([[1.0], [2.0], [3.0]], ""),
    ],
)
def test_the_rank_whose_loss_is_not_finite(losses: list[list[float]], where: str) -> None:
    """Catches a defective device that is not named, and a rank that is blamed for the data or the weights of all."""
    assert Fault(7, math.nan, math.nan, None).located(list(zip("abc", losses, strict=True))).where == where


def test_an_fp16_overflow_is_no_fault() -> None:
    """Catches an fp16 run that stops at an ordinary overflow."""
    assert diagnose(7, 2.5, math.inf, [], scaled=True) is None


def test_only_consecutive_bad_steps_are_counted() -> None:
    """Catches a run that ends because ten of a million batches were bad."""
    assert count_consecutive([3, 7, 8, 9], 9) == 3
    assert count_consecutive([3, 7, 8, 9], 3) == 1
    assert count_consecutive([9, 8, 12, 7], 9) == 3
    assert count_consecutive([], 4) == 0


@pytest.fixture
def recovery(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Recovery]:
    """Policy -> a recovery that gives up after 4 bad batches in a row, or 2 rewinds."""
    monkeypatch.setattr(health, "MAX_CONSECUTIVE", 4)
    monkeypatch.setattr(health, "MAX_REWINDS", 2)
    return lambda policy: Recovery(HealthConfig.model_validate({"policy": policy}))


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_consecutive_bad_steps_are_limited(recovery: Callable[[str], Recovery], policy: str) -> None:
    """Catches a run that skips every batch because its weights are broken, a limit that is off by one, and bad steps
    further back that count."""
    recovery(policy).check(WHAT, (1, 2, 3, 5, 7, 8, 9), saved_step=6)
    with pytest.raises(AgreedFailureError, match=r"step 9: the loss is nan(?s:.*)the last 4 steps were all bad"):
        recovery(policy).check(WHAT, (6, 7, 8, 9), saved_step=5)


def test_rewinds_to_the_same_checkpoint_are_limited(recovery: Callable[[str], Recovery]) -> None:
    """Catches a run that rewinds endlessly, and rewinds to other checkpoints that count."""
    rewinding = recovery("rewind")
    for bad_steps in ((3,), (3, 5)):
        rewinding.check(WHAT, bad_steps, saved_step=2)
    for bad_steps in ((3, 5, 7), (3, 5, 7, 9)):
        rewinding.check(WHAT, bad_steps, saved_step=6)
    with pytest.raises(AgreedFailureError, match="rewound to step 6 2 times"):
        rewinding.check(WHAT, (3, 5, 7, 9, 11), saved_step=6)


def test_skips_apart_are_not_limited(recovery: Callable[[str], Recovery]) -> None:
    """Catches a limit on rewinds that ends a run under the policy skip."""
    skipping, bad_steps = recovery("skip"), list(range(1, 100, 2))
    for known in range(1, len(bad_steps) + 1):
        skipping.check(WHAT, bad_steps[:known], saved_step=None)


def test_the_sequences_of_the_last_bad_batches_are_kept(tmp_path: Path) -> None:
    """Catches bad batches that fill the disk of a long run under the policy skip, a batch that is deleted because a
    later step had been bad before, and faults that are lost."""
    steps = [*range(100, 100 + MAX_DUMPS + 1), 50]
    batch = SimpleNamespace(microbatches=[])
    dumps = BadBatchWriter(RunFolder(tmp_path), World(rank=0, size=1, local_rank=0), [], lambda ids: "")
    for number, step in enumerate(steps):
        folder = dumps.dump_bad_batch(batch, [], Fault(step, math.nan, math.nan, None))  # type: ignore[arg-type]
        os.utime(folder / "fault.json", (number, number))
    assert len(list(tmp_path.glob("health/*/fault.json"))) == MAX_DUMPS + 2
    kept = [int(path.parent.name[-8:]) for path in tmp_path.glob("health/*/rank-00000.jsonl")]
    assert sorted(kept) == sorted(steps[2:])


def test_a_bad_batch_is_written_although_old_ones_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a bad batch that is lost, and a look into each of the thousands of folders of a long run."""
    for step in range(1, 5 * MAX_DUMPS):
        fault = tmp_path / f"health/step-{step:08d}/fault.json"
        fault.parent.mkdir(parents=True)
        fault.touch()
        os.utime(fault, (step, step))
    looked, glob = list[Path](), Path.glob

    def fail_below(path: Path, pattern: str) -> Iterator[Path]:
        if path.name.startswith("step-"):
            looked.append(path)
            if len(looked) == MAX_DUMPS:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return glob(path, pattern)

    monkeypatch.setattr(Path, "glob", fail_below)
    dumps = BadBatchWriter(RunFolder(tmp_path), World(rank=0, size=1, local_rank=0), [], lambda ids: "")
    batch = SimpleNamespace(microbatches=[])
    folder = dumps.dump_bad_batch(batch, [], Fault(999, math.nan, math.nan, None))  # type: ignore[arg-type]
    assert (folder / "rank-00000.jsonl").exists()
    assert len(looked) == MAX_DUMPS
    assert not caplog.messages
