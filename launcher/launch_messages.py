"""What `deepcloze pretrain` says when a run starts and ends, besides the messages of the ranks."""

import shlex

from experiment.checkpoints import checkpoint_path, checkpoint_step, complete_checkpoints
from experiment.run_folder import RunFolder
from experiment.tracking.console import describe_duration
from experiment.tracking.jsonl import last_number, read_last_events
from launcher.hosts.hostfile import Slots
from launcher.messages import end_line, notify
from launcher.ranks.placement import is_local


def announce_start(slots: Slots) -> None:
    ranks = sum(map(len, slots.values()))
    where = "this machine" if is_local(slots) else f"{len(slots)} host{'s' if len(slots) > 1 else ''}"
    notify(f"starting {ranks} rank{'s' if ranks > 1 else ''} on {where}")


def last_step(folder: RunFolder) -> int | None:
    """Of the newest complete checkpoint of a run; None if it has none."""
    checkpoints = complete_checkpoints(folder.checkpoints)
    return checkpoint_step(checkpoints[-1]) if checkpoints else None


def announce_done(folder: RunFolder, step_before: int | None, seconds: float) -> None:
    """`step_before`: `last_step` before this launch; `seconds`: that it took."""
    step = last_step(folder)
    if step is None:
        return
    path = folder.path
    if step == step_before:
        notify(f"{path} was finished already, at step {step:,}; to train longer, raise its length in `schedule`")
        return
    loss = last_number(read_last_events(folder.metrics), "loss")
    with_loss = "" if loss is None else f", loss {loss:.4f}"
    notify(f"done: {step:,} steps{with_loss}, {describe_duration(seconds)} in this launch")
    notify(f"  model: {checkpoint_path(folder.checkpoints, step) / 'hf'}")
    run = shlex.quote(str(path))
    notify(f"  next:  deepcloze report {run}; deepcloze finetune --config TASK --model.init_from={run}")


def announce_stop(folder: RunFolder, step_before: int | None) -> None:
    """What a stopped run has saved. `step_before`: as above."""
    end_line()
    step = last_step(folder)
    if step is not None and step != step_before:
        notify(f"stopped at step {step:,}, saved")
