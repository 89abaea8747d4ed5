"""What a run reports: metrics to trackers, messages to logs."""

from experiment.tracking.tracker import Tracker, open_trackers

__all__ = ["Tracker", "open_trackers"]
