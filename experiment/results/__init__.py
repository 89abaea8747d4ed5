"""What comes of runs: report pages, figures, sweeps."""
