"""A bad batch is set aside for people to look at.

RUN/health/step-00000107/
    fault.json          what was seen, and the figures
    rank-00000.jsonl    the sequences of each rank's share: where they come from, what they say, what the model saw
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from experiment.files import write_json, write_text
from pretrain.batching.batch import IGNORED, RankBatch
from pretrain.training.health import Fault
from pretrain.world import World

Decode = Callable[[Sequence[int]], str]


def set_aside(
    folder: Path,
    world: World,
    batch: RankBatch,
    losses: Sequence[float],
    fault: Fault,
    corpora: Sequence[str],
    decode: Decode,
) -> None:
    """Write this rank's share of a batch. `losses`: summed, of each microbatch; `corpora`: names. Raises OSError."""
    if world.rank == 0:
        figures = {key: _finite(value) for key, value in asdict(fault).items()}
        write_json(folder / "fault.json", figures | {"what": str(fault)})
    lines = (json.dumps(sequence, ensure_ascii=False) for sequence in sequences(batch, losses, corpora, decode))
    write_text(folder / f"rank-{world.rank:05d}.jsonl", "".join(f"{line}\n" for line in lines))


def sequences(
    batch: RankBatch, losses: Sequence[float], corpora: Sequence[str], decode: Decode
) -> list[dict[str, Any]]:
    """Each sequence of a rank's share, in the order of its microbatches."""
    found = []
    for number, (microbatch, loss) in enumerate(zip(batch.microbatches, losses, strict=True)):
        shown, segments = microbatch.input_ids.reshape(-1), microbatch.segments.reshape(-1)
        predicted = microbatch.labels != IGNORED
        original = shown.clone()
        original[microbatch.masked_positions[predicted]] = microbatch.labels[predicted]
        for segment in np.unique(segments[segments != 0]).tolist():
            here = segments == segment
            ids, shown_ids = original[here].tolist(), shown[here].tolist()
            found.append(
                {
                    "corpus": corpora[batch.origins.corpora[segment - 1]],
                    "epoch": int(batch.origins.epochs[segment - 1]),
                    "sequence": int(batch.origins.ids[segment - 1]),
                    "microbatch": number,
                    "microbatch_loss": _finite(loss),  # summed over its predicted tokens
                    "text": decode(ids),
                    "shown": decode(shown_ids),
                    "input_ids": ids,
                    "shown_ids": shown_ids,
                }
            )
    return found


def _finite(value: float | None) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if value is not None and math.isfinite(value) else None
