"""Where the figures and messages of a run go."""

from experiment.tracking.tracker import Tracker, open_trackers

__all__ = ["Tracker", "open_trackers"]
