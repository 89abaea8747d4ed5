"""What the jobs of `benchmarks.gpu_session` found, and the page with it."""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.measuring import spread
from experiment.files import write_text
from experiment.formatting import escape_markdown, markdown_table

_ATTEMPTS = 2  # of a job that ends the session
_MARK = "FIGURES "  # at the start of a line: libraries print JSON too

Figures = dict[str, Any]


def print_figures(figures: Figures) -> None:
    """Print figures on a line of the output of a job, for `read_figures`."""
    print(_MARK + json.dumps(figures), flush=True)


def read_figures(output: str) -> Iterator[Figures]:
    for line in output.splitlines():
        if line.startswith(_MARK):
            with suppress(ValueError):  # the job was killed
                yield json.loads(line.removeprefix(_MARK))


@dataclass
class JobOutcome:
    """How a job went."""

    status: Literal["waiting", "running", "interrupted", "passed", "failed", "timed out"]  # waiting: to run again
    attempts: int = 0
    seconds: float = 0.0
    exit_code: int | None = None
    figures: list[Figures] = field(default_factory=list)
    output: str = ""  # its end, if the job did not pass
    commit: str = ""  # of deepcloze
    again: bool = False  # it runs again because it was asked for
    earlier: list[Figures] = field(default_factory=list)  # of earlier runs of the job, each with its commit

    @property
    def measured(self) -> list[Figures]:
        """All figures, each with its commit."""
        return [*self.earlier, *({"commit": self.commit, **figures} for figures in self.figures)]

    @property
    def has_failed(self) -> bool:
        """A job that ends the session twice has, too."""
        return self.status in ("failed", "timed out") or (self.status == "interrupted" and self.attempts >= _ATTEMPTS)

    @property
    def is_final(self) -> bool:
        return self.status == "passed" or self.has_failed

    @property
    def summary(self) -> str:
        if self.status in ("waiting", "interrupted"):
            return self.status
        code = f" with exit code {self.exit_code}" if self.exit_code else ""
        results = Counter(figures["result"] for figures in self.figures if "test" in figures)
        counts = ", ".join(f"{count} {result}" for result, count in sorted(results.items()))
        return f"{self.status}{code} after {self.seconds:.0f} s{counts and f': {counts}'}"


def write_results(path: Path, outcomes: Mapping[str, JobOutcome]) -> None:
    """Write the page."""
    write_text(path, "\n".join(_page(outcomes, path.parent)))


def _page(outcomes: Mapping[str, JobOutcome], folder: Path) -> Iterator[str]:
    yield "# Results of a GPU session\n"
    for figures in _figures(outcomes, "environment"):
        yield markdown_table(
            ["", ""], [[escape_markdown(key), escape_markdown(str(value))] for key, value in figures.items()]
        )
    yield "## Jobs\n"
    yield markdown_table(["job", ""], [[name, escape_markdown(outcome.summary)] for name, outcome in outcomes.items()])
    if failures := list(_failures(outcomes)):
        yield "## Failures\n"
        yield from failures
    if kernels := _figures(outcomes, "kernel-times"):
        yield "## Kernels, forward and backward\n"
        columns = ["kernel", "", "shape", "commit", "ms", "TFLOP/s"]
        yield markdown_table(columns, map(_kernel_row, kernels), labels=4)
    if training := _figures(outcomes, "mfu"):
        yield "## Training\n"
        yield "tokens/s: median (min – max) of the rounds\n"
        columns = ["case", "device", "commit", "rounds", "MFU", "tokens/s", "ms per step", "peak memory"]
        yield markdown_table([*columns, "real tokens per slot", "warnings"], _training_rows(training), labels=3)
    for profile in sorted(folder.glob("profile/*/profile.txt")):
        yield f"## Profile: {profile.parent.name}\n\n```\n{profile.read_text(encoding='utf-8').strip()}\n```\n"
    for figures in _figures(outcomes, "pretraining"):
        yield "## Pretraining, stopped and resumed\n"
        yield markdown_table(
            ["", ""], [[escape_markdown(key), _value(value)] for key, value in figures.items()], labels=1
        )


def _figures(outcomes: Mapping[str, JobOutcome], start: str) -> list[Figures]:
    """Of the jobs whose names begin so, each once, with the commit."""
    jobs = [outcome for name, outcome in outcomes.items() if name.startswith(start)]
    found = [figures for outcome in jobs for figures in outcome.measured]
    return [figures for number, figures in enumerate(found) if figures not in found[:number]]


def _failures(outcomes: Mapping[str, JobOutcome]) -> Iterator[str]:
    for name, outcome in outcomes.items():
        if outcome.has_failed:
            yield f"### {name}\n\n{outcome.summary}\n"
            for figures in outcome.figures:
                if figures.get("result") == "failed":
                    yield f"- `{figures['test']}`: {escape_markdown(figures['message'])}"
            yield f"\n```\n{outcome.output}\n```\n"
    for figures in (figures for outcome in outcomes.values() for figures in outcome.figures):
        if figures.get("error"):
            yield f"- {figures.get('case') or figures.get('kernel')}: {figures['error']}\n"


def _kernel_row(row: Figures) -> list[str]:
    rate = "" if row["tflops"] is None else f"{row['tflops']:,.1f}"
    return [row["kernel"], row["precision"], row["shape"], row["commit"], row["error"] or f"{row['ms']:.3f}", rate]


def _training_rows(results: Iterable[Figures]) -> Iterator[list[str]]:
    cases: dict[tuple[str, str, str], list[Figures]] = {}
    for result in results:
        if not result["error"]:
            cases.setdefault((result["case"], result["device"], result["commit"]), []).append(result)
    for (case, device, commit), rounds in cases.items():
        rates, mfu, ms, memory, fill = (
            [result[name] for result in rounds] for name in ("tokens_per_second", "mfu", "step_ms", "memory", "fill")
        )
        yield [
            case,
            device,
            commit,
            str(len(rounds)),
            "" if None in mfu else f"{statistics.median(mfu):.1%}",
            spread(rates, ",.0f"),
            f"{statistics.median(ms):.1f}",
            f"{max(memory) / 2**30:.1f} GiB",
            f"{statistics.median(fill):.3f}",
            escape_markdown("; ".join(dict.fromkeys(line for result in rounds for line in result.get("warnings", ())))),
        ]


def _value(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
