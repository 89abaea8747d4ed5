"""Reports of a run: metrics to trackers, messages to logs."""

from experiment.tracking.tracker import TrackedRun, Tracker, Trackers, check_tracking, open_trackers

__all__ = ["TrackedRun", "Tracker", "Trackers", "check_tracking", "open_trackers"]
