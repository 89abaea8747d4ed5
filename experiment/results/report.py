"""The report of a run: curves as PNG, a page with them, the final figures, the config and the provenance."""

import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiment.errors import UserError
from experiment.provenance import read_provenance
from experiment.results.figures import INK, Line, Panel, draw_panels
from experiment.results.page import Block, Code, Figure, Heading, Table, Text, write_page
from experiment.run_folder import RunFolder
from experiment.tracking.jsonl import read_events

UNKNOWN = "–"
Events = Sequence[dict[str, Any]]


def write_report(run: str | Path) -> Path:
    """Write RUN/report/ with index.html and its images, return the path of index.html.

    Raises UserError for a folder that is no run, or a run that has logged nothing yet.
    """
    folder = RunFolder(Path(run).absolute())
    if not folder.path.is_dir():
        raise UserError(f"there is no run folder {folder.path}")
    blocks = [*result_blocks(folder, folder.report), *training_blocks(folder, folder.report)]
    if not blocks:
        raise UserError(
            f"{folder.path} has nothing to report: neither results.json nor an event in {folder.metrics.name}"
        )
    return write_page(folder.report, folder.path.name, [*blocks, *origin_blocks(folder)])


def training_blocks(folder: RunFolder, directory: Path, prefix: str = "") -> list[Block]:
    """Final figures and curves of the events in RUN/metrics.jsonl; none without events.

    The images go to `directory`, their names begin with `prefix`: a page may show several runs.
    """
    events = read_events(folder.metrics)
    if not events:
        return []
    blocks: list[Block] = []
    if corpora := evaluated_corpora(events):
        blocks += [Heading("Held-out text"), held_out_table(events, corpora)]
    blocks += [Heading("Training"), training_table(events)]
    training = Line("training", *_curve(events, "loss"), smoothed=True, colour=INK)
    plots = [
        (
            "loss",
            "Loss: every log event (pale) and its moving average, and on held-out text",
            [Panel("loss", [training, *_held_out(events, corpora, "loss")])],
        ),
        (
            "perplexity",
            "Perplexity of held-out text",
            [Panel("perplexity", _held_out(events, corpora, "perplexity"), "log")],
        ),
        (
            "accuracy",
            "Accuracy on held-out text",
            [Panel("accuracy", _held_out(events, corpora, "accuracy"), percent=True)],
        ),
        ("learning-rate", "Learning rate", [Panel("learning rate", [Line("lr", *_curve(events, "lr"))])]),
        (
            "gradient-norm",
            "Gradient norm before clipping",
            [Panel("gradient norm", [Line("norm", *_curve(events, "grad_norm"), smoothed=True)])],
        ),
        (
            "throughput",
            "Real tokens per second of all ranks, and the share of the time spent waiting for data",
            [
                Panel(
                    "tokens/s",
                    [Line("tokens/s", *_curve(events, "tokens_per_second"), smoothed=True)],
                    from_zero=True,
                ),
                Panel(
                    "data wait",
                    [Line("wait", *_curve(events, "data_wait"), smoothed=True)],
                    percent=True,
                    from_zero=True,
                ),
            ],
        ),
    ]
    for name, caption, panels in plots:
        shown = [panel for panel in panels if any(line.x for line in panel.lines)]
        if shown:
            file = f"{prefix}{name}.png"
            draw_panels(directory / file, shown)
            blocks.append(Figure(file, caption))
    return blocks


def result_blocks(folder: RunFolder, directory: Path, prefix: str = "") -> list[Block]:
    """Scores and images of a fine-tuning run (RUN/results.json); none for a run that is none."""
    path = folder.path / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        rows = [
            [split, metric, *(f"{scores[key]:.4f}" for key in ("mean", "std", "median")), _values(scores["values"])]
            for split, metrics in results["splits"].items()
            for metric, scores in metrics.items()
        ]
        subject = f"{results['task']}, from {results['init']}"
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: expected 'task', 'init' and 'splits' with scores") from None
    blocks: list[Block] = [
        Heading("Task"),
        Text(subject),
        Table(["split", "metric", "mean", "std", "median", "per seed"], rows, labels=2),
    ]
    for name, caption in (("confusion.png", "Confusion matrix"), ("curves.png", "Scores by epoch")):
        if (folder.path / name).is_file():
            directory.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.path / name, directory / f"{prefix}{name}")
            blocks.append(Figure(f"{prefix}{name}", caption))
    return blocks


def origin_blocks(folder: RunFolder) -> list[Block]:
    """Where the run comes from: attempts, machine and libraries, and the config."""
    blocks: list[Block] = []
    if provenance := read_provenance(folder):
        rows = [_attempt_row(attempt) for attempt in provenance["attempts"]]
        blocks += [
            Heading("Provenance"),
            Table(
                ["started", "host", "ranks", "commit", "device", "torch", "deepspeed", "transformers"], rows, labels=8
            ),
            Code("provenance.json", json.dumps(provenance, indent=2, ensure_ascii=False)),
        ]
    if folder.config.is_file():
        blocks += [Heading("Config"), Code("config.yaml", folder.config.read_text(encoding="utf-8"))]
    return blocks


def evaluated_corpora(events: Events) -> list[str]:
    """The names of the corpora that were evaluated, in the order of their first evaluation."""
    keys = [key for event in events for key in event if key.startswith("eval/")]
    return list(dict.fromkeys(key.removeprefix("eval/").rsplit("/", 1)[0] for key in keys))


def held_out_table(events: Events, corpora: Sequence[str]) -> Table:
    """Loss, perplexity and accuracy of each corpus at its last evaluation, and where its loss was least."""
    rows = []
    for corpus in corpora:
        steps, losses = _curve(events, f"eval/{corpus}/loss")
        figures = [_last(events, f"eval/{corpus}/{metric}") for metric in ("loss", "perplexity", "accuracy")]
        best = min(zip(losses, steps, strict=True), default=None)
        rows.append(
            [corpus, _figure(figures[0], ".4f"), _figure(figures[1], ".2f"), _figure(figures[2], ".1%")]
            + ([f"{best[0]:.4f}", f"{best[1]:,}"] if best else [UNKNOWN, UNKNOWN])
        )
    return _without_empty_columns(["corpus", "loss", "perplexity", "accuracy", "least loss", "at step"], rows)


def training_table(events: Events) -> Table:
    """One row: how long, how far and how fast the run trained. Speed is the median of the log events."""
    speeds, waits, mfus = (_curve(events, key)[1] for key in ("tokens_per_second", "data_wait", "mfu"))
    memory = max(_curve(events, "memory")[1], default=None)
    row = [
        f"{max(event['step'] for event in events):,}",
        _figure(_last(events, "tokens"), ",.0f"),
        _figure(_last(events, "loss"), ".4f"),
        _figure(statistics.median(speeds) if speeds else None, ",.0f"),
        _figure(statistics.median(mfus) if mfus else None, ".1%"),
        _figure(statistics.median(waits) if waits else None, ".1%"),
        UNKNOWN if memory is None else f"{memory / 2**30:.2f} GiB",
    ]
    return _without_empty_columns(
        ["steps", "tokens", "last loss", "tokens/s", "MFU", "data wait", "peak memory"], [row]
    )


def _without_empty_columns(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    shown = [index for index in range(len(columns)) if any(row[index] != UNKNOWN for row in rows)]
    return Table([columns[index] for index in shown], [[row[index] for index in shown] for row in rows])


def _held_out(events: Events, corpora: Sequence[str], metric: str) -> list[Line]:
    return [Line(corpus, *_curve(events, f"eval/{corpus}/{metric}"), marked=True) for corpus in corpora]


def _curve(events: Events, key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the events that have a value for `key`."""
    points = [(event["step"], event[key]) for event in events if event.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _last(events: Events, key: str) -> float | None:
    values = _curve(events, key)[1]
    return values[-1] if values else None


def _figure(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def _values(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _attempt_row(attempt: dict[str, Any]) -> list[str]:
    git, hardware, versions = attempt.get("git"), attempt.get("hardware", {}), attempt.get("versions", {})
    commit = f"{git['commit'][:10]}{' (changed)' if git['dirty'] else ''}" if git else UNKNOWN
    gpus = hardware.get("gpus") or []
    device = (
        f"{len(gpus)} × {gpus[0]}"
        if gpus
        else f"{hardware.get('cores', UNKNOWN)} cores, {hardware.get('cpu', UNKNOWN)}"
    )
    date = str(attempt.get("date", UNKNOWN)).replace("T", " ").replace("+00:00", " UTC")
    libraries = [str(versions.get(name) or UNKNOWN) for name in ("torch", "deepspeed", "transformers")]
    host, ranks = (str(attempt.get(key, UNKNOWN)) for key in ("host", "world_size"))
    return [date, host, ranks, commit, device, *libraries]
