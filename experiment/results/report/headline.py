"""What a report says first: the state of a run and its most important figures."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safetensors import SafetensorError

from experiment.checkpoints import checkpoint_step, complete_checkpoints, named_best, read_state
from experiment.formatting import describe_duration
from experiment.goodput import Goodput, last_lines, read_attempt_times
from experiment.results.page import Fact, Headline, Tone
from experiment.results.report.values import best_loss, evaluated_corpora
from experiment.run_folder import RunFolder
from experiment.run_life import Life, State
from experiment.tracking.jsonl import Event, last_number
from experiment.transformers_models import count_parameters

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


def pretraining_headline(folder: RunFolder, events: Sequence[Event], goodput: Goodput | None, life: Life) -> Headline:
    """What is not known is left out."""
    state = _newest_state(folder)
    facts = [
        *_parameters(folder),
        *_progress(folder, events),
        *_tokens(events, state),
        *_losses(events),
        *_best_checkpoint(folder),
        *_device_facts(state),
        *_time_facts(goodput),
    ]
    return Headline(_state(life), _TONES[life.state], life.message, facts)


def task_headline(results: Mapping[str, Any]) -> Headline:
    """results: of results.json, which is written when all seeds are done."""
    metric, facts = results.get("metric"), []
    for split, scores in results["splits"].items():
        if metric in scores:
            found = scores[metric]
            spread = "" if found["std"] is None else f"± {found['std']:.4f} over {len(found['values'])} seeds"
            facts.append(Fact(f"{metric} on {split}", f"{found['mean']:.4f}", spread))
    if results.get("labels"):
        facts.append(Fact("Labels", f"{len(results['labels']):,}"))
    return Headline("done", "good", "", facts)


def _state(life: Life) -> str:
    return f"{life.state} on {life.host}" if life.host and life.state == "running" else life.state


def _newest_state(folder: RunFolder) -> dict[str, Any]:
    """state.json of the newest complete checkpoint; empty if there is none that can be read."""
    for checkpoint in reversed(complete_checkpoints(folder.checkpoints)):
        try:
            return read_state(checkpoint)
        except (OSError, ValueError):  # being copied, or deleted
            continue
    return {}


def _parameters(folder: RunFolder) -> Iterator[Fact]:
    for checkpoint in reversed(complete_checkpoints(folder.checkpoints)):
        try:
            count = count_parameters(checkpoint / "hf")
        except (OSError, ValueError, SafetensorError):
            continue
        if count:
            yield Fact("Parameters", scaled(count), f"{count:,}")
            return


def _progress(folder: RunFolder, events: Sequence[Event]) -> Iterator[Fact]:
    attempts = last_lines(read_attempt_times(folder))
    total = attempts[-1].total_steps if attempts else None
    step = max((event["step"] for event in events), default=None)
    if step is not None:
        note = "" if not total else f"of {total:,}, {step / total:.0%}"
        yield Fact("Steps", f"{step:,}", note)


def _tokens(events: Sequence[Event], state: Mapping[str, Any]) -> Iterator[Fact]:
    tokens = last_number(events, "tokens")
    if tokens is None:
        return
    yield Fact("Tokens", scaled(tokens), f"{tokens:,.0f}")
    try:
        train = state["corpora"]["train"]
        if len(train) == 1:
            yield Fact("Epochs", f"{tokens / train[0]['tokens']:.2f}", f"of {train[0]['name']}")
        else:
            yield Fact("Corpora", f"{len(train)}", ", ".join(corpus["name"] for corpus in train))
    except (KeyError, TypeError, ZeroDivisionError):  # no checkpoint yet, or one of an older version
        return


def _losses(events: Sequence[Event]) -> Iterator[Fact]:
    for corpus in evaluated_corpora(events)[:1]:
        if best := best_loss(events, corpus):
            yield Fact("Best held-out loss", f"{best[0]:.4f}", f"{corpus}, step {best[1]:,}")
    loss = last_number(events, "loss")
    if loss is not None:
        yield Fact("Training loss", f"{loss:.4f}", "last log event")


def _best_checkpoint(folder: RunFolder) -> Iterator[Fact]:
    try:
        best = named_best(folder.checkpoints)
        if best is not None:
            yield Fact("Best checkpoint", f"{checkpoint_step(best):,}", "step")
    except (OSError, ValueError):
        return


def _device_facts(state: Mapping[str, Any]) -> Iterator[Fact]:
    if precision := state.get("precision"):
        yield Fact("Precision", str(precision))


def _time_facts(goodput: Goodput | None) -> Iterator[Fact]:
    if goodput is not None:
        attempts = f"{goodput.attempts} attempt{'' if goodput.attempts == 1 else 's'}"
        yield Fact("Duration", describe_duration(goodput.wall_clock), attempts)
        yield Fact("Goodput", f"{goodput.share:.1%}", "time spent on new steps")


def scaled(count: float) -> str:
    """'29.6M' for 29,612,345."""
    for size, letter in _SCALES:
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:,.0f}"
