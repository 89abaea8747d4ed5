"""Find bad batches, write them to the run folder for people to look at, and decide whether to continue.

A batch is bad if its loss or gradient is not finite, or if its gradient norm is more than `spike_factor` times the
median of the recent norms. It is the norm of the gradient reduced over all ranks, and a loss that is not finite makes
it NaN (see `Engine.accumulate`): every rank decides the same, within the step, and the update is never applied.

RUN/health/step-00000107/
    fault.json          the fault, with figures
    rank-00000.jsonl    the sequences of each rank's share: their origin, their text, the inputs of the model
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from experiment.errors import AgreedFailureError
from experiment.files import write_json, write_text
from experiment.run_files.metrics_file import finite_or_none
from experiment.run_files.run_folder import RunFolder
from pretrain.batching.batch import IGNORED, RankBatch
from pretrain.config import HealthConfig
from pretrain.world import World

log = logging.getLogger(__name__)

NORM_WINDOW = 128  # norms that the median is taken over
MIN_NORMS = 20  # norms needed before one can count as a spike
MAX_CONSECUTIVE = 10  # bad batches in a row, after which the weights must be to blame
MAX_REWINDS = 10  # to the same checkpoint
MAX_DUMPS = 20  # whose sequences are kept
ADVICE = (
    "  to try: fork an earlier checkpoint (run.resume), or restart, with a lower optimizer.lr, a longer "
    "schedule.warmup_steps (it counts from step 0 in a fork, too) or a smaller optimizer.grad_clip"
)

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Fault:
    """The fault of a step. Its update was not applied."""

    step: int  # as in metrics.jsonl: counted from 1
    loss: float  # mean over the masked tokens of the global batch
    grad_norm: float
    median: float | None  # of the recent norms; None if there are none
    where: str = ""  # 'node-2, rank 3', whose loss is not finite; empty if that is so on all ranks, or on none

    def __str__(self) -> str:
        if not math.isfinite(self.loss):
            return f"step {self.step}: the loss is {self.loss}" + (f" on {self.where}" if self.where else "")
        if not math.isfinite(self.grad_norm):
            return f"step {self.step}: the gradient norm is {self.grad_norm}, the loss {self.loss:.4g}"
        assert self.median is not None
        return (
            f"step {self.step}: the gradient norm is {self.grad_norm:.4g}, {self.grad_norm / self.median:.3g} times "
            f"the median of the recent steps ({self.median:.4g}); the loss is {self.loss:.4g}"
        )

    def located(self, ranks: Sequence[tuple[str, Sequence[float]]]) -> "Fault":
        """Return the fault with `where`. ranks: host and losses, by rank."""
        found = [f"{host}, rank {rank}" for rank, (host, losses) in enumerate(ranks) if not math.isfinite(sum(losses))]
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        return replace(self, where=found[0] + more) if 0 < len(found) < len(ranks) else self


def norm_limit(norms: Sequence[float], spike_factor: float) -> float:
    """Return the largest gradient norm that is not a spike after these recent ones; infinite while there are too
    few."""
    if len(norms) < MIN_NORMS:
        return math.inf
    return spike_factor * median(norms) or math.inf  # of 0, every norm would be a spike


def append_norm(norms: tuple[float, ...], norm: float) -> tuple[float, ...]:
    """Return the recent norms after an applied update. Norms of bad batches are never added."""
    return (*norms, norm)[-NORM_WINDOW:]


def diagnose(step: int, loss: float, grad_norm: float, norms: Sequence[float], scaled: bool) -> Fault | None:
    """Return the fault of a step whose update was not applied; None for an ordinary fp16 overflow.

    `scaled`: the loss is scaled dynamically, so that gradients overflow now and then although the loss is finite.
    """
    if scaled and math.isfinite(loss) and not math.isfinite(grad_norm):
        return None
    return Fault(step, loss, grad_norm, median(norms) if norms else None)


def count_consecutive(bad_steps: Sequence[int], step: int) -> int:
    """Count the consecutive bad steps up to and including `step`."""
    bad, first = set(bad_steps), step
    while first in bad:
        first -= 1
    return step - first


class Recovery:
    """Limits how often a run may skip bad batches, or rewind."""

    def __init__(self, health: HealthConfig) -> None:
        self._policy = health.policy
        self._rewinds = 0  # to the last checkpoint
        self._saved_step: int | None = None  # of that checkpoint

    def check(self, what: str, bad_steps: Sequence[int], saved_step: int | None) -> None:
        """Call before a bad batch is skipped. Raises AgreedFailureError if a limit is reached.

        Args:
            what: the bad batch, for the message.
            bad_steps: known so far, the step of this batch last.
            saved_step: of the last checkpoint.
        """
        if count_consecutive(bad_steps, bad_steps[-1]) >= MAX_CONSECUTIVE:
            raise AgreedFailureError(
                f"{what}\n  the last {MAX_CONSECUTIVE} steps were all bad: the weights have probably diverged\n{ADVICE}"
            )
        if self._policy != "rewind":
            return
        if saved_step != self._saved_step:
            self._saved_step, self._rewinds = saved_step, 0
        if self._rewinds >= MAX_REWINDS:
            raise AgreedFailureError(
                f"{what}\n  the run has been rewound to step {saved_step} {self._rewinds} times\n{ADVICE}"
            )
        self._rewinds += 1


@dataclass(frozen=True)
class BadBatchWriter:
    """Writes the sequences of bad batches to RUN/health."""

    folder: RunFolder
    world: World
    corpora: Sequence[str]  # names, by corpus number
    decode: Decode

    def dump_bad_batch(self, batch: RankBatch, losses: Sequence[float], fault: Fault) -> Path:
        """Write this rank's share and return its folder. `losses`: summed, of each microbatch.

        The sequences of all but the last batches are deleted. A share that cannot be written is logged, not raised.
        """
        target = self.folder.bad_batch(fault.step)
        try:
            if self.world.rank == 0:
                figures = {key: finite_or_none(value) for key, value in asdict(fault).items()}
                write_json(target / "fault.json", figures | {"what": str(fault)})
            rows = describe_sequences(batch, losses, self.corpora, self.decode)
            lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
            write_text(target / f"rank-{self.world.rank:05d}.jsonl", lines)
        except OSError as error:
            log.warning("cannot write this rank's share of the bad batch to %s: %s", target, error)
        if self.world.rank == 0:
            with suppress(OSError):
                remove_old_sequences(target.parent)
        return target


def remove_old_sequences(dumps: Path) -> None:
    """Delete the sequences of all but the last `MAX_DUMPS` bad batches; their faults stay. Raises OSError."""
    faults = sorted(dumps.glob("step-*/fault.json"), key=lambda path: path.stat().st_mtime)
    for fault in faults[-2 * MAX_DUMPS : -MAX_DUMPS]:  # a long run has thousands of older ones, without sequences
        for share in fault.parent.glob("rank-*.jsonl"):
            share.unlink(missing_ok=True)


def describe_sequences(
    batch: RankBatch, losses: Sequence[float], corpora: Sequence[str], decode: Decode
) -> list[dict[str, Any]]:
    """Return the sequences of a rank's share, in the order of its microbatches."""
    rows = []
    for number, (microbatch, loss) in enumerate(zip(batch.microbatches, losses, strict=True)):
        shown, segments = microbatch.input_ids.reshape(-1), microbatch.segments.reshape(-1)
        masked = microbatch.labels != IGNORED
        original = shown.clone()
        original[microbatch.masked_positions[masked]] = microbatch.labels[masked]
        for segment in np.unique(segments[segments != 0]).tolist():
            here = segments == segment
            ids, shown_ids = original[here].tolist(), shown[here].tolist()
            rows.append(
                {
                    "corpus": corpora[batch.origins.corpora[segment - 1]],
                    "epoch": int(batch.origins.epochs[segment - 1]),
                    "sequence": int(batch.origins.ids[segment - 1]),
                    "microbatch": number,
                    "microbatch_loss": finite_or_none(loss),  # summed over its masked tokens
                    "text": decode(ids),
                    "shown": decode(shown_ids),
                    "input_ids": ids,
                    "shown_ids": shown_ids,
                }
            )
    return rows
