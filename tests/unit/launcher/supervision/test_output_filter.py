import subprocess
import sys

import pytest

from launcher.supervision.output_filter import filtered_output, is_noise


@pytest.mark.parametrize(
    ("line", "noise"),
    [
        (b"node-2: [2026-11-21 00:03:50,219] [INFO] [launch.py:152:main] WORLD INFO DICT: {'node-1': [0]}\n", True),
        (b"[2026-11-21 00:03:32,555] [WARNING] [real_accelerator.py:213:get_accelerator] Setting\n", True),
        (
            b"node-1: [W1121 socket.cpp:207] [c10d] The hostname of the client socket cannot be retrieved\n",
            True,
        ),
        (b"node-2: [2026-11-21 00:03:50,219] [ERROR] [launch.py:152:main] no such GPU\n", False),
        (b"node-1: step 1/1000 \xc2\xb7 loss 5.3\n", False),
        (b"\n", False),
    ],
)
def test_only_what_tells_nothing_is_removed(line: bytes, noise: bool) -> None:
    assert is_noise(line) == noise


def test_both_streams_are_printed(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Catches lost or reordered output, and a last line without its end."""
    code = "import sys; print('a'); print('b', file=sys.stderr); print('c', end='')"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with filtered_output(process):
        process.wait()
    assert capfdbinary.readouterr() == (b"a\nc", b"b\n")
