"""What a run reports: metrics to trackers, messages to logs."""

from experiment.tracking.tracker import TrackedRun, Tracker, check_tracking, open_trackers

__all__ = ["TrackedRun", "Tracker", "check_tracking", "open_trackers"]
