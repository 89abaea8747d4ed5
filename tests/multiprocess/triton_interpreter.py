"""Triton's kernels without a GPU."""

import os
import sys


def interpret_kernels(_: object) -> None:
    """Let Triton interpret its kernels in this process. It decides when it is imported, so it is imported again."""
    os.environ["TRITON_INTERPRET"] = "1"
    for name in list(sys.modules):
        if name.split(".")[0] == "triton" and not name.startswith("triton._C"):
            del sys.modules[name]
