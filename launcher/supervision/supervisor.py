"""Runs a launch: its ranks, and again after a failure that may not happen again.

`attempt` runs the ranks once, `restarts` decides what follows.
"""

import threading
import time
from dataclasses import replace

from experiment.checkpoints import complete_checkpoints
from experiment.outcome_file import Cause, Outcome, reserve_outcome
from experiment.run_lock import lock_run
from launcher.hosts.hostfile import Slots
from launcher.hosts.usable_hosts import usable_hosts, watch_for_hosts
from launcher.messages import notify
from launcher.supervision.attempt import Launch, Layout, run_attempt
from launcher.supervision.launch_log import AttemptRecord, begin_attempt
from launcher.supervision.launch_result import LaunchResult, clear_reports
from launcher.supervision.restarts import Attempt, End, Restart, decide
from launcher.supervision.stop_signals import StopSignals


def supervise(launch: Launch, start_time: float) -> LaunchResult:
    """Run a launch until it is done, stopped, or has failed too often, and record each attempt in `RUN/launch.jsonl`.

    `start_time`: `time.time()` when the user started the launch. A STOP file that is older is removed; a newer one was
    created while the launch was checked, and nothing is started.

    On SIGTERM, SIGHUP or Ctrl-C the ranks save a checkpoint and exit; a second Ctrl-C kills them. No rank outlives this
    process. Raises UserError if another launch uses the run folder, OSError if it cannot be written.
    """
    folder, stop = launch.folder, StopSignals(launch.folder)
    with lock_run(folder, on_lost=lambda: stop.kill_ranks(f"another machine has taken over {folder.path}")):
        if folder.stop.exists() and folder.stop.stat().st_mtime < start_time:
            folder.stop.unlink()
            notify(f"removed {folder.stop}, which is older than this launch")
        with stop.handle():
            return _Supervisor(launch, stop).run()


class _Supervisor:
    def __init__(self, launch: Launch, stop: StopSignals) -> None:
        self._launch = launch
        self._folder = launch.folder
        self._stop = stop
        self._attempts: list[Attempt] = []

    def run(self) -> LaunchResult:
        layout = Layout(self._launch.slots)
        while True:
            attempt = self._attempt(layout)
            self._attempts.append(attempt)
            if self._stop.requested or self._folder.stop.exists():
                return attempt.result
            can_halve = layout.microbatch_halvings < self._launch.max_halvings
            match decide(self._attempts, self._launch.max_restarts, can_halve):
                case End(advice):
                    return _with_advice(attempt.result, advice)
                case Restart() as restart:
                    self._announce(attempt, restart)
                    self._stop.wait(restart.wait_seconds)
                    layout = Layout(self._usable_slots(), layout.microbatch_halvings + restart.halve_microbatch)

    def _attempt(self, layout: Layout) -> Attempt:
        folder = self._folder
        clear_reports(folder)
        reserve_outcome(folder)
        record = begin_attempt(folder, layout.slots)
        saved = complete_checkpoints(folder.checkpoints)[-1:]
        result, joins_hosts = self._run_or_stop(layout, record)
        record.end(result)
        progressed = complete_checkpoints(folder.checkpoints)[-1:] != saved
        return Attempt(result, time.monotonic(), progressed, joins_hosts)

    def _run_or_stop(self, layout: Layout, record: AttemptRecord) -> tuple[LaunchResult, bool]:
        """The result, and whether the attempt was ended to take hosts back."""
        stop_file = self._folder.stop
        if self._stop.requested or stop_file.exists():
            return LaunchResult(Outcome.STOPPED, f"found {stop_file}; run the same command again to resume"), False
        if not layout.slots:
            return LaunchResult(Outcome.FAILED, "no host answers", Cause.LOST_HOST), False
        joins = threading.Event()

        def join() -> None:
            joins.set()
            notify("a host has returned: the ranks save a checkpoint and start again with it")
            stop_file.touch()

        missing = self._launch.slots.keys() - layout.slots.keys()
        with watch_for_hosts(missing, self._folder, join):
            result = run_attempt(self._launch, layout, self._stop, record)
        if joins.is_set() and not self._stop.requested:
            stop_file.unlink(missing_ok=True)
        return result, joins.is_set() and result.outcome is Outcome.STOPPED

    def _announce(self, attempt: Attempt, restart: Restart) -> None:
        if attempt.joins_hosts:
            return
        smaller = ", with half the microbatch" if restart.halve_microbatch else ""
        when = f" in {restart.wait_seconds:.0f} s" if restart.wait_seconds else ""
        reason = attempt.result.message or "the ranks were stopped"
        notify(f"{reason}\nrestarting{when}{smaller}")

    def _usable_slots(self) -> Slots:
        """The slots of the hosts that answer."""
        wanted = self._launch.slots
        if self._launch.local:
            return wanted
        usable = usable_hosts(wanted.keys(), self._folder)
        if missing := [host for host in wanted if host not in usable]:
            notify(f"without {', '.join(missing)}, until they answer again")
        return {host: slots for host, slots in wanted.items() if host in usable}


def _with_advice(result: LaunchResult, advice: str) -> LaunchResult:
    return replace(result, message=f"{result.message}\n{advice}") if advice else result
