"""Write a bad batch to the run folder, for people to look at.

RUN/health/step-00000107/
    fault.json          what was wrong, with figures
    rank-00000.jsonl    the sequences of each rank's share: their origin, their text, what the model saw
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiment.files import write_json, write_text
from experiment.run_folder import RunFolder
from pretrain.batching.batch import IGNORED, RankBatch
from pretrain.training.health import Fault
from pretrain.world import World

log = logging.getLogger(__name__)

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class BadBatchWriter:
    folder: RunFolder
    world: World
    corpora: Sequence[str]  # names, by corpus number
    decode: Decode

    def dump_bad_batch(self, batch: RankBatch, losses: Sequence[float], fault: Fault) -> Path:
        """Write this rank's share and return its folder. `losses`: summed, of each microbatch.

        A share that cannot be written is logged, not raised.
        """
        target = self.folder.bad_batch(fault.step)
        try:
            if self.world.rank == 0:
                figures = {key: _finite_or_none(value) for key, value in asdict(fault).items()}
                write_json(target / "fault.json", figures | {"what": str(fault)})
            rows = describe_sequences(batch, losses, self.corpora, self.decode)
            lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
            write_text(target / f"rank-{self.world.rank:05d}.jsonl", lines)
        except OSError as error:
            log.warning("cannot write this rank's share of the bad batch to %s: %s", target, error)
        return target


def describe_sequences(
    batch: RankBatch, losses: Sequence[float], corpora: Sequence[str], decode: Decode
) -> list[dict[str, Any]]:
    """The sequences of a rank's share, in the order of its microbatches."""
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
                    "microbatch_loss": _finite_or_none(loss),  # summed over its masked tokens
                    "text": decode(ids),
                    "shown": decode(shown_ids),
                    "input_ids": ids,
                    "shown_ids": shown_ids,
                }
            )
    return rows


def _finite_or_none(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None
