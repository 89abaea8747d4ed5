import pytest

from experiment.run_files.outcome_file import Cause, Outcome
from launcher.supervision.launch_result import LaunchResult
from launcher.supervision.restarts import Attempt, End, Restart, decide

LOST = LaunchResult(Outcome.FAILED, "lost node-2", Cause.LOST_HOST)
BUG = LaunchResult(Outcome.FAILED, "KeyError", Cause.ERROR)
FULL = LaunchResult(Outcome.FAILED, "OutOfMemoryError", Cause.OUT_OF_MEMORY)
REFUSED = LaunchResult(Outcome.REFUSED, "no such corpus", Cause.AGREED)
PREEMPTED = LaunchResult(Outcome.STOPPED, "")


def after(*results: LaunchResult, saved: bool = False, max_restarts: int = 10, can_halve: bool = True) -> Restart | End:
    attempts = [Attempt(result, float(number), saved) for number, result in enumerate(results)]
    return decide(attempts, max_restarts, can_halve)


@pytest.mark.parametrize("cause", [Cause.LOST_HOST, Cause.LOST_RANK, Cause.KILLED, Cause.SIGNAL, Cause.ERROR])
def test_what_may_not_happen_again_is_restarted_at_once(cause: Cause) -> None:
    assert after(LaunchResult(Outcome.FAILED, "", cause)) == Restart(0.0)


def test_what_would_happen_again_is_not_restarted() -> None:
    """Catches a diverged run that is repeated, and a bug that is run into until the limit is reached."""
    assert after(LaunchResult(Outcome.FAILED, "the loss is NaN", Cause.AGREED)) == End()
    assert after(REFUSED) == End()
    assert after(BUG, BUG) == End()
    assert isinstance(after(BUG, BUG, saved=True), Restart), "further than the last time"
    assert isinstance(after(LOST, BUG), Restart)


def test_a_bug_is_the_same_after_a_host_was_left_out_and_taken_back() -> None:
    """Catches a bug that is run into again, because another host reported it in between."""
    elsewhere = LaunchResult(Outcome.FAILED, "KeyError on another host", Cause.ERROR)
    attempts = [
        Attempt(BUG, 0.0, saved=False),
        Attempt(BUG, 1.0, saved=False, left_out=["node-2"]),
        Attempt(elsewhere, 2.0, saved=False, taken_back=["node-2"]),
        Attempt(BUG, 3.0, saved=False),
    ]
    assert isinstance(decide(attempts[:2], 10, can_halve=True), Restart)
    assert isinstance(decide(attempts[:3], 10, can_halve=True), Restart)
    assert decide(attempts, 10, can_halve=True) == End()


@pytest.mark.parametrize(
    ("message", "is_bug"),
    [
        ("node-1, rank 0: the data worker (pid {}) failed at step 7: KeyError: 'a'", True),
        ("node-1, rank {}: the data worker (pid 1) failed at step 7: KeyError: 'a'", False),
        ("node-1, rank 0: the data worker (pid {}) failed at step 7: OSError: [Errno 5] Input/output error", False),
        ("node-1, rank 0: the data worker (pid {}) failed at step 7: TimeoutError: [Errno 110]", False),
        ("node-1, rank 0: the data worker (pid {}) was killed (SIGKILL), perhaps because the memory ran out", False),
        ("node-1, rank 0: the data worker (pid {}) has not made the batch of step 7 in 420 s", False),
        ("node-{}, rank 0: OSError: [Errno 5] Input/output error", False),
    ],
)
def test_an_exception_of_a_data_worker_is_the_same_in_another_process(message: str, is_bug: bool) -> None:
    """Catches a bug that is run into until the limit is reached, because its message names another process, and a run
    that ends because two workers run out of memory, or two hosts lose their disk."""
    results = (LaunchResult(Outcome.FAILED, message.format(number), Cause.ERROR) for number in (12, 34))
    assert isinstance(after(*results), End if is_bug else Restart)


def test_a_refusal_after_a_checkpoint_is_restarted_once() -> None:
    """Catches a run of weeks that ends because one host cannot read its data, and one that repeats a mistake."""
    assert after(LOST, REFUSED, saved=True) == Restart()
    assert after(REFUSED, LOST, REFUSED, saved=True) == Restart()
    assert after(LOST, REFUSED) == End()
    assert after(LOST, REFUSED, REFUSED, saved=True) == End()
    assert after(LOST, REFUSED, saved=True, max_restarts=0) == End()


def test_memory_that_runs_out_halves_the_microbatch() -> None:
    assert after(FULL) == Restart(0.0, halve_microbatch=True)
    assert isinstance(after(FULL, can_halve=False), End)
    assert after(FULL, FULL, max_restarts=1) == End("not restarted: --max_restarts=1 within an hour")
    advice = after(FULL, max_restarts=0)
    assert isinstance(advice, End)
    assert "batch.microbatch_tokens" in advice.advice


def test_a_rank_that_is_asked_to_stop_is_preempted() -> None:
    """Catches a run that ends because one of its hosts is shut down, and an endless loop if no checkpoint is saved."""
    assert after(PREEMPTED, saved=True) == Restart()
    assert after(PREEMPTED) == End()
    assert after(LaunchResult(Outcome.STOPPED, "SIGTERM before the first step", Cause.SIGNAL)) == Restart()


def test_a_full_disk_is_not_tried_again() -> None:
    """Catches exit code 2 instead of 75, because a restart on a full disk is refused."""
    assert after(LaunchResult(Outcome.STOPPED, "no checkpoint can be written", Cause.AGREED), saved=True) == End()


def test_restarts_are_counted_within_an_hour() -> None:
    assert isinstance(after(LOST, LOST, max_restarts=2), Restart)
    assert after(LOST, LOST, LOST, max_restarts=2) == End("not restarted: --max_restarts=2 within an hour")
    old = [Attempt(LOST, 0.0, saved=True) for _ in range(5)]
    assert isinstance(decide([*old, Attempt(LOST, 3600.0, saved=True)], 1, can_halve=True), Restart)
    assert after(LOST, max_restarts=0) == End()


def test_restarts_without_a_checkpoint_are_counted() -> None:
    """Catches a run that fails for weeks because each attempt takes longer than a few minutes, such as to connect."""
    slow = [Attempt(LOST, 1800.0 * number, saved=number == 3) for number in range(10)]
    assert isinstance(decide(slow, 7, can_halve=True), Restart)
    assert decide(slow, 6, can_halve=True) == End("not restarted: --max_restarts=6 without a checkpoint")


def test_failures_without_progress_wait_longer() -> None:
    waits = [after(*[LOST] * number, max_restarts=20) for number in range(1, 8)]
    assert [wait.wait_seconds for wait in waits if isinstance(wait, Restart)] == [0, 5, 10, 20, 40, 80, 120]
    assert after(*[LOST] * 7, saved=True) == Restart(0.0)


def test_a_failure_of_hosts_that_had_returned_is_not_counted() -> None:
    """Catches a run that ends, at once or after some checkpoints, because a host that is broken comes back."""
    left_out = [Attempt(result, 1.0, saved=False, left_out=["node-2"]) for result in (LOST, REFUSED)]
    assert decide(left_out[1:], 0, can_halve=True) == Restart()
    assert decide([*left_out, Attempt(LOST, 2.0, saved=False)], 1, can_halve=True) == Restart()


def test_hosts_that_return_do_not_count_as_failures() -> None:
    joins = [Attempt(PREEMPTED, float(number), saved=True, joins_hosts=True) for number in range(20)]
    assert decide(joins, 0, can_halve=True) == Restart()
    assert isinstance(decide([*joins, Attempt(LOST, 21.0, saved=True)], 1, can_halve=True), Restart)
