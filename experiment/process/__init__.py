"""This process: imports, signals, cores and devices."""
