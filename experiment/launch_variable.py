"""The environment variable of processes that a launch over several hosts has started."""

LAUNCH_VARIABLE = "DEEPCLOZE_LAUNCH"
"""Names the launch as RUN-ATTEMPT: both are hexadecimal."""
