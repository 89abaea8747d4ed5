"""Model cards: README.md of a model folder, as the Hugging Face Hub shows it.

A card is front matter (https://huggingface.co/docs/hub/model-cards) and a list of blocks. It names folders and files,
never their paths, and no host: cards are published. What pretraining and fine-tuning know about a model is in their
own `model_card` modules.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiment.hub_names import hub_name
from experiment.results.page import Heading, Table, Text

FILE = "README.md"
MODEL = 'model = "."  # this folder; elsewhere its path, or its name on the Hugging Face Hub'
"""First line of a snippet. Without a path, it stays right when the folder is renamed or copied."""
UNKNOWN = "–"

# Comments, because the Hub rejects a license that it does not know: nobody but the author can choose one.
_SLOTS = "# license: apache-2.0\n# language: en\n"
_LICENSE = (
    "Not chosen yet. Set `license` and `language` in the first lines of this file, where they are comments. "
    "The licenses of the training data and of the models under *Lineage* may restrict the choice."
)
_LIBRARIES = ("deepcloze", "torch", "transformers", "deepspeed")


@dataclass(frozen=True)
class Snippet:
    """Code to copy. It runs in the model folder."""

    language: str
    text: str


CardBlock = Heading | Text | Table | Snippet
"""The text of a `Text` is Markdown: data of users in it goes through `escape`. Everything else is plain text."""


@dataclass(frozen=True)
class ModelCard:
    title: str
    metadata: Mapping[str, Any]  # front matter
    usage: Sequence[CardBlock]
    blocks: Sequence[CardBlock]  # the first, an introduction, comes before the usage


@dataclass(frozen=True)
class Score:
    """A metric of a model, for the front matter."""

    metric: str
    value: float
    dataset: str
    split: str


def render_card(card: ModelCard) -> str:
    """The content of README.md."""
    metadata = yaml.safe_dump(dict(card.metadata), sort_keys=False, allow_unicode=True, width=120)
    first, *others = card.blocks
    blocks = [first, *_usage_section(card.usage), *others, Heading("License"), Text(_LICENSE)]
    return f"---\n{metadata}{_SLOTS}---\n\n# {escape(card.title)}\n\n{_render(blocks)}"


def replace_usage(text: str, usage: Sequence[CardBlock], library: str) -> str:
    """The content of README.md for the same model in another format.

    library: as the Hub calls it, such as onnx. Everything but the section *Usage* stays, also if a user wrote it. A new
    section comes before the others.
    """
    found = re.match(r"(?s)---\n(.*?\n)?---\n", text)
    front, body = (found[1] or "", text[found.end() :]) if found else ("", f"\n{text.strip()}\n\n")
    front = re.sub(r"(?m)^library_name: .*\n", "", front)
    section = _render(_usage_section(usage)) + "\n"
    place = re.search(r"(?ms)^## Usage\n(?:^```.*?^```$|.)*?(?=^## |\Z)", body) or re.search(r"(?m)^(?=## )|\Z", body)
    assert place is not None, "every text has an end"
    body = body[: place.start()] + section + body[place.end() :]
    return f"---\nlibrary_name: {library}\n{front}---\n{body}"


def metadata_of(
    task: str | None, tags: Sequence[str], ancestors: Sequence[Mapping[str, Any]], title: str, scores: Sequence[Score]
) -> dict[str, Any]:
    """Front matter. task: as the Hub calls it; ancestors: of the weights, as in deepcloze.json."""
    metadata: dict[str, Any] = {"library_name": "transformers"}
    if task is not None:
        metadata["pipeline_tag"] = task
    metadata["tags"] = ["deepcloze", *tags]
    if bases := [name for ancestor in ancestors if (name := hub_name(str(ancestor["folder"])))]:
        metadata["base_model"] = bases[-1]
    if scores:
        results = [_result(task, scored, scores) for scored in dict.fromkeys((s.dataset, s.split) for s in scores)]
        metadata["model-index"] = [{"name": title, "results": results}]
    return metadata


def _result(task: str | None, scored: tuple[str, str], scores: Sequence[Score]) -> dict[str, Any]:
    """An entry of model-index: the scores on one split. `type` of a data set is its name on the Hub; ours has none."""
    dataset, split = scored
    return {
        "task": {"type": task},
        "dataset": {"name": dataset, "type": dataset, "split": split},
        "metrics": [
            {"type": _HUB_METRICS.get(score.metric, score.metric), "name": score.metric, "value": round(score.value, 6)}
            for score in scores
            if (score.dataset, score.split) == scored
        ],
    }


_HUB_METRICS = dict.fromkeys(("macro_f1", "micro_f1", "weighted_f1"), "f1") | {
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "uar": "recall",
}
"""Metric -> its name on the Hub, where it has another one."""


def model_name(ancestor: Mapping[str, Any]) -> str:
    """What a card calls a model that others came from, see `provenance.ancestors_of`."""
    return hub_name(str(ancestor["folder"])) or Path(str(ancestor["folder"])).name


def lineage_blocks(ancestors: Sequence[Mapping[str, Any]]) -> list[CardBlock]:
    """The models that the weights came from, oldest first."""
    if not ancestors:
        return [Heading("Lineage"), Text("The weights were initialized randomly.")]
    rows = [
        [
            model_name(ancestor),
            format_number(ancestor.get("step")),
            str(ancestor.get("run_id", UNKNOWN)),
            ", ".join(f"{name} {digest}" for name, digest in ancestor.get("weights", {}).items()) or UNKNOWN,
            {"fork": "full state"}.get(ancestor["relation"], "weights"),
        ]
        for ancestor in ancestors
    ]
    columns = ["model", "step", "run", "SHA-256", "continued from"]
    return [Heading("Lineage"), Table(columns, rows, "Oldest first. `deepcloze.json` has the same.", labels=5)]


def attempt_row(attempt: Mapping[str, Any], device: str) -> list[str]:
    """A row for `hardware_blocks`. attempt: as in provenance.json."""
    git, versions = attempt.get("git"), attempt.get("versions", {})
    commit = f"{git['commit'][:10]}{' (changed)' if git['dirty'] else ''}" if git else UNKNOWN
    ranks, hosts = (format_number(attempt.get(key)) for key in ("world_size", "hosts"))
    return [device, ranks, hosts, *(str(versions.get(name) or UNKNOWN) for name in _LIBRARIES), commit]


def cpu_name(hardware: Mapping[str, Any]) -> str:
    """hardware: as in provenance.json."""
    return f"{hardware.get('cores', UNKNOWN)} cores, {hardware.get('cpu', UNKNOWN)}"


def hardware_blocks(rows: Sequence[Sequence[str]]) -> list[CardBlock]:
    """Rows as from `attempt_row`; equal ones are shown once."""
    columns = ["devices of a host", "ranks", "hosts", *_LIBRARIES, "commit"]
    return [Heading("Hardware and software"), Table(columns, list(dict.fromkeys(map(tuple, rows))))]


def settings_table(settings: Mapping[str, Any]) -> Table:
    """A row for each setting that has a value."""
    rows = [[key, format_value(value)] for key, value in settings.items() if value not in (None, "", [], (), {})]
    return Table(["setting", "value"], rows, labels=2)


def format_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(format_value, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(part)}" for key, part in value.items() if part is not None)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format_number(value) if isinstance(value, int | None) else str(value)


def format_number(value: int | float | None, digits: int | None = None) -> str:
    """With thousands separators, or with this many digits after the point."""
    if value is None:
        return UNKNOWN
    return f"{value:,}" if digits is None else f"{value:,.{digits}f}"


def escape(text: str) -> str:
    """Plain text as Markdown, on one line."""
    text = re.sub(r"([\\`*<>|\[\]~&$])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # within a word it is an ordinary character


def _usage_section(usage: Sequence[CardBlock]) -> list[CardBlock]:
    return [Heading("Usage"), *usage] if usage else []


def _render(blocks: Sequence[CardBlock]) -> str:
    return "\n".join(map(render_block, blocks))


def render_block(block: CardBlock) -> str:
    """As Markdown; ends with a newline."""
    match block:
        case Heading():
            return f"## {escape(block.text)}\n"
        case Text():
            return f"{block.text}\n"
        case Snippet():
            return f"```{block.language}\n{block.text.strip()}\n```\n"
        case Table():
            return _render_table(block)


def _render_table(table: Table) -> str:
    rule = ["---" if number < table.labels else "---:" for number in range(len(table.columns))]
    lines = [[escape(name) for name in table.columns], rule, *([escape(cell) for cell in row] for row in table.rows)]
    caption = f"{table.caption}\n\n" if table.caption else ""
    return caption + "".join(f"| {' | '.join(line)} |\n" for line in lines)
