"""What the local files of W&B, `RUN/wandb/*run-*-ID*/run-ID.wandb`, contain. Their format is that of LevelDB's log.

https://github.com/google/leveldb/blob/main/doc/log_format.md, with a header of its own and plain CRC-32.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_FILE_HEADER = 7  # bytes
_BLOCK = 32768
_HEADER = struct.Struct("<IHB")  # checksum, length, type
_FULL, _FIRST, _MIDDLE, _LAST = range(1, 5)


def last_step(folder: Path, run_id: str) -> int:
    """The largest W&B step of a run in the files of all its attempts; -1 if there is none."""
    files = list(folder.glob(f"*run-*-{run_id}*/run-{run_id}.wandb"))
    if not files:
        return -1
    from wandb.proto.wandb_internal_pb2 import Record

    steps = [-1]
    for path in files:
        for data in _read_records(path.read_bytes()):
            record = Record.FromString(data)
            steps += [json.loads(item.value_json) for item in record.history.item if _is_step(item)]
    return max(steps)


def _is_step(item: object) -> bool:
    return "_step" in (item.key, *item.nested_key)  # type: ignore[attr-defined]


def _read_records(data: bytes) -> Iterator[bytes]:
    """The records of a file, up to the first one that a killed process left incomplete."""
    record, position = b"", _FILE_HEADER
    while position + _HEADER.size <= len(data):
        if _BLOCK - position % _BLOCK < _HEADER.size:  # the rest of a block is empty
            position += _BLOCK - position % _BLOCK
            continue
        checksum, length, kind = _HEADER.unpack_from(data, position)
        position += _HEADER.size
        part = data[position : position + length]
        position += length
        if len(part) < length or zlib.crc32(bytes([kind]) + part) != checksum:
            return
        record = part if kind in (_FULL, _FIRST) else record + part
        if kind in (_FULL, _LAST):
            yield record
