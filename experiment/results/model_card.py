"""Model cards: README.md of a model folder, as the Hugging Face Hub shows it.

`model_card.md.j2` has the sections of all cards; the templates of exported and of fine-tuned models extend it. A card
names folders and files, never their paths, and no host: cards are published.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from experiment.formatting import UNKNOWN, escape_markdown, markdown_table, show
from experiment.models.hub_names import hub_name
from experiment.results.page import open_templates
from experiment.run_files.provenance import describe_commit

CARD_FILE = "README.md"
MODEL = 'model = "."  # this folder; elsewhere its path, or its name on the Hugging Face Hub'
"""First line of a snippet. Without a path, it stays right when the folder is renamed or copied."""

_LIBRARIES = ["deepcloze", "torch", "transformers", "deepspeed"]
_HUB_METRICS = dict.fromkeys(("macro_f1", "micro_f1", "weighted_f1"), "f1") | {
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "uar": "recall",
}
"""Metric -> its name on the Hub, where it has another one."""


def render_card(
    template: Path, title: str, usage: str, ancestors: Sequence[Mapping[str, Any]] | None, **values: Any
) -> str:
    """Return the content of README.md.

    Args:
        template: extends `model_card.md.j2`.
        usage: Markdown, see `usage_section`.
        ancestors: of the weights, as in deepcloze.json; None if not known.
        values: of the template. `data` is the front matter, `hardware` has rows from `attempt_row`; equal ones are
            shown once.
    """
    environment = open_templates(template.parent, autoescape=False)
    environment.filters["escape_markdown"] = escape_markdown
    environment.globals |= {"table": _table, "settings": _settings, "show": show, "libraries": _LIBRARIES}
    values["hardware"] = list(dict.fromkeys(map(tuple, values["hardware"])))
    lineage = None if ancestors is None else [_lineage_row(ancestor) for ancestor in ancestors]
    return environment.get_template(template.name).render(title=title, usage=usage, lineage=lineage, **values)


def usage_section(*parts: str) -> str:
    """Join parts, in Markdown, to a section; empty without any."""
    return "\n".join(["## Usage\n", *(f"{part.strip()}\n" for part in parts), ""]) if parts else ""


def snippet(language: str, code: str) -> str:
    """Return code to copy, as Markdown. It runs in the model folder."""
    return f"```{language}\n{code.strip()}\n```"


def replace_usage(text: str, usage: str, library: str) -> str:
    """Return the content of README.md for the same model in another format.

    library: as the Hub calls it, such as onnx. Everything but the section *Usage* stays, also if a user wrote it. A new
    section comes before the others.
    """
    found = re.match(r"(?s)---\n(.*?\n)?---\n", text)
    front, body = (found[1] or "", text[found.end() :]) if found else ("", f"\n{text.strip()}\n\n")
    front = re.sub(r"(?m)^library_name: .*\n", "", front)
    place = re.search(r"(?ms)^## Usage\n(?:^```.*?^```$|.)*?(?=^## |\Z)", body) or re.search(r"(?m)^(?=## )|\Z", body)
    assert place is not None, "every text has an end"
    body = body[: place.start()] + usage + body[place.end() :]
    return f"---\nlibrary_name: {library}\n{front}---\n{body}"


def front_matter(
    task: str | None,
    tags: Sequence[str],
    ancestors: Sequence[Mapping[str, Any]],
    title: str,
    scores: Iterable[tuple[str, str, str, float]],
    library: str = "transformers",
) -> ModelCardData:
    """Make the metadata. task, library: as the Hub calls them; ancestors: of the weights, as in deepcloze.json; scores:
    (data set, split, metric, value)."""
    bases = [name for ancestor in ancestors if (name := hub_name(str(ancestor["folder"])))]
    results = [
        # `dataset_type` is the name of a data set on the Hub; ours has none.
        EvalResult(
            task or "other",
            dataset,
            dataset,
            _HUB_METRICS.get(metric, metric),
            round(value, 6),
            dataset_split=split,
            metric_name=metric,
        )
        for dataset, split, metric, value in scores
    ]
    return ModelCardData(
        library_name=library,
        pipeline_tag=task,
        tags=["deepcloze", *tags],
        base_model=bases[-1] if bases else None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def model_name(ancestor: Mapping[str, Any]) -> str:
    """Return the name of an ancestor of a model in its card, see `provenance.ancestors_of`."""
    return hub_name(str(ancestor["folder"])) or Path(str(ancestor["folder"])).name


def _lineage_row(ancestor: Mapping[str, Any]) -> list[str]:
    weights = ", ".join(f"{name} {digest}" for name, digest in ancestor.get("weights", {}).items())
    weights_used = "averaged weights" if ancestor.get("averaged") else "weights"
    continued = "full state" if ancestor["relation"] == "fork" else weights_used
    run = str(ancestor.get("run_id", UNKNOWN))
    return [model_name(ancestor), show(ancestor.get("step"), ","), run, weights or UNKNOWN, continued]


def attempt_row(attempt: Mapping[str, Any], device: str) -> list[str]:
    """Return a row of the table of hardware and software. attempt: as in provenance.json."""
    commit, versions = describe_commit(attempt), attempt.get("versions", {})
    ranks, hosts = (show(attempt.get(key), ",") for key in ("world_size", "hosts"))
    return [device, ranks, hosts, *(str(versions.get(name) or UNKNOWN) for name in _LIBRARIES), commit]


def format_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(format_value, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(part)}" for key, part in value.items() if part is not None)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return show(value, ",") if isinstance(value, int | None) else str(value)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], labels: int = 1) -> str:
    header, *lines = [[escape_markdown(cell) for cell in row] for row in [columns, *rows]]
    return markdown_table(header, lines, labels)


def _settings(settings: Mapping[str, Any]) -> str:
    """Return a table with a row for each setting that has a value."""
    rows = [[key, format_value(value)] for key, value in settings.items() if value not in (None, "", [], (), {})]
    return _table(["setting", "value"], rows, labels=2)
