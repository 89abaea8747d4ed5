import struct
import zlib
from pathlib import Path

import pytest

from experiment.tracking.weights_and_biases import _read_records

HEADER = b":W&B\xe1\xbe\x00"


def log(*records: bytes) -> bytes:
    """A file of these records, as the description of LevelDB's format says."""
    data = bytearray(HEADER)
    for record in records:
        first = True
        while first or record:
            left = 32768 - len(data) % 32768
            if left < 7:
                data += bytes(left)
                continue
            part, record = record[: left - 7], record[left - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not record]
            data += struct.pack("<IHB", zlib.crc32(bytes([kind]) + part), len(part), kind) + part
            first = False
    return bytes(data)


RECORDS = [b"a", b"b" * 100_000, b"", b"c" * (32768 - 20), b"d" * 40]


def test_records_are_read_across_blocks() -> None:
    """Catches a reader that stops, or is wrong, where a record does not fit into a block."""
    assert list(_read_records(log(*RECORDS))) == RECORDS
    for size in range(32768 - 30, 32768 + 5):
        records = [b"x" * size, b"end"]
        assert list(_read_records(log(*records))) == records


@pytest.mark.parametrize("lost", [1, 41, 1000, 99_000])
def test_a_file_that_was_cut_off_is_read_up_to_there(lost: int) -> None:
    """Catches a run that does not resume offline after a power cut."""
    data = log(*RECORDS)[:-lost]
    read = list(_read_records(data))
    assert read == RECORDS[: len(read)]
    assert len(read) < len(RECORDS)


def test_a_damaged_file_is_read_up_to_there(tmp_path: Path) -> None:
    """Catches damage that is taken for a row."""
    data = bytearray(log(b"first", b"second"))
    data[-1] ^= 1
    assert list(_read_records(bytes(data))) == [b"first"]
