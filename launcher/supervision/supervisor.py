"""Runs a launch: its ranks, and again after a failure that may not happen again.

`attempt` runs the ranks once, `restarts` decides whether to run them again.
"""

import os
import shutil
import signal
import time
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile

from experiment.errors import UserError, describe_disk_error, notify
from experiment.files import remove_unfinished
from experiment.run_files.checkpoints import completed_saves
from experiment.run_files.goodput import record_end
from experiment.run_files.outcome_file import Cause, Outcome, write_outcome
from experiment.run_files.run_folder import RunFolder
from experiment.run_files.run_lock import CLOCK_SKEW, lock_run
from experiment.tracking.alerts import REPEAT_SECONDS
from launcher.hosts.guarded_hosts import name_reasons
from launcher.hosts.hostfile import Slots
from launcher.supervision.attempt import LaunchSettings, Layout, run_attempt
from launcher.supervision.doubted_hosts import DoubtedHosts
from launcher.supervision.launch_alerts import LaunchAlerts
from launcher.supervision.launch_result import AttemptRecord, LaunchResult, begin_attempt
from launcher.supervision.restarts import Attempt, End, Restart, decide
from launcher.supervision.returning_hosts import poll_intervals, unusable_hosts, watch_for_hosts
from launcher.supervision.stop_signals import StopSignals

_RELEASE_SECONDS = 5.0  # until the driver has freed the GPU memory of ranks that were killed
_OUTAGE_HOURS = 24.0  # for which a launch waits for a first usable host


def supervise(launch: LaunchSettings) -> LaunchResult:
    """Run a launch until it is done, stopped, or has failed too often, and record each attempt in `RUN/launch.jsonl`.

    A STOP file that is older than `launch.checked_at` is removed; a newer one was created since then, and no rank
    begins. The caller ends ranks of `launch.held` that have not begun.

    On a stop signal the ranks save a checkpoint and exit; a second one kills them. No rank outlives this process.
    Raises UserError if another launch uses the run folder, OSError if it cannot be written.
    """
    folder, stop = launch.folder, StopSignals(launch.folder)
    taken_over = f"another launch has taken over {folder.path}"
    with (
        closing(LaunchAlerts(launch.tracking, folder)) as alerts,
        lock_run(folder, on_lost=lambda: stop.abandon(taken_over), dead=launch.dead_owner),
    ):
        remove_launch_leftovers(folder, launch.checked_at)
        with stop.handle(), nullcontext() if launch.local else _ignored_suspension():
            result = _Supervisor(launch, stop, alerts).run()
        if not stop.abandoned:
            with suppress(OSError):  # the ranks may have reported less than the launcher knows
                write_outcome(folder, result.outcome, result.message, result.cause)
        return result


def remove_launch_leftovers(folder: RunFolder, checked_at: float) -> None:
    """Remove trials, unfinished files of killed processes of this machine, the output of a background launch, and
    a STOP file that is older than `checked_at`, when deepcloze began to check this launch, or dated in the future.
    Raises OSError for the STOP file."""
    if folder.stop.exists():
        with NamedTemporaryFile(dir=folder.logs) as file:
            now = Path(file.name).stat().st_mtime  # by the clock of the disk
        age = now - folder.stop.stat().st_mtime
        if not -CLOCK_SKEW < age <= time.time() - checked_at:
            folder.stop.unlink()
            notify(f"removed {folder.stop}, which is not from this launch by its date")
    shutil.rmtree(folder.trials, ignore_errors=True)  # of a command that was killed
    for written in (folder.path, folder.logs):
        remove_unfinished(written)
    with suppress(OSError):
        if not os.path.samestat(folder.launch_output.stat(), os.fstat(2)):  # this process does not print there
            folder.launch_output.unlink()


@contextmanager
def _ignored_suspension() -> Iterator[None]:
    """Ignore Ctrl-Z: guards would consider a suspended launcher lost."""
    before = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)


class _Supervisor:
    def __init__(self, launch: LaunchSettings, stop: StopSignals, alerts: LaunchAlerts) -> None:
        self._launch = launch
        self._folder = launch.folder
        self._stop = stop
        self._alerts = alerts
        self._attempts: list[Attempt] = []
        self._unusable: dict[str, str] = {}  # host -> why, as printed at the last look
        self._halvings: dict[int, int] = {}  # ranks -> how often the microbatch was halved, which fewer ranks need too
        self._doubted = DoubtedHosts(launch.slots)

    def run(self) -> LaunchResult:
        layout = Layout(self._launch.slots)
        while True:
            attempt = self._attempt(layout)
            self._attempts.append(attempt)
            self._launch = replace(self._launch, held=None)
            can_halve = layout.microbatch_halvings < self._launch.max_halvings
            match decide(self._attempts, self._launch.max_restarts, can_halve):
                case End(advice):
                    result = attempt.result
                    if not advice or self._stop.is_asked_for():
                        self._alerts.report(result)
                        return result
                    self._alerts.report(result, f"{advice}\nthe launch has ended")
                    return replace(result, message=f"{result.message}\n{advice}")
                case Restart() as restart:
                    if not self._stop.is_asked_for():
                        self._announce(layout, attempt, restart)
                        self._stop.wait(restart.wait_seconds)
                    usable = self._await_slots(_trusted(layout, attempt.result))
                    slots = self._doubted.choose(usable, layout.slots, attempt)
                    if self._stop.is_asked_for():
                        return _as_stop(attempt.result)
                    if not slots:
                        result = self._no_host()
                        self._alerts.report(result)
                        return result
                    if restart.halve_microbatch:
                        self._halvings[layout.ranks] = layout.microbatch_halvings + 1
                    ranks = sum(map(len, slots.values()))
                    halvings = max((count for most, count in self._halvings.items() if most >= ranks), default=0)
                    layout = Layout(slots, halvings, restarted=True)

    def _attempt(self, layout: Layout) -> Attempt:
        """Raises an error that prevents the first attempt from starting. Later disk errors count as a failed attempt,
        because the ranks may have failed for the same reason."""
        saved = completed_saves(self._folder.checkpoints)
        try:
            start_time = time.time() if self._attempts else self._launch.start_time  # before the checks
            record = begin_attempt(self._folder, layout.slots, start_time)
        except (OSError, UserError) as error:
            if not self._attempts:
                raise
            return Attempt(_disk_failure(error), time.monotonic(), saved=False)
        try:
            result, joins_hosts = self._run_or_stop(layout, record)
        except OSError as error:
            result, joins_hosts = _disk_failure(error), False
        result = replace(result, message=self._stop.explain(result.message))
        if not self._stop.abandoned:
            record.end(result)
            record_end(self._folder, record.start_time)
        now_saved = completed_saves(self._folder.checkpoints)
        has_saved = saved is not None and now_saved is not None and not now_saved <= saved
        microbatch_has_grown = layout.microbatch_halvings < max(self._halvings.values(), default=0)
        left_out, taken_back = self._doubted.note(layout.slots, result, has_saved, microbatch_has_grown)
        return Attempt(result, time.monotonic(), has_saved, joins_hosts, left_out, taken_back)

    def _run_or_stop(self, layout: Layout, record: AttemptRecord) -> tuple[LaunchResult, bool]:
        """Return the result, and whether the attempt was ended to take hosts back."""
        if self._stop.is_asked_for():
            message = f"found {self._folder.stop}; run the same command again to resume"
            return LaunchResult(Outcome.STOPPED, message), False
        own_stop = _OwnStopFile(self._folder.stop)
        missing = self._launch.slots.keys() - layout.slots.keys() - self._doubted.given_up().keys()
        with watch_for_hosts(missing, partial(self._passing, layout.slots), self._folder, own_stop.make):
            result = run_attempt(self._launch, layout, self._stop, record)
        withdrawn = own_stop.withdraw()
        return result, withdrawn and (result.outcome, result.cause) == (Outcome.STOPPED, Cause.SIGNAL)

    def _announce(self, layout: Layout, attempt: Attempt, restart: Restart) -> None:
        if attempt.joins_hosts:
            return
        smaller = ", with half the microbatch" if restart.halve_microbatch else ""
        when = f" in {restart.wait_seconds:.0f} s" if restart.wait_seconds else ""
        given_up = self._doubted.given_up()
        left_out = [
            f"{host} {'while other hosts answer' if host in given_up else 'until the next checkpoint if others work'}"
            for host in layout.slots
            if host in given_up or host in attempt.left_out
        ]
        without = f" without {', '.join(left_out)}" if left_out else ""
        again = f", trying {', '.join(attempt.taken_back)} again" if attempt.taken_back else ""
        reason, how = attempt.result.message or "the ranks were stopped", f"{when}{smaller}{again}{without}"
        notify(f"{reason}\nrestarting{how}")
        self._alerts.report(attempt.result, f"restarting{how}", restarting=True)

    def _await_slots(self, trusted: Collection[str]) -> Slots:
        """Return the slots of the usable hosts, once there are any; none after a request to stop or `_OUTAGE_HOURS`.
        After `REPEAT_SECONDS` without any, hosts that were given up may be used too: the others may never come back."""
        if not (trusted or self._launch.local):
            self._stop.wait(_RELEASE_SECONDS)  # else preflight finds busy GPUs
        start, waiting, alerted = time.monotonic(), "", False
        for seconds in poll_intervals():
            if self._stop.is_asked_for():
                break
            left_out = () if alerted else self._doubted.given_up().keys()
            slots, waited = self._usable_slots(trusted, left_out), time.monotonic() - start
            if slots or waited > _OUTAGE_HOURS * 3600:
                return slots
            if not waiting:
                waiting = f"waiting for a host, for {_OUTAGE_HOURS:.0f} hours at most"
                notify("; ".join(filter(None, (waiting, name_reasons(self._doubted.given_up())))))
            if waited > REPEAT_SECONDS and not alerted:
                self._alerts.report(self._no_host(), waiting)
                if given_up := ", ".join(self._doubted.given_up()):
                    notify(f"no other host has answered for {waited / 60:.0f} minutes: trying {given_up} again")
                alerted = True
            trusted = ()
            self._stop.wait(seconds)
        return {}

    def _no_host(self) -> LaunchResult:
        message = f"no host can be used: {name_reasons(self._unusable | self._doubted.given_up())}"
        return LaunchResult(Outcome.FAILED, message, Cause.LOST_HOST)

    def _usable_slots(self, trusted: Collection[str], left_out: Collection[str]) -> Slots:
        """Return the slots of the hosts that answer and are not left out. Hosts that are not `trusted` must pass
        preflight too: a host that is back may lack its GPUs or disks."""
        if self._launch.local:
            return self._launch.slots
        wanted = {host: slots for host, slots in self._launch.slots.items() if host not in left_out}
        unusable: dict[str, str] = {}
        with suppress(OSError):  # no temporary file or process can be made: guards notice hosts that do not answer
            unusable = unusable_hosts(wanted.keys(), self._folder)
        answering = [host for host in wanted if host not in unusable]
        if doubtful := [host for host in answering if host not in trusted]:
            unusable |= self._launch.preflight_problems(doubtful, answering, self._unusable)
        printed, self._unusable = self._unusable, unusable
        if new := [f"{host} ({reason})" for host, reason in unusable.items() if printed.get(host) != reason]:
            notify(f"without {', '.join(new)}, until they answer and pass preflight")
        return {host: slots for host, slots in wanted.items() if host not in unusable}

    def _passing(self, running: Collection[str], hosts: Collection[str]) -> Collection[str]:
        return set(hosts) - self._launch.preflight_problems(hosts, running, self._unusable).keys()


class _OwnStopFile:
    """The launcher's own STOP file, which asks the ranks to save a checkpoint and exit."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._made_at: int | None = None

    def make(self) -> None:
        with self._path.open("x") as file:
            self._made_at = os.fstat(file.fileno()).st_mtime_ns
        notify("a host has returned: the ranks save a checkpoint and start again with it")

    def withdraw(self) -> bool:
        """Remove the file, unless the user has touched it since. Returns whether it was made and not touched."""
        if self._made_at is None or not self._path.exists() or self._path.stat().st_mtime_ns != self._made_at:
            return False
        self._path.unlink()
        return True


def _trusted(layout: Layout, result: LaunchResult) -> Collection[str]:
    """Return the hosts of an attempt that need not pass preflight again."""
    unnamed = result.cause is Cause.LOST_HOST and not result.lost
    if unnamed or result.cause is Cause.ERROR or result.outcome is Outcome.REFUSED:  # perhaps by a disk or GPU of one
        return ()
    return layout.slots.keys() - result.lost


def _disk_failure(error: OSError | UserError) -> LaunchResult:
    return LaunchResult(Outcome.FAILED, describe_disk_error(error) or str(error), Cause.LOST_RANK)


def _as_stop(result: LaunchResult) -> LaunchResult:
    """Return the result of a launch that would have been restarted, but was asked to stop."""
    if result.outcome is Outcome.STOPPED:
        return result
    message = f"{result.message}\nstopped instead of restarting; run the same command again to resume"
    return replace(result, outcome=Outcome.STOPPED, message=message)
