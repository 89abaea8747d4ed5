"""Commands for sets of runs: sweeps, comparisons of initializations, and scores of the checkpoints of a run."""
