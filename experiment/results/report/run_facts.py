"""The headline of a report: the state and figures of a run. And the sections on its time, machines and config."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from experiment.errors import UserError
from experiment.formatting import UNKNOWN, counted, describe_duration
from experiment.models.transformers_models import count_parameters
from experiment.results.history import History
from experiment.results.page import Block, Code, Fact, Heading, Headline, Table, Text, Tone
from experiment.results.report.run import Run
from experiment.run_files.checkpoints import COMPLETE, checkpoint_step, complete_checkpoints, named_best, read_state
from experiment.run_files.goodput import add_up, last_lines
from experiment.run_files.provenance import describe_commit, describe_devices, read_provenance
from experiment.run_files.run_folder import RunFolder
from experiment.run_files.run_life import State

_TONES: Mapping[State, Tone] = {
    "running": "busy",
    "done": "good",
    "stopped": "warn",
    "failed": "bad",
    "killed": "bad",
    "refused": "bad",
    "unknown": "plain",
    "not started": "plain",
}
_SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_LIBRARIES = ("deepcloze", "torch", "deepspeed", "transformers")
_ATTEMPT_COLUMNS = ("started", "host", "ranks", "commit", "device", *_LIBRARIES)


def training_headline(run: Run) -> Headline:
    """Return the headline of a pretraining run, or of an unfinished fine-tuning run. Omits unknown facts."""
    state = _newest(run.folder, read_state) or {}
    facts = [
        *_parameters(run.folder),
        *_seeds(run),
        *_progress(run),
        *_tokens(run.history, state),
        *_losses(run.history),
        *_checkpoints(run),
        *_precision(state),
        *_time_facts(run),
    ]
    return _headline(run, facts)


def task_headline(run: Run, results: Mapping[str, Any]) -> Headline:
    """Return the headline of a fine-tuning run. results: of results.json, which an earlier command may have written."""
    metric, facts = results.get("metric"), []
    for split, scores in results["splits"].items():
        if metric in scores:
            found = scores[metric]
            spread = "" if found["std"] is None else f"± {found['std']:.4f} over {len(found['values'])} seeds"
            facts.append(Fact(f"{metric} on {split}", f"{found['mean']:.4f}", spread))
    if results.get("labels"):
        facts.append(Fact("Labels", f"{len(results['labels']):,}"))
    return _headline(run, facts)


def _headline(run: Run, facts: Sequence[Fact]) -> Headline:
    return Headline(*describe_state(run), "" if run.life is None else run.life.message, facts)


def describe_state(run: Run) -> tuple[str, Tone]:
    """Describe the state, 'running on node-1, as of 2026-11-20 09:20 UTC', and its tone. A followed page shows the
    time elsewhere."""
    if (life := run.life) is None:
        return "not known yet", "plain"
    if life.state != "running":
        return life.state, _TONES[life.state]
    host = f" on {life.host}" if life.host else ""
    time = f", as of {datetime.now(UTC):%Y-%m-%d %H:%M} UTC" if not run.followed else ""
    return f"running{host}{time}", _TONES["running"]


def _newest(folder: RunFolder, read: Callable[[Path], Any]) -> Any:
    """Read something of the newest complete checkpoint that has it; None if none can be read."""
    for checkpoint in reversed(complete_checkpoints(folder.checkpoints)):
        with suppress(OSError, ValueError, SafetensorError):  # being copied, or deleted
            if found := read(checkpoint):
                return found
    return None


def _parameters(folder: RunFolder) -> Iterator[Fact]:
    if count := _newest(folder, lambda checkpoint: count_parameters(checkpoint / "hf")):
        yield Fact("Parameters", scaled(count), f"{count:,}")


def _seeds(run: Run) -> Iterator[Fact]:
    with suppress(KeyError, TypeError):
        seeds = run.config["training"]["seeds"]
        yield Fact("Seeds", f"{len(run.folder.finished_seeds.keys() & {*seeds})}", f"finished of {len(seeds)}")


def _progress(run: Run) -> Iterator[Fact]:
    total = last_lines(run.attempt_times)[-1].total_steps if run.attempt_times else None
    if run.history.seeds:
        step = run.step
        note = "" if not total else f"of {total:,}, {step / total:.0%}"
        yield Fact("Steps", f"{step:,}", note)


def _tokens(history: History, state: Mapping[str, Any]) -> Iterator[Fact]:
    if (tokens := history.last("tokens")) is None:
        return
    yield Fact("Tokens", scaled(tokens), f"{tokens:,.0f}")
    try:
        if len(train := state["corpora"]["train"]) == 1:
            name, by_corpus = train[0]["name"], state.get("progress", {}).get("tokens_by_corpus", {})
            parents = sum(count for corpus, count in by_corpus.items() if corpus != name)  # of a fork
            yield Fact("Epochs", f"{(tokens - parents) / state['tokens_per_epoch'][name]:.2f}", f"of {name}")
        else:
            yield Fact("Corpora", f"{len(train)}", ", ".join(corpus["name"] for corpus in train))
    except (KeyError, TypeError, ZeroDivisionError):  # no checkpoint yet, or one of an older version
        return


def _losses(history: History) -> Iterator[Fact]:
    for corpus in history.corpora[:1]:
        if best := history.best_loss(corpus):
            note = corpus if best[1] is None else f"{corpus}, step {best[1]:,}"
            yield Fact("Best held-out loss", f"{best[0]:.4f}", note)
    if (loss := history.last("loss")) is not None:
        yield Fact("Training loss", f"{loss:.4f}", "last log event")


def _checkpoints(run: Run) -> Iterator[Fact]:
    with suppress(OSError, ValueError, IndexError):  # being copied or deleted; IndexError: there is none
        last = run.checkpoints[-1]
        saved = datetime.fromtimestamp((last / COMPLETE).stat().st_mtime, UTC)
        yield Fact("Last checkpoint", f"{checkpoint_step(last):,}", f"{saved:%Y-%m-%d %H:%M} UTC")
    with suppress(OSError, ValueError):
        if (best := named_best(run.folder.checkpoints)) is not None:
            yield Fact("Best checkpoint", f"{checkpoint_step(best):,}", "step")


def _precision(state: Mapping[str, Any]) -> Iterator[Fact]:
    if precision := state.get("precision"):
        yield Fact("Precision", str(precision))


def _time_facts(run: Run) -> Iterator[Fact]:
    if run.attempt_times:
        goodput = add_up(run.attempt_times)
        yield Fact("Duration", describe_duration(goodput.wall_clock), counted(goodput.attempts, "attempt"))
        yield Fact("Goodput", f"{goodput.share:.1%}", "time spent on new steps")


def scaled(count: float) -> str:
    """Shorten a number: '29.6M' for 29,612,345."""
    for size, letter in _SCALES:
        if count >= 0.9995 * size:  # three digits are rounded up to the next unit
            return f"{count / size:.3g}{letter}"
    return f"{count:,.0f}"


def goodput_blocks(run: Run) -> list[Block]:
    """Return the time of the run's attempts by activity; empty if none has recorded it."""
    if not run.attempt_times:
        return []
    goodput = add_up(run.attempt_times)
    rows = [
        [activity, describe_duration(seconds), f"{seconds / max(goodput.wall_clock, 1e-9):.1%}"]
        for activity, seconds in goodput.seconds.items()
        if seconds
    ]
    total = ["all", describe_duration(goodput.wall_clock), "100.0%"]
    return [
        Heading("Time"),
        Table(["activity", "time", "share"], [*rows, total], f"Wall clock of {counted(goodput.attempts, 'attempt')}"),
    ]


def provenance_blocks(folder: RunFolder) -> list[Block]:
    """Return the attempts at the run with their machines and library versions, and the config."""
    blocks: list[Block] = []
    try:
        provenance = read_provenance(folder)
        rows = [_attempt_row(attempt) for attempt in provenance["attempts"]] if provenance else []
    except (UserError, AttributeError, LookupError, TypeError):  # the folder is being copied
        blocks, provenance = [Heading("Provenance"), Text(f"{folder.provenance} is damaged")], None
    if provenance:
        blocks += [
            Heading("Provenance"),
            Table(_ATTEMPT_COLUMNS, rows, labels=len(_ATTEMPT_COLUMNS)),
            Code("provenance.json", json.dumps(provenance, indent=2, ensure_ascii=False)),
        ]
    if folder.config.is_file():
        blocks += [Heading("Config"), Code("config.yaml", folder.config.read_text(encoding="utf-8", errors="replace"))]
    return blocks


def _attempt_row(attempt: Mapping[str, Any]) -> list[str]:
    """Return a row. `attempt`: as in provenance.json; keys that an older version did not write are unknown."""
    commit, versions = describe_commit(attempt), attempt.get("versions", {})
    date = str(attempt.get("date", UNKNOWN)).replace("T", " ").replace("+00:00", " UTC")
    libraries = [str(versions.get(name) or UNKNOWN) for name in _LIBRARIES]
    host, ranks = (str(attempt.get(key, UNKNOWN)) for key in ("host", "world_size"))
    return [date, host, ranks, commit, describe_devices(attempt.get("hardware", {})), *libraries]
