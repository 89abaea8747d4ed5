"""The report of a run: an HTML page with curves, final metrics, the config and the provenance."""

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from experiment.errors import UserError
from experiment.goodput import read_goodput
from experiment.provenance import read_provenance
from experiment.results.comparison import comparison_blocks
from experiment.results.page import Block, Code, Figure, Heading, Table, Text, write_page
from experiment.results.plots import INK, Line, Panel, draw_panels
from experiment.run_folder import RunFolder
from experiment.strict_json import parse_json
from experiment.tracking.console import describe_duration
from experiment.tracking.downstream import DownstreamResult, read_results
from experiment.tracking.jsonl import Event, read_events

UNKNOWN = "–"
_LABEL_SCORES = ("precision", "recall", "f1")
_LIBRARIES = ("torch", "deepspeed", "transformers")
_ATTEMPT_COLUMNS = ("started", "host", "ranks", "commit", "device", *_LIBRARIES)


@dataclass(frozen=True)
class _Plot:
    """One image of the page. Panels without data are not drawn."""

    name: str
    caption: str
    panels: Sequence[Panel]


def write_report(run: str | Path) -> Path:
    """Write RUN/report/index.html and its images; return the path of the page.

    Raises UserError if the folder is not a run, or the run has not logged anything yet.
    """
    folder = RunFolder(Path(run).absolute())
    if not folder.path.is_dir():
        raise UserError(f"there is no run folder {folder.path}")
    results = result_blocks(folder, folder.report)  # of fine-tuning: they show the evaluations of each seed
    training = training_blocks(folder, folder.report, held_out=not results)
    downstream = downstream_blocks(folder, folder.report)
    blocks = [*compare_blocks(folder), *results, *training, *goodput_blocks(folder), *downstream]
    if not blocks:
        raise UserError(
            f"{folder.path} has nothing to report: neither results.json, compare.json nor an event in "
            f"{folder.metrics.name}"
        )
    return write_page(folder.report, folder.path.name, [*blocks, *provenance_blocks(folder)])


def training_blocks(folder: RunFolder, directory: Path, prefix: str = "", held_out: bool = True) -> list[Block]:
    """Final metrics and curves from RUN/metrics.jsonl; empty without events.

    held_out: whether to show evaluations too. Images are written to `directory`; `prefix` keeps the images of several
    runs on one page apart.
    """
    events = read_events(folder.metrics)
    if not events:
        return []
    blocks: list[Block] = []
    corpora = evaluated_corpora(events) if held_out else []
    if corpora:
        blocks += [Heading("Held-out text"), held_out_table(events, corpora)]
    blocks += [Heading("Training"), training_table(events)]
    for plot in _plots(events, corpora):
        shown = [panel for panel in plot.panels if any(line.x for line in panel.lines)]
        if shown:
            file = f"{prefix}{plot.name}.png"
            draw_panels(directory / file, shown)
            blocks.append(Figure(file, plot.caption))
    return blocks


def _plots(events: Sequence[Event], corpora: Sequence[str]) -> list[_Plot]:
    loss = [_training_line(events, "loss", color=INK), *_held_out_lines(events, corpora, "loss")]
    loss_caption = "Training loss (pale: each log event; solid: moving average)"
    loss_caption += " and loss on held-out text" if corpora else ""
    perplexity = Panel("perplexity", _held_out_lines(events, corpora, "perplexity"), "log")
    accuracy = Panel("accuracy", _held_out_lines(events, corpora, "accuracy"), percent=True)
    learning_rate = Panel("learning rate", [Line("lr", *_curve(events, "lr"))])
    gradient_norm = Panel("gradient norm", [_training_line(events, "grad_norm")])
    speed = Panel("tokens/s", [_training_line(events, "tokens_per_second")], from_zero=True)
    wait = Panel("data wait", [_training_line(events, "data_wait")], percent=True, from_zero=True)
    speed_caption = "Tokens per second over all ranks, without padding, and the share of time spent waiting for data"
    return [
        _Plot("loss", loss_caption, [Panel("loss", loss)]),
        _Plot("perplexity", "Perplexity on held-out text", [perplexity]),
        _Plot("accuracy", "Accuracy on held-out text", [accuracy]),
        _Plot("learning-rate", "Learning rate", [learning_rate]),
        _Plot("gradient-norm", "Gradient norm before clipping", [gradient_norm]),
        _Plot("throughput", speed_caption, [speed, wait]),
    ]


def result_blocks(folder: RunFolder, directory: Path, prefix: str = "") -> list[Block]:
    """Scores and images of a fine-tuning run, from RUN/results.json; empty if there is none.

    Images are copied to `directory`, see `training_blocks`. Raises UserError for a damaged results.json.
    """
    path = folder.path / "results.json"
    try:
        results = parse_json(path.read_text(encoding="utf-8"))
        blocks = [Heading("Task"), Text(_subject(results)), score_table(results), *label_tables(results)]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: expected 'task', 'init' and 'splits' with scores") from None
    for name, caption in (("confusion.png", "Confusion matrix"), ("curves.png", "Losses and scores while training")):
        if (folder.path / name).is_file():
            directory.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.path / name, directory / f"{prefix}{name}")
            blocks.append(Figure(f"{prefix}{name}", caption))
    return blocks


def downstream_blocks(folder: RunFolder, directory: Path) -> list[Block]:
    """The scores of the run's checkpoints on tasks, by step, see `deepcloze watch`; empty without any.

    The image is written to `directory`.
    """
    results = read_results(folder)
    if not results:
        return []
    by_task = {task: list(group) for task, group in groupby(results, key=lambda result: result.task)}
    panels = [
        Panel(metric, [_task_line(task, group) for task, group in by_task.items() if group[-1].metric == metric])
        for metric in dict.fromkeys(result.metric for result in results)
    ]
    draw_panels(directory / "downstream.png", panels)
    caption = "Scores of the checkpoints on validation"
    rows = [_downstream_row(task, group) for task, group in by_task.items()]
    table = Table(["task", "metric", "last", "at step", "best", "at step"], rows, labels=2)
    return [Heading("Downstream tasks"), table, Figure("downstream.png", caption)]


def _task_line(task: str, results: Sequence[DownstreamResult]) -> Line:
    return Line(task, [result.step for result in results], [result.value for result in results], marked=True)


def _downstream_row(task: str, results: Sequence[DownstreamResult]) -> list[str]:
    last = results[-1]
    best = (min if last.lower_is_better else max)(results, key=lambda result: result.value)
    return [task, last.metric, f"{last.value:.4f}", f"{last.step:,}", f"{best.value:.4f}", f"{best.step:,}"]


def compare_blocks(folder: RunFolder) -> list[Block]:
    """The tables of a comparison, from RUN/compare.json; empty if there is none. Raises UserError for a damaged one."""
    path = folder.path / "compare.json"
    try:
        return comparison_blocks(parse_json(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: expected scores by row and task") from None


def _subject(results: Mapping[str, Any]) -> str:
    subject = f"{results['task']}, from {results['init']}"
    if collapsed := results.get("collapsed"):
        subject += (
            f"; collapsed seeds, which predict the same for every row of a split: {', '.join(map(str, collapsed))}"
        )
    return subject


def score_table(results: Mapping[str, Any]) -> Table:
    """A row for each metric and split, and the calibration errors."""
    calibration = results.get("calibration", {})
    rows = [
        [split, metric, *(_format(scores[key], ".4f") for key in ("mean", "std", "median")), _joined(scores["values"])]
        for split, metrics in results["splits"].items()
        for metric, scores in {**metrics, **calibration.get(split, {})}.items()
    ]
    return Table(["split", "metric", "mean", "std", "median", "per seed"], rows, labels=2)


def label_tables(results: Mapping[str, Any]) -> list[Block]:
    """Scores of each label and the most frequent mistakes on the last split that has them."""
    blocks: list[Block] = []
    for split, labels in list(results.get("label_scores", {}).items())[-1:]:
        rows = [
            [label, *(_format(scores[key]["mean"], ".4f") for key in _LABEL_SCORES), f"{scores['support']:,}"]
            for label, scores in labels.items()
        ]
        blocks.append(Table(["label", *_LABEL_SCORES, "support"], rows, f"Labels on {split}, mean over the seeds"))
        mistakes = [
            [found["label"], found["predicted"], f"{found['count']:,}", f"{found['share']:.1%}"]
            for found in results["confusions"].get(split, ())
        ]
        if mistakes:
            caption = f"Most frequent mistakes on {split}, all seeds together"
            blocks.append(Table(["label", "predicted", "count", "share of the label"], mistakes, caption, labels=2))
    return blocks


def goodput_blocks(folder: RunFolder) -> list[Block]:
    """How the attempts at the run have spent their time; empty if none has recorded it."""
    goodput = read_goodput(folder)
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
        blocks += [Heading("Config"), Code("config.yaml", folder.config.read_text(encoding="utf-8"))]
    return blocks


def evaluated_corpora(events: Sequence[Event]) -> list[str]:
    """Names of the held-out corpora, in the order of their first evaluation."""
    keys = [key for event in events for key in event if key.startswith("eval/")]
    return list(dict.fromkeys(key.removeprefix("eval/").rsplit("/", 1)[0] for key in keys))


def held_out_table(events: Sequence[Event], corpora: Sequence[str]) -> Table:
    """One row per corpus: loss, perplexity and accuracy at the last evaluation, and the best loss with its step."""
    rows = []
    for corpus in corpora:
        steps, losses = _curve(events, f"eval/{corpus}/loss")
        last = [_last(events, f"eval/{corpus}/{metric}") for metric in ("loss", "perplexity", "accuracy")]
        best = min(zip(losses, steps, strict=True), default=None)
        rows.append(
            [corpus, _format(last[0], ".4f"), _format(last[1], ".2f"), _format(last[2], ".1%")]
            + ([f"{best[0]:.4f}", f"{best[1]:,}"] if best else [UNKNOWN, UNKNOWN])
        )
    return _without_empty_columns(["corpus", "loss", "perplexity", "accuracy", "best loss", "at step"], rows)


def training_table(events: Sequence[Event]) -> Table:
    """One row: steps, tokens, loss, speed and memory. Speed, MFU and data wait are medians over the log events."""
    memory = max(_curve(events, "memory")[1], default=None)
    row = [
        f"{max(event['step'] for event in events):,}",
        _format(_last(events, "tokens"), ",.0f"),
        _format(_last(events, "loss"), ".4f"),
        _format(_median(events, "tokens_per_second"), ",.0f"),
        _format(_median(events, "mfu"), ".1%"),
        _format(_median(events, "data_wait"), ".1%"),
        UNKNOWN if memory is None else f"{memory / 2**30:.2f} GiB",
    ]
    return _without_empty_columns(
        ["steps", "tokens", "last loss", "tokens/s", "MFU", "data wait", "peak memory"], [row]
    )


def _without_empty_columns(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    shown = [index for index in range(len(columns)) if any(row[index] != UNKNOWN for row in rows)]
    return Table([columns[index] for index in shown], [[row[index] for index in shown] for row in rows])


def _training_line(events: Sequence[Event], key: str, color: str | None = None) -> Line:
    return Line("training", *_curve(events, key), smoothed=True, color=color)


def _held_out_lines(events: Sequence[Event], corpora: Sequence[str], metric: str) -> list[Line]:
    return [Line(corpus, *_curve(events, f"eval/{corpus}/{metric}"), marked=True) for corpus in corpora]


def _curve(events: Sequence[Event], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the events in which `key` is a number."""
    points = [(event["step"], event[key]) for event in events if type(event.get(key)) in (int, float)]
    return [step for step, _ in points], [value for _, value in points]


def _last(events: Sequence[Event], key: str) -> float | None:
    values = _curve(events, key)[1]
    return values[-1] if values else None


def _median(events: Sequence[Event], key: str) -> float | None:
    values = _curve(events, key)[1]
    return statistics.median(values) if values else None


def _format(value: float | None, spec: str) -> str:
    return UNKNOWN if value is None else format(value, spec)


def _joined(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


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
