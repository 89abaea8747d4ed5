"""What a chart marks: restarts, bad batches, stages and the best checkpoint of a run, from the files in its folder."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from itertools import groupby, pairwise
from typing import Any

from experiment.checkpoints import checkpoint_step, named_best
from experiment.files import parse_json
from experiment.goodput import read_attempt_times
from experiment.results.charts import Mark
from experiment.run_folder import RunFolder


def read_marks(folder: RunFolder, config: Mapping[str, Any]) -> list[Mark]:
    """config: of config.yaml, empty if not known. Files that cannot be read mark nothing."""
    return [*_restarts(folder), *_bad_batches(folder), *_stages(config), *_best(folder)]


def _restarts(folder: RunFolder) -> Iterator[Mark]:
    """Where each later attempt has resumed, or, if that is not kept, the last step of the attempt before."""
    try:
        lines = sorted(read_attempt_times(folder), key=lambda line: (line.start, line.time))
    except OSError:
        return
    attempts = [list(group) for _, group in groupby(lines, key=lambda line: line.start)]
    for number, (before, attempt) in enumerate(pairwise(attempts), start=2):
        started = datetime.fromtimestamp(attempt[0].start, UTC)
        step = min(before[-1].step, attempt[0].step)
        yield Mark("restart", step, f"attempt {number}, {started:%Y-%m-%d %H:%M} UTC, from step {step:,}")


def _bad_batches(folder: RunFolder) -> Iterator[Mark]:
    for path in sorted(folder.bad_batch(0).parent.glob("step-*/fault.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            fault = parse_json(path.read_text(encoding="utf-8"))
            yield Mark("bad", int(fault["step"]), str(fault["what"]))


def _stages(config: Mapping[str, Any]) -> Iterator[Mark]:
    with suppress(KeyError, TypeError, AttributeError):
        first_step = 0
        for number, stage in enumerate(config["schedule"]["stages"], start=1):
            if number > 1:
                values = {key: value for key, value in stage.items() if key != "steps" and value is not None}
                described = ", ".join(f"{key} {value}" for key, value in values.items())
                yield Mark("stage", first_step, f"stage {number}: {described}" if described else f"stage {number}")
            first_step += stage["steps"] or 0


def _best(folder: RunFolder) -> Iterator[Mark]:
    with suppress(OSError, ValueError):
        best = named_best(folder.checkpoints)
        if best is not None:
            step = checkpoint_step(best)
            yield Mark("best", step, f"best checkpoint: step {step:,}")
