"""The sections of a report about how a run was made: its time, machines, versions and config."""

import json
from collections.abc import Mapping
from typing import Any

import yaml

from experiment.config.yaml_dialect import read_yaml
from experiment.errors import UserError
from experiment.formatting import describe_duration
from experiment.goodput import Goodput
from experiment.provenance import read_provenance
from experiment.results.page import Block, Code, Heading, Table, Text
from experiment.results.report.values import UNKNOWN
from experiment.run_folder import RunFolder

_LIBRARIES = ("torch", "deepspeed", "transformers")
_ATTEMPT_COLUMNS = ("started", "host", "ranks", "commit", "device", *_LIBRARIES)


def goodput_blocks(goodput: Goodput | None) -> list[Block]:
    """How the attempts at the run have spent their time; empty if none has recorded it."""
    if goodput is None:
        return []
    rows = [
        [activity, describe_duration(seconds), f"{seconds / max(goodput.wall_clock, 1e-9):.1%}"]
        for activity, seconds in goodput.seconds.items()
        if seconds
    ]
    attempts = f"{goodput.attempts} attempt{'' if goodput.attempts == 1 else 's'}"
    total = ["all", describe_duration(goodput.wall_clock), "100.0%"]
    return [Heading("Time"), Table(["activity", "time", "share"], [*rows, total], f"Wall clock of {attempts}")]


def provenance_blocks(folder: RunFolder) -> list[Block]:
    """The attempts at the run with their machines and library versions, and the config."""
    blocks: list[Block] = []
    try:
        provenance = read_provenance(folder)
    except UserError as error:  # the folder is being copied
        blocks, provenance = [Heading("Provenance"), Text(str(error))], None
    if provenance:
        rows = [_attempt_row(attempt) for attempt in provenance["attempts"]]
        blocks += [
            Heading("Provenance"),
            Table(_ATTEMPT_COLUMNS, rows, labels=len(_ATTEMPT_COLUMNS)),
            Code("provenance.json", json.dumps(provenance, indent=2, ensure_ascii=False)),
        ]
    if folder.config.is_file():
        blocks += [Heading("Config"), Code("config.yaml", folder.config.read_text(encoding="utf-8", errors="replace"))]
    return blocks


def read_run_config(folder: RunFolder) -> dict[str, Any]:
    """RUN/config.yaml as nested values; empty if it cannot be read."""
    try:
        config = read_yaml(folder.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _attempt_row(attempt: Mapping[str, Any]) -> list[str]:
    """`attempt`: as in provenance.json; keys that an older version did not write are unknown."""
    git, versions = attempt.get("git"), attempt.get("versions", {})
    commit = f"{git['commit'][:10]}{' (changed)' if git['dirty'] else ''}" if git else UNKNOWN
    date = str(attempt.get("date", UNKNOWN)).replace("T", " ").replace("+00:00", " UTC")
    libraries = [str(versions.get(name) or UNKNOWN) for name in _LIBRARIES]
    host, ranks = (str(attempt.get(key, UNKNOWN)) for key in ("host", "world_size"))
    return [date, host, ranks, commit, _device(attempt.get("hardware", {})), *libraries]


def _device(hardware: Mapping[str, Any]) -> str:
    if gpus := hardware.get("gpus"):
        return f"{len(gpus)} × {gpus[0]}"
    return f"{hardware.get('cores', UNKNOWN)} cores, {hardware.get('cpu', UNKNOWN)}"
