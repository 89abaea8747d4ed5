"""The sections of a report about one training run: tables and charts of its metrics, the marks in them, and words that
checkpoints fill into held-out sentences."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from experiment.errors import UserError
from experiment.files import read_json
from experiment.formatting import UNKNOWN, format_perplexity, show
from experiment.results.charts import COLORS, INK, Line, Mark, Panel, Plot, charts_block
from experiment.results.history import History, SeedHistory
from experiment.results.page import Block, Filling, Fillings, Heading, Table, Text
from experiment.results.report.run import Run
from experiment.run_files.checkpoints import checkpoint_step, named_best
from experiment.run_files.fillings import MaskedSentence, read_fillings, spread
from experiment.run_files.provenance import read_provenance
from experiment.run_files.run_folder import RunFolder

SPEED, WAIT = "Tokens per second, all ranks, without padding", "Time spent waiting for data"
NORM, RATE = "Gradient norm before clipping", "Learning rate"

_TRAINING = "training"  # the line of a run with one seed
_BAD_BATCHES = 500  # marked
_FILLED = 6  # checkpoints whose words are shown


def training_blocks(history: History, marks: Sequence[Mark] = (), metric: str | None = None) -> list[Block]:
    """Return the final metrics and curves; empty without events. metric: of the task of a finished fine-tuning run,
    which is evaluated on splits, not on held-out text."""
    if not history.seeds:
        return []
    blocks: list[Block] = [Heading("Training")]
    shown = [mark for mark in marks if mark.step <= history.step]  # later stages are in the config already
    axes = [seed.axis for seed in history.seeds.values()]
    blocks += charts_block(_training_plots(history, metric), axes, shown)
    if history.corpora and metric is None:
        blocks += [Heading("Held-out text"), held_out_table(history, history.corpora)]
    return [*blocks, Heading("Speed and memory"), training_table(history)]


def _training_plots(history: History, metric: str | None) -> list[Plot]:
    lines, held_out = partial(_training_lines, history.seeds), partial(_held_out_lines, history.seeds, history.corpora)
    loss = Panel("loss", [*lines("loss", True, INK), *held_out("loss")], title="Loss")
    if metric is None:
        perplexity = Panel("perplexity", held_out("perplexity"), "log", title="Perplexity on held-out text")
        accuracy = Panel("accuracy", held_out("accuracy"), percent=True, title="Accuracy on held-out text")
        scores = [Plot("perplexity", [perplexity]), Plot("accuracy", [accuracy])]
    else:
        scores = [Plot("scores", [Panel(metric, held_out(metric), title=metric)])]
    return [Plot("loss", [loss]), *scores, *optimization_plots(lines)]


def optimization_plots(lines: Callable[[str, bool], Sequence[Line]]) -> list[Plot]:
    """Return the learning rate, gradient norm and speed. lines: of a metric, and whether they are smoothed."""
    speed = Panel("tokens/s", lines("tokens_per_second", True), from_zero=True, title=SPEED)
    wait = Panel("data wait", lines("data_wait", True), percent=True, from_zero=True, title=WAIT)
    return [
        Plot("learning-rate", [Panel("learning rate", lines("lr", False), title=RATE)]),
        Plot("gradient-norm", [Panel("gradient norm", lines("grad_norm", True), "log", title=NORM)]),
        Plot("throughput", [speed, wait]),
    ]


def _training_lines(
    seeds: Mapping[int | None, SeedHistory], key: str, smoothed: bool, color: str | None = None
) -> list[Line]:
    """Return the lines of seeds. color: of a run with one seed."""
    if len(seeds) == 1:
        return [Line(_TRAINING, history.curve(key), smoothed=smoothed, color=color) for history in seeds.values()]
    return [
        Line(f"seed {seed}", history.curve(key), smoothed=smoothed, run=number, look=number)
        for number, (seed, history) in enumerate(seeds.items())
    ]


def _held_out_lines(seeds: Mapping[int | None, SeedHistory], corpora: Sequence[str], metric: str) -> list[Line]:
    looks = max(len(COLORS), len(seeds))  # of a split: up to seven seeds keep their colors, with other dashes
    return [
        Line(
            f"{corpus} (held-out)" if corpus == _TRAINING else corpus if len(seeds) == 1 else f"seed {seed}, {corpus}",
            history.curve(f"eval/{corpus}/{metric}"),
            marked=True,
            run=number,
            look=None if len(seeds) == 1 else number + split * looks,
        )
        for number, (seed, history) in enumerate(seeds.items())
        for split, corpus in enumerate(corpora, start=1)
    ]


def held_out_table(history: History, corpora: Sequence[str]) -> Table:
    """Return a row per corpus: loss, perplexity and accuracy of the last evaluation, and the best loss with its
    step."""
    rows = []
    for corpus in corpora:
        found = [history.last(f"eval/{corpus}/{metric}") for metric in ("loss", "perplexity", "accuracy")]
        best = history.best_loss(corpus)
        rows.append(
            [corpus, show(found[0], ".4f"), format_perplexity(found[1]), show(found[2], ".1%")]
            + ([f"{best[0]:.4f}", show(best[1], ",")] if best else [UNKNOWN, UNKNOWN])
        )
    return _known_columns(["corpus", "loss", "perplexity", "accuracy", "best loss", "at step"], rows, kept=2)


def training_table(history: History) -> Table:
    """Return one row: steps, tokens, loss, speed and memory. Speed, MFU and data wait are medians over log events."""
    memory = history.highest("memory")
    row = [
        f"{history.step:,}",
        show(history.last("tokens"), ",.0f"),
        show(history.last("loss"), ".4f"),
        show(history.median("tokens_per_second"), ",.0f"),
        show(history.median("mfu"), ".1%"),
        show(history.median("data_wait"), ".1%"),
        UNKNOWN if memory is None else f"{memory / 2**30:.2f} GiB",
    ]
    return _known_columns(["steps", "tokens", "last loss", "tokens/s", "MFU", "data wait", "peak memory"], [row])


def _known_columns(columns: Sequence[str], rows: Sequence[Sequence[str]], kept: int = 0) -> Table:
    """kept: how many columns are shown in any case: a loss that diverged is not known."""
    shown = [index for index in range(len(columns)) if index < kept or any(row[index] != UNKNOWN for row in rows)]
    return Table([columns[index] for index in shown], [[row[index] for index in shown] for row in rows])


def read_marks(run: Run) -> list[Mark]:
    """Files that are damaged mark nothing. Raises OSError."""
    return [*_restarts(run.folder), *_bad_batches(run.folder), *_stages(run.config), *_best(run.folder)]


def _restarts(folder: RunFolder) -> Iterator[Mark]:
    """Yield where each later attempt has resumed; none of fine-tuning, which counts steps over all seeds."""
    with suppress(UserError, KeyError, TypeError, ValueError):  # it is being copied
        attempts = (read_provenance(folder) or {"attempts": []})["attempts"]
        for number, attempt in enumerate(attempts, start=1):
            if number > 1 and attempt.keys() & {"step", "total_steps"} == {"step"}:
                started, step = datetime.fromisoformat(attempt["date"]), attempt["step"]
                yield Mark("restart", step, f"attempt {number}, {started:%Y-%m-%d %H:%M} UTC, from step {step:,}")


def _bad_batches(folder: RunFolder) -> Iterator[Mark]:
    """Yield the last bad batches, of which a long run has thousands. A page that is followed asks every two seconds."""
    for dump in sorted(folder.bad_batch(0).parent.glob("step-*"))[-_BAD_BATCHES:]:
        with suppress(OSError, ValueError, KeyError, TypeError):
            file = dump / "fault.json"
            yield _bad_batch(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=10_000)
def _bad_batch(file: Path, _written: int) -> Mark:
    """_written: when, as st_mtime_ns."""
    fault = read_json(file)
    return Mark("bad", int(fault["step"]), str(fault["what"]))


def _stages(config: Mapping[str, Any]) -> Iterator[Mark]:
    with suppress(KeyError, TypeError, AttributeError):
        first_step = 0
        for number, stage in enumerate(config["schedule"]["stages"], start=1):
            if number > 1:
                values = {key: value for key, value in stage.items() if key != "steps" and value is not None}
                described = ", ".join(f"{key} {value}" for key, value in values.items())
                yield Mark("stage", first_step, f"stage {number}: {described}" if described else f"stage {number}")
            first_step += stage["steps"] or 0


def _best(folder: RunFolder) -> Iterator[Mark]:
    with suppress(OSError, ValueError):
        if (best := named_best(folder.checkpoints)) is not None:
            step = checkpoint_step(best)
            yield Mark("best", step, f"best checkpoint: step {step:,}")


def filling_blocks(folder: RunFolder) -> list[Block]:
    """Return a section of a report; empty without fillings."""
    if not (checkpoints := spread(read_fillings(folder), _FILLED)):
        return []
    by_sentence: dict[MaskedSentence, list[tuple[str, list[tuple[str, str]]]]] = {}
    for checkpoint in checkpoints:
        for filled in checkpoint.sentences:
            guesses = [(token, f"{probability:.1%}") for token, probability in filled.top]
            by_sentence.setdefault(filled.sentence, []).append((f"step {checkpoint.step:,}", guesses))
    fillings = [
        Filling(sentence.before, sentence.answer, sentence.after, guesses) for sentence, guesses in by_sentence.items()
    ]
    about = "The marked word is masked. Below: the most probable words of each checkpoint, with their probabilities."
    return [Heading("Held-out sentences"), Text(about), Fillings(fillings)]
