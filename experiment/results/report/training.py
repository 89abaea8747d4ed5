"""The section of a report about one training run: tables and charts from its metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path

from experiment.formatting import format_perplexity
from experiment.results.charts import Mark, Plot, charts_block, x_axis
from experiment.results.page import Block, Heading, Table
from experiment.results.plots import INK, Line, Panel
from experiment.results.report.values import (
    UNKNOWN,
    best_loss,
    curve,
    evaluated_corpora,
    median,
    show,
)
from experiment.run_folder import RunFolder
from experiment.tracking.jsonl import Event, last_number, read_events

SPEED, WAIT = "Tokens per second, all ranks, without padding", "Time spent waiting for data"
NORM, RATE = "Gradient norm before clipping", "Learning rate"


def training_blocks(
    folder: RunFolder, directory: Path, prefix: str = "", held_out: bool = True, marks: Sequence[Mark] = ()
) -> list[Block]:
    """Final metrics and curves from RUN/metrics.jsonl; empty without events.

    held_out: whether to show evaluations too. Images are written to `directory`; `prefix` keeps the images of several
    runs on one page apart.
    """
    events = read_events(folder.metrics)
    if not events:
        return []
    corpora = evaluated_corpora(events) if held_out else []
    blocks: list[Block] = [Heading("Training")]
    reached = max(event["step"] for event in events)
    shown = [mark for mark in marks if mark.step <= reached]  # later stages are in the config already
    blocks += charts_block(training_plots(events, corpora), directory, [x_axis(events)], shown, prefix)
    if corpora:
        blocks += [Heading("Held-out text"), held_out_table(events, corpora)]
    return [*blocks, Heading("Speed and memory"), training_table(events)]


def training_plots(events: Sequence[Event], corpora: Sequence[str]) -> list[Plot]:
    loss = [_training_line(events, "loss", color=INK), *_held_out_lines(events, corpora, "loss")]
    perplexity = Panel("perplexity", _held_out_lines(events, corpora, "perplexity"), "log")
    accuracy = Panel("accuracy", _held_out_lines(events, corpora, "accuracy"), percent=True)
    rate = Panel("learning rate", [Line("learning rate", *curve(events, "lr"))])
    norm = Panel("gradient norm", [_training_line(events, "grad_norm")], "log")
    speed = Panel("tokens/s", [_training_line(events, "tokens_per_second")], from_zero=True)
    wait = Panel("data wait", [_training_line(events, "data_wait")], percent=True, from_zero=True)
    return [
        Plot("loss", [("Loss", Panel("loss", loss))]),
        Plot("perplexity", [("Perplexity on held-out text", perplexity)]),
        Plot("accuracy", [("Accuracy on held-out text", accuracy)]),
        Plot("learning-rate", [(RATE, rate)]),
        Plot("gradient-norm", [(NORM, norm)]),
        Plot("throughput", [(SPEED, speed), (WAIT, wait)]),
    ]


def _training_line(events: Sequence[Event], key: str, color: str | None = None) -> Line:
    return Line("training", *curve(events, key), smoothed=True, color=color)


def _held_out_lines(events: Sequence[Event], corpora: Sequence[str], metric: str) -> list[Line]:
    return [Line(corpus, *curve(events, f"eval/{corpus}/{metric}"), marked=True) for corpus in corpora]


def held_out_table(events: Sequence[Event], corpora: Sequence[str]) -> Table:
    """One row per corpus: loss, perplexity and accuracy at the last evaluation, and the best loss with its step."""
    rows = []
    for corpus in corpora:
        found = [last_number(events, f"eval/{corpus}/{metric}") for metric in ("loss", "perplexity", "accuracy")]
        best = best_loss(events, corpus)
        rows.append(
            [corpus, show(found[0], ".4f"), format_perplexity(found[1]), show(found[2], ".1%")]
            + ([f"{best[0]:.4f}", f"{best[1]:,}"] if best else [UNKNOWN, UNKNOWN])
        )
    return without_empty_columns(["corpus", "loss", "perplexity", "accuracy", "best loss", "at step"], rows)


def training_table(events: Sequence[Event]) -> Table:
    """One row: steps, tokens, loss, speed and memory. Speed, MFU and data wait are medians over the log events."""
    memory = max(curve(events, "memory")[1], default=None)
    row = [
        f"{max(event['step'] for event in events):,}",
        show(last_number(events, "tokens"), ",.0f"),
        show(last_number(events, "loss"), ".4f"),
        show(median(events, "tokens_per_second"), ",.0f"),
        show(median(events, "mfu"), ".1%"),
        show(median(events, "data_wait"), ".1%"),
        UNKNOWN if memory is None else f"{memory / 2**30:.2f} GiB",
    ]
    return without_empty_columns(["steps", "tokens", "last loss", "tokens/s", "MFU", "data wait", "peak memory"], [row])


def without_empty_columns(columns: Sequence[str], rows: Sequence[Sequence[str]], labels: int = 1) -> Table:
    shown = [index for index in range(len(columns)) if any(row[index] != UNKNOWN for row in rows)]
    return Table([columns[index] for index in shown], [[row[index] for index in shown] for row in rows], labels=labels)
