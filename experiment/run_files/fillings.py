"""`RUN/logs/fillings.jsonl`: predictions of the checkpoints of a run for masked held-out sentences, one line each.

`deepcloze report` adds the checkpoints that there are. The lines stay when retention deletes them, but not
when the run resumes from an earlier step.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from experiment.files import parse_records, write_text
from experiment.run_files.run_folder import RunFolder

T = TypeVar("T")


@dataclass(frozen=True)
class MaskedSentence:
    before: str
    answer: str  # the masked word
    after: str


@dataclass(frozen=True)
class FilledSentence:
    sentence: MaskedSentence
    top: tuple[tuple[str, float], ...]  # (word, probability), the most probable first


@dataclass(frozen=True)
class CheckpointFillings:
    step: int
    weights: str  # identifies the checkpoint, see `checkpoints.weights_digest`
    sentences: tuple[FilledSentence, ...]


def add_fillings(folder: RunFolder, fillings: CheckpointFillings) -> None:
    folder.fillings.parent.mkdir(exist_ok=True)
    with folder.fillings.open("ab") as file:
        file.write(_line(fillings).encode())


def drop_fillings(folder: RunFolder, last_step: int) -> None:
    """Remove the fillings of steps after `last_step`, from which the run resumes: the weights of these steps are
    abandoned. Raises OSError."""
    found = read_fillings(folder)
    kept = [fillings for fillings in found if fillings.step <= last_step]
    if len(kept) < len(found):
        write_text(folder.fillings, "".join(map(_line, kept)))


def _line(fillings: CheckpointFillings) -> str:
    return "\n" + json.dumps(asdict(fillings), ensure_ascii=False)  # in front: the last line may be cut off


def read_fillings(folder: RunFolder) -> list[CheckpointFillings]:
    """Read the fillings by step; of a step trained twice, the last line. Empty without a file; skips damaged lines."""
    try:
        lines = parse_records(CheckpointFillings, folder.fillings.read_bytes())
    except OSError:
        return []
    found = {line.step: line for line in lines}
    return [found[step] for step in sorted(found)]


def spread(items: Sequence[T], count: int) -> list[T]:
    """Return at most `count` of the items, evenly spread, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]
