"""The environment variables of processes that a launch has started."""

LAUNCH_VARIABLE = "DEEPCLOZE_LAUNCH"
"""Names the launch as RUN-ATTEMPT: both are hexadecimal. Only of a launch over several hosts."""

START_VARIABLE = "DEEPCLOZE_START"
"""When the attempt began, as time.time(). Only on the machine of the launch."""

GATE_VARIABLE = "DEEPCLOZE_GATE"
"""A file. The ranks wait for it after their imports: meanwhile the launch checks the config. Only on the machine of the
launch."""
