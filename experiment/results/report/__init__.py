"""The report of a run, a sweep or a comparison, or of several runs: one HTML page."""
