"""What a launch prints about its checks and its end."""

import shlex
from collections.abc import Sequence
from statistics import fmean

from experiment.errors import end_line, inform, notify
from experiment.formatting import counted, describe_duration
from experiment.run_files.checkpoints import (
    BEST,
    checkpoint_candidates,
    checkpoint_path,
    checkpoint_step,
    completed_saves,
)
from experiment.run_files.goodput import reached_checkpoints, read_attempt_times
from experiment.run_files.metrics_file import read_events, read_last_events
from experiment.run_files.run_folder import RunFolder
from launcher.hosts.hostfile import Slots
from launcher.ranks.placement import is_local

_PEAK_RATIO = 1.5  # highest loss divided by the first one; healthy runs stay below, also with batches of two sequences


def announce_checks(config: str, slots: Slots) -> None:
    """Announce the checks. config: path of the config file."""
    ranks = sum(map(len, slots.values()))
    where = "this machine" if is_local(slots) else counted(len(slots), "host")
    inform(f"checking {config} for {counted(ranks, 'rank')} on {where}")


def announce_done(folder: RunFolder, before: set[tuple[int, int]], seconds: float) -> None:
    """Announce the end. `before`: `completed_saves` before this launch; `seconds`: that it took."""
    if not (found := completed_saves(folder.checkpoints)):
        return
    path, new = folder.path, found - before
    step, _ = max(new or found)
    if not new:
        advice = "to train longer, raise its length in `schedule`, or, if it stopped early, `evaluation.patience`"
        inform(f"{path} was finished already, at step {step:,}; {advice}")
        return
    losses = [event["loss"] for event in read_events(folder.metrics) if event.get("loss") is not None]
    with_loss = f", loss {losses[-1]:.4f}" if losses else ""
    inform(f"done: {counted(step, 'step')}{with_loss}, {describe_duration(seconds)} in this launch")
    best = checkpoint_candidates(folder.checkpoints / BEST)
    inform(f"  model: {(best or [checkpoint_path(folder.checkpoints, step)])[0] / 'hf'}")
    if has_diverged(losses):
        risen = f"the loss has risen from {losses[0]:.4f} to as much as {max(losses):.4f}"
        notify(f"warning: {risen}: lower optimizer.lr, and start in a new run.dir")
        return
    run, start = shlex.quote(str(path)), shlex.quote(str(folder.checkpoints / BEST if best else path))
    inform(f"  next:  deepcloze report {run}; deepcloze finetune --config TASK --model.init_from={start}")


def has_diverged(losses: Sequence[float]) -> bool:
    """Return whether the loss of a run has left the range of its start and has not come back: the mean of the last
    tenth is higher than the first value. A diverged run may end only a few percent higher, having learned token
    frequencies."""
    if not losses:
        return False
    first, end = losses[0], fmean(losses[-max(1, len(losses) // 10) :])
    return end > first and max(losses) > _PEAK_RATIO * first


def announce_stop(folder: RunFolder, before: set[tuple[int, int]]) -> None:
    """Print the step that a stopped run has saved. `before`: `completed_saves` before this launch."""
    end_line()
    if not (new := (completed_saves(folder.checkpoints) or set()) - before):
        return
    step, _ = max(new)
    reached = max((event["step"] for event in read_last_events(folder.metrics)), default=step)
    lost = f"; step {reached:,} was reached, but could not be saved" if reached > step else ""
    inform(f"stopped at step {step:,}, saved{lost}")


def announce_failure(folder: RunFolder) -> None:
    """Print where the same command would resume a failed run, and where its logs are."""
    end_line()
    if found := reached_checkpoints(folder, read_attempt_times(folder)):
        step = checkpoint_step(found[-1])
        inform(f"the newest checkpoint is of step {step:,}: the same command resumes from it; logs: {folder.logs}")
    else:
        inform(f"no checkpoint was saved; logs: {folder.logs}")
