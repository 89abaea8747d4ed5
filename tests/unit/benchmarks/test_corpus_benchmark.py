import sys

from benchmarks.corpus import _watch


def test_a_contestant_may_print_much() -> None:
    """Catches a process that waits forever because nobody reads what it prints: a pipe holds 64 KiB."""
    _, _, printed = _watch([sys.executable, "-c", "print('x' * 200_000)"], {})
    assert len(printed) == 200_001
