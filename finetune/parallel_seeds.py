"""Train several seeds at a time, each in a process of its own: on a GPU of its own, or on a share of the cores.

`python -m finetune.parallel_seeds CONFIG SEED` is the process of a seed. It writes RUN/seed-N as `train_seed` does, its
output to RUN/logs/seed-N.log and its events to RUN/logs/seed-N.jsonl, from where they go to the trackers of the run
when the seed is finished. It ends when this process does, and saves its state. Its stdin is a socket, to which it sends
the reason of a failure: the disk of its log may be the reason.
"""

import gc
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from experiment.errors import (
    StoppedError,
    UserError,
    describe_lack_of_memory,
    first_line,
    inform,
    notify,
    stopped_by_disk_errors,
)
from experiment.process.hardware import prepare_process
from experiment.process.own_process import module_command, own_environment
from experiment.process.signals import handle_stop_signals, interrupt, uninterrupted
from experiment.progress import progress
from experiment.run_files.metrics_file import (
    Event,
    JsonlTracker,
    kept_events,
    read_events,
    read_last_events,
    write_events,
)
from experiment.run_files.outcome_file import Outcome
from experiment.run_files.run_folder import RunFolder
from experiment.run_files.run_lock import lock_until_exit
from experiment.tracking.progress_line import ConsoleTracker
from finetune.resolve import ResolvedRun, load_run_config, resolve
from finetune.results.seed_summary import SeedRecord
from finetune.seed_run import is_finished, print_seed, read_finished_seeds, state_file, train_seed
from finetune.training.fit import DivergedError, Log

_POLL_SECONDS = 0.5  # reads the end of a file for each seed
_REASON_BYTES = 1 << 16


@dataclass
class _SeedProcess:
    seed: int
    process: "subprocess.Popen[bytes]"
    connection: socket.socket  # the other end is its stdin


def train_seeds_in_parallel(run: ResolvedRun, logs: Mapping[int, Log]) -> dict[int, SeedRecord]:
    """Train with the missing seeds, `training.parallel_seeds` at a time. Returns the records of all finished seeds.

    Raises UserError if a seed was rejected, StoppedError if one was stopped, and SystemExit if one failed, when the
    others have saved their state.

    logs: of all seeds, in the order of their events.
    """
    gc.collect()
    torch.cuda.empty_cache()  # of the model that `resolve` has tried: the seeds need the memory
    waiting = [seed for seed in logs if not is_finished(seed, run)]
    unlogged, running = list(logs), dict[int, _SeedProcess]()  # by slot, one for each seed that runs at a time
    slots = min(run.training.parallel_seeds, len(waiting))
    started = {seed: state_file(seed, run).steps for seed in waiting}
    total = run.steps * len(started) - sum(started.values())
    try:
        with progress("training", total, describe=lambda done: f"{done:,.0f} of {total:,} steps") as advance:
            done = 0
            while waiting or running:
                for slot in range(slots):
                    if waiting and slot not in running:
                        running[slot] = _start(waiting.pop(0), slot, slots, run)
                time.sleep(_POLL_SECONDS)
                for slot in [slot for slot, each in running.items() if each.process.poll() is not None]:
                    _finish(running.pop(slot), run)
                while unlogged and is_finished(unlogged[0], run):  # in their order: steps never decrease
                    seed = unlogged.pop(0)
                    log_events_of_process(seed, run, logs[seed])
                now = sum(max(_last_step(seed, run) - started[seed], 0) for seed in started)
                advance(now - done)
                done = now
    except KeyboardInterrupt:
        raise StoppedError("stopped: the seeds have saved their state; run the same command again to resume") from None
    finally:
        _stop(running.values())
    return read_finished_seeds(run.folder, run.settings)


def log_events_of_process(seed: int, run: ResolvedRun, log: Log) -> None:
    """Log the events that the process of a seed has left, up to the state from which it resumes."""
    path, state = _events_file(seed, run.folder), None if is_finished(seed, run) else state_file(seed, run)
    events = kept_events(path, run.steps) if state is None else kept_events(path, state.steps, state.lacks_evaluation)
    with uninterrupted():  # the next command would log them again
        for event in events:
            log(event.pop("step"), event)
        path.unlink(missing_ok=True)


def count_logged(finished: Sequence[int], folder: RunFolder) -> int:
    """Return how many of the first finished seeds have logged all events of their processes. A command that was killed
    may have logged some events of the next one, which are dropped and logged again."""
    is_left = [_events_file(seed, folder).exists() for seed in finished]
    first = is_left.index(True) if any(is_left) else len(finished)
    return first if all(is_left[first:]) else len(finished)


def move_events_to_end(order: Sequence[int], missing: Sequence[int], run: ResolvedRun) -> None:
    """Let the events of other seeds come before events of missing ones in metrics.jsonl, which drops all events that
    follow the step at which training continues.

    Events of missing seeds go to the files from which `log_events_of_process` logs them again. order: of all seeds.
    """
    events, kept = read_events(run.folder.metrics), [seed for seed in order if seed not in missing]

    def shifted(seed: int, places: int) -> list[Event]:
        return [{**event, "step": event["step"] - run.steps * places} for event in events if event.get("seed") == seed]

    for seed in missing:
        path = _events_file(seed, run.folder)
        later = read_events(path)
        end = min(state_file(seed, run).steps, later[0]["step"] - 1 if later else math.inf)
        earlier = [event for event in shifted(seed, order.index(seed)) if event["step"] <= end]
        write_events(path, [*earlier, *later])
    write_events(
        run.folder.metrics,
        [event for place, seed in enumerate(kept) for event in shifted(seed, order.index(seed) - place)],
    )


def _start(seed: int, slot: int, slots: int, run: ResolvedRun) -> _SeedProcess:
    inform(f"seed {seed}: training, see {_log_file(seed, run.folder)}")
    connection, stdin = socket.socketpair()
    with _log_file(seed, run.folder).open("ab") as output, stdin:
        process = subprocess.Popen(
            [*module_command(__name__), str(run.folder.config), str(seed)],
            env={**own_environment(), **_share(slot, slots, run)},
            stdin=stdin.fileno(),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    return _SeedProcess(seed, process, connection)


def _share(slot: int, slots: int, run: ResolvedRun) -> dict[str, str]:
    """Return the variables that give the process in a slot its GPU, or its share of the cores."""
    if run.task.device.torch_device.type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]}
    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // slots))}


def _finish(ended: _SeedProcess, run: ResolvedRun) -> None:
    """Print the results of a seed whose process has ended. Raises as `train_seeds_in_parallel`."""
    seed, code = ended.seed, ended.process.returncode
    with ended.connection:
        reason = ended.connection.recv(_REASON_BYTES).decode(errors="replace")
    if code == 0:
        print_seed(seed, read_finished_seeds(run.folder, run.settings)[seed], run)
        return
    if code == Outcome.STOPPED.exit_code:
        raise StoppedError(reason)
    if code == Outcome.REFUSED.exit_code:
        raise UserError(reason)
    failed = f"seed {seed} failed (exit code {code}){reason and f': {reason}'}"
    sys.exit(f"deepcloze: {failed}; see {_log_file(seed, run.folder)}")


def _stop(running: Collection[_SeedProcess]) -> None:
    """Let the processes save their state, and wait for them."""
    for each in running:
        with suppress(ProcessLookupError):
            each.process.send_signal(signal.SIGTERM)
    for each in running:
        each.process.wait()
        each.connection.close()


def _last_step(seed: int, run: ResolvedRun) -> int:
    events = read_last_events(_events_file(seed, run.folder))
    return max((event["step"] for event in events), default=run.steps if is_finished(seed, run) else 0)


def _events_file(seed: int, folder: RunFolder) -> Path:
    return folder.logs / f"seed-{seed}.jsonl"


def _log_file(seed: int, folder: RunFolder) -> Path:
    return folder.logs / f"seed-{seed}.log"


def _stop_with_parent() -> None:
    """Stop this process when stdin is closed, which its parent holds open."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def main(argv: Sequence[str]) -> int:
    """Train one seed. Returns an exit code."""
    config, seed = Path(argv[0]), int(argv[1])
    prepare_process()
    try:
        with handle_stop_signals(interrupt), stopped_by_disk_errors(f"run.dir {config.parent}: "):
            lock_until_exit(RunFolder(config.parent))  # the next command waits, if its parent was killed
            threading.Thread(target=_stop_with_parent, daemon=True).start()
            run = resolve(load_run_config(config))
            state, events = state_file(seed, run), _events_file(seed, run.folder)
            started = state.steps
            trackers = (ConsoleTracker(run.steps, started), JsonlTracker(events, started, state.lacks_evaluation))

            def log(step: int, metrics: Mapping[str, int | float | str | None]) -> None:
                for tracker in trackers:
                    tracker.log({"step": step, **metrics})

            train_seed(seed, run, log)
    except UserError as error:
        return _end(Outcome.REFUSED, str(error))
    except (StoppedError, KeyboardInterrupt) as stopped:
        return _end(Outcome.STOPPED, str(stopped) or "stopped")
    except Exception as error:
        message = str(error) if isinstance(error, DivergedError) else describe_lack_of_memory(error)
        if message is None:
            logging.getLogger(__name__).exception("this seed failed")
        return _end(Outcome.FAILED, message or f"{type(error).__name__}: {first_line(error)}")
    return 0


def _end(outcome: Outcome, reason: str) -> int:
    """Print the reason and send it to the parent. Returns the exit code."""
    notify(reason)
    with suppress(OSError):  # the parent was killed
        os.write(sys.stdin.fileno(), reason.encode(errors="replace")[:_REASON_BYTES])
    return outcome.exit_code


if __name__ == "__main__":
    code = main(sys.argv[1:])
    with suppress(OSError):  # the disk of the log may have failed
        sys.stdout.flush()
    os._exit(code)  # a normal exit takes a second to clean up imported modules
