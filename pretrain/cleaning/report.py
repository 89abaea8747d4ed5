"""Reports of a cleaning: clean.json, report.html and lines for the terminal."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.decontamination import CLEAN_PAGE, CLEAN_SUMMARY, CleanSummary
from experiment.files import write_json
from experiment.formatting import print_table
from experiment.results.page import (
    Bar,
    BarChart,
    BarCharts,
    Block,
    Code,
    Fact,
    Heading,
    Headline,
    Page,
    Table,
    Text,
    write_page,
)

if TYPE_CHECKING:
    from pretrain.cleaning.config import CleanConfig
    from pretrain.cleaning.step import Step
    from pretrain.cleaning.tally import StepTally

_LANGUAGES = 30  # the most frequent ones
_LISTED = 200  # matches on the page


def summarize(
    config: "CleanConfig",
    identity: Mapping[str, Any],
    empty: int,
    kept: int,
    languages: Counter[str],
    tallies: Sequence["StepTally"],
    steps: Sequence["Step[Any]"],
) -> CleanSummary:
    """Return the content of clean.json.

    identity: digest of the config; the tasks that the sources were decontaminated against. empty: documents whose
    markup held no text, which no step reads. kept, languages: documents. tallies: of the removal of markup, and of each
    step.
    """
    markup, *others = tallies
    return {
        **identity,
        **({"empty": empty} if empty else {}),
        "read": markup.read,
        "kept": kept,
        **({"languages": dict(languages.most_common(_LANGUAGES))} if languages else {}),
        "steps": [
            *([{"name": "markup", **_effect(markup)}] if markup.rules else []),
            *(_step(item.name, tally, step) for item, tally, step in zip(config.steps, others, steps, strict=True)),
        ],
    }


def _step(name: str, tally: "StepTally", step: "Step[Any]") -> dict[str, Any]:
    return {
        "name": name,
        "config": step.config.model_dump(mode="json"),
        **_effect(tally),
        **step.facts(),
        **({"matches": tally.matches} if step.lists_matches else {}),
    }


def _effect(tally: "StepTally") -> dict[str, Any]:
    rules = {
        rule: {
            "dropped": found.dropped,
            "changed": found.changed,
            "examples": [
                {"id": example.id, "text": example.text, "detail": example.detail}
                | ({"after": example.after} if example.after else {})
                for example in found.examples
            ],
        }
        for rule, found in sorted(tally.rules.items())
    }
    return {
        "read": tally.read,
        "dropped": sum(rule["dropped"] for rule in rules.values()),
        "changed": sum(rule["changed"] for rule in rules.values()),
        "rules": rules,
    }


def write_report(folder: Path, summary: CleanSummary) -> None:
    """Write clean.json and report.html."""
    write_json(folder / CLEAN_SUMMARY, summary)
    kept, read = summary["kept"], summary["read"]
    facts = [
        Fact("read", f"{read:,}", "documents"),
        Fact("kept", f"{kept:,}", f"{kept / max(read, 1):.1%}"),
        Fact("dropped", f"{read - kept:,}", f"{(read - kept) / max(read, 1):.1%}"),
        *([Fact("without text", f"{summary['empty']:,}", "not read")] if "empty" in summary else []),
    ]
    headline = Headline("cleaned", "good" if kept else "warn", "" if kept else "No document is left.", facts)
    write_page(folder / CLEAN_PAGE, Page("Cleaning", [Heading("Steps"), *summary_blocks(summary)], headline))


def summary_blocks(summary: CleanSummary) -> list[Block]:
    """Return the effect of each step, with examples, and the languages of the rest."""
    blocks: list[Block] = [Table(_COLUMNS, list(_rows(summary)), labels=2)]
    if languages := summary.get("languages"):
        bars = [Bar(name, count / summary["kept"]) for name, count in languages.items()]
        blocks.append(BarCharts([BarChart("Languages, share of the documents that are left", bars)]))
    return [*blocks, *_examples(summary)]


def describe(summary: CleanSummary) -> str:
    """Describe the documents that were kept, and those that each step dropped, in a line."""
    dropped = ", ".join(f"{step['name']} {step['dropped']:,}" for step in summary["steps"] if step["dropped"])
    return f"{describe_kept(summary)}; dropped: {dropped}" if dropped else describe_kept(summary)


def describe_kept(summary: CleanSummary) -> str:
    empty = f", {summary['empty']:,} pages without text" if "empty" in summary else ""
    return f"{summary['kept']:,} of {summary['read']:,} documents kept{empty}"


_COLUMNS = ("step", "rule", "read", "dropped", "share", "changed")


def _rows(summary: CleanSummary) -> Iterator[list[str]]:
    for number, step in enumerate(summary["steps"], 1):
        read = step["read"]
        share = f"{step['dropped'] / max(read, 1):.2%}"
        yield [f"{number}. {step['name']}", "", f"{read:,}", f"{step['dropped']:,}", share, f"{step['changed']:,}"]
        for name, rule in step["rules"].items():
            share = f"{rule['dropped'] / max(read, 1):.2%}" if rule["dropped"] else ""
            dropped, changed = (f"{rule[key]:,}" if rule[key] else "" for key in ("dropped", "changed"))
            yield ["", name, "", dropped, share, changed]


def _example(example: Mapping[str, str]) -> list[str]:
    text = [example["text"]]
    if after := example.get("after"):
        text = ["before:", *text, "after:", after]
    return [example["id"], example["detail"] and f"→ {example['detail']}", *text]


def _examples(summary: CleanSummary) -> Iterator[Block]:
    for number, step in enumerate(summary["steps"], 1):
        if not step["rules"]:
            continue
        yield Heading(f"{number}. {step['name']}")
        for name, rule in step["rules"].items():
            count = rule["dropped"] or rule["changed"]
            done = "dropped" if rule["dropped"] else "changed"
            texts = ["\n".join(filter(None, _example(example))) for example in rule["examples"]]
            yield Code(f"{name}: {len(texts)} of {count:,} {done}, drawn at random", "\n\n".join(texts))
        if matches := step.get("matches"):
            if (total := step["dropped"] + step["changed"]) > _LISTED:
                listed = "all" if len(matches) == total else f"the first {len(matches):,}"
                yield Text(f"The first {_LISTED} of {total:,} matches; {CLEAN_SUMMARY} has {listed}.")
            rows = [[match["id"], match["match"]] for match in matches[:_LISTED]]
            yield Table(("document", "match"), rows, labels=2)


def print_steps(summary: CleanSummary) -> None:
    """Print the counts as a table."""
    print_table(_COLUMNS, _rows(summary), labels=2)
