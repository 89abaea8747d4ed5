"""Reports of a run: metrics to trackers, messages to logs."""
