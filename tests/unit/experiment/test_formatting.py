"""Text for people."""

import os
import sys
from contextlib import suppress

import pytest
from rich.table import Table

from experiment.formatting import print_table, table_console


def test_a_reader_that_has_exited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches exit code 1 in place of 141, and a comparison that failed with the message '1', because of `| head`."""
    read, write = os.pipe()
    os.close(read)
    with suppress(BrokenPipeError), open(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        with pytest.raises(BrokenPipeError):
            print_table(["a"], [["b"]])


def test_a_table_in_a_file_is_complete(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches scores and names that are cut off, in a pipe or the log of a job, to the width of a terminal."""
    monkeypatch.setenv("COLUMNS", "20")
    names = [f"my-continued-model-{number}" for number in range(12)]
    table = Table(*names)
    table.add_row(*names)
    table_console().print(table)
    printed = capsys.readouterr().out
    assert [printed.count(name + " ") for name in names] == [2] * 12
