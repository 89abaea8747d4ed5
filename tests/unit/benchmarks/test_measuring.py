import subprocess
import sys
import time

from benchmarks.measuring import PeakMemory

MEMORY = 400 * 2**20
FORKING = f"""
import os, sys
held = bytes(range(256)) * ({MEMORY} // 256)
if os.fork() == 0:
    print("holds it", flush=True)
sys.stdin.read()
"""
STARTING = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {FORKING!r}])"


def test_processes_of_processes_count_and_shared_pages_only_once() -> None:
    """Catches the memory of ranks that is missed because a launcher started them, and pages counted twice after a
    fork."""
    with PeakMemory(seconds=0.01) as memory:
        process = subprocess.Popen([sys.executable, "-c", STARTING], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        memory.bytes = 0  # measured before the fork
        while memory.bytes < MEMORY:
            assert process.poll() is None
            time.sleep(0.01)
        process.communicate()
    assert memory.bytes < 1.5 * MEMORY
