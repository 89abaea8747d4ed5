"""How long this process has compiled code with `torch.compile`."""

import sys


def compile_seconds() -> float:
    """So far, in wall clock: 0 until something is compiled."""
    if "torch._dynamo.utils" not in sys.modules:  # importing it takes seconds
        return 0.0
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent().get("total_wall_time", 0.0)
