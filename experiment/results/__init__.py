"""Report pages, charts, summaries of sweeps, and model cards."""
