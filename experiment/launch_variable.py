"""The environment variables of processes that a launch has started."""

LAUNCH_VARIABLE = "DEEPCLOZE_LAUNCH"
"""Names the launch as RUN-ATTEMPT: both are hexadecimal. Only of a launch over several hosts."""

START_VARIABLE = "DEEPCLOZE_START"
"""When the attempt began, as time.time(). Only on the machine of the launch."""
