"""Which hosts a launch leaves out because its attempts fail with them. Pure."""

from experiment.run_files.outcome_file import Cause, Outcome
from experiment.tracking.alerts import REPEAT_SECONDS
from launcher.hosts.hostfile import Slots
from launcher.supervision.launch_result import LaunchResult
from launcher.supervision.restarts import Attempt

_MAX_FAILURES = 3  # in a row, of attempts with a host that has rejoined


class DoubtedHosts:
    """Hosts that have rejoined a launch, or that two failures in a row were on, until a checkpoint with them."""

    def __init__(self, slots: Slots) -> None:
        """slots: of all hosts."""
        self._slots = slots
        self._failures: dict[str, int] = {}  # by host; until a checkpoint with it
        self._last_failed_on: frozenset[str] = frozenset()  # hosts; until a checkpoint
        self._suspects: set[str] = set()  # hosts that two failures in a row were on; until a checkpoint

    def note(
        self, slots: Slots, result: LaunchResult, has_saved: bool, microbatch_has_grown: bool
    ) -> tuple[set[str], set[str]]:
        """Take account of an attempt. Returns the hosts to leave out of the next one, and those to take back.
        has_saved: whether it has saved a checkpoint. microbatch_has_grown: since an earlier attempt."""
        taken_back = self._take_back(slots, result, has_saved)
        return self._leave_out(slots, result, has_saved, microbatch_has_grown), taken_back

    def _take_back(self, slots: Slots, result: LaunchResult, has_saved: bool) -> set[str]:
        """Return the hosts to take back after an attempt without them has failed, before a checkpoint: perhaps it was
        not their fault, or the run needs them. They are not suspected again until a checkpoint."""
        if has_saved:
            self._suspects.clear()
        if result.outcome not in (Outcome.FAILED, Outcome.REFUSED):
            return set()
        hosts = (self._suspects & self._failures.keys()) - slots.keys()
        for host in hosts:
            del self._failures[host]
        return hosts

    def _leave_out(self, slots: Slots, result: LaunchResult, has_saved: bool, microbatch_has_grown: bool) -> set[str]:
        """Count an attempt that has failed before a checkpoint was saved against the host that it has failed on, from
        the second time in a row, else against those that have rejoined: the run was fine without them. If all of
        several have rejoined, one is tried alone. Returns those to leave out; none if there are no others."""
        if has_saved:
            self._last_failed_on = frozenset()
            self._failures = {host: count for host, count in self._failures.items() if host not in slots}
            return set()
        if result.outcome not in (Outcome.FAILED, Outcome.REFUSED):
            return set()
        if slots.keys() <= result.lost:  # all hosts at once: the network or the power has failed
            return set()
        if result.cause is Cause.OUT_OF_MEMORY and microbatch_has_grown:  # it is too large now
            return set()
        if failed_on := result.lost or result.failed_on:
            if len(failed_on) == 1 < len(slots) and failed_on == self._last_failed_on:
                new = failed_on - self._failures.keys() - self._suspects
                self._suspects |= new
                self._failures |= dict.fromkeys(new, 0)
            self._last_failed_on = failed_on
        hosts = slots.keys() & self._failures.keys()
        hosts = hosts & failed_on if result.lost else hosts & failed_on or hosts
        if len(hosts) > 1 and hosts == slots.keys():
            hosts.remove(min(slots, key=self._failures.__getitem__))
        for host in hosts:
            self._failures[host] += 1
        return hosts if hosts < slots.keys() else set()

    def choose(self, usable: Slots, before: Slots, last: Attempt) -> Slots:
        """Return the slots of the next attempt. Leave out hosts with which the run has failed since they rejoined. Take
        one of them back after a checkpoint, or if there are no others: with several, a failure would not say which of
        them does not work. usable: of the hosts that can be used. before: of the last attempt."""
        kept = before.keys() - last.left_out
        if all(map(self._failures.get, kept)):  # the run has failed on each of them
            kept = set()
        doubted = [host for host in usable if self._failures.get(host) and host not in kept]
        others = usable.keys() - doubted
        if doubted and (not others or (last.joins_hosts and others <= kept)):
            doubted.remove(min(doubted, key=lambda host: (self._failures[host], host in before)))
        chosen = {host: slots for host, slots in usable.items() if host not in doubted}
        if not chosen.keys().isdisjoint(before):  # else there is nothing to rejoin
            rejoining = chosen.keys() - before.keys() - self._suspects
            self._failures = dict.fromkeys(rejoining, 0) | self._failures
        return chosen

    def given_up(self) -> dict[str, str]:
        """Return the hosts that have failed too often to be taken back, and why. Never all hosts: the limit of restarts
        ends a run that fails with each of them."""
        minutes = f"{REPEAT_SECONDS / 60:.0f} minutes"
        reason = f"given up after {_MAX_FAILURES} failures (used again if no other host answers for {minutes})"
        best = min(self._slots, key=lambda host: self._failures.get(host, 0))
        return {host: reason for host, count in self._failures.items() if count >= _MAX_FAILURES and host != best}
