"""Counts and examples of the effects of each step, which add up over parts in any order."""

import heapq
from dataclasses import dataclass, field
from typing import Self

import xxhash

from pretrain.cleaning.step import Document, Verdict

_EXAMPLES = 20
_MATCHES = 10_000
_SHOWN = 400  # characters of an example
_UNCHANGED = 80  # of them, before the first change


@dataclass(order=True, frozen=True)
class Example:
    """A document that a rule was applied to. Those with the smallest priorities are kept: a random choice that does not
    depend on workers or time."""

    priority: int
    id: str
    text: str  # before the step, shortened; after it, if it masks text
    detail: str
    after: str = ""  # the step, of a changed text: the same place


@dataclass
class RuleTally:
    dropped: int = 0
    changed: int = 0
    examples: list[Example] = field(default_factory=list)  # sorted

    def merge(self, other: Self) -> None:
        self.dropped += other.dropped
        self.changed += other.changed
        self.examples = heapq.nsmallest(_EXAMPLES, [*self.examples, *other.examples])


@dataclass
class StepTally:
    """Counts of one step's effects on the documents that it read."""

    read: int = 0
    rules: dict[str, RuleTally] = field(default_factory=dict)
    matches: list[dict[str, str]] = field(default_factory=list)  # the first ones, if the step lists them

    def count(self, document: Document, text: str, verdict: Verdict | None, listed: bool, masked: bool = False) -> None:
        """Count a document. text: before the step. listed, masked: whether the step lists its matches, or masks text
        that examples may not show."""
        self.read += 1
        if verdict is None:
            return
        priority = xxhash.xxh3_64_intdigest(f"{verdict.rule}\0{document.id}".encode())
        rule = self.rules.setdefault(verdict.rule, RuleTally())
        counted = RuleTally(int(verdict.dropped), int(not verdict.dropped))
        if len(rule.examples) < _EXAMPLES or priority < rule.examples[-1].priority:
            before, after = _excerpts(text, document.text, verdict.dropped)
            before, after = (after, "") if masked else (before, after)
            counted.examples = [Example(priority, document.id, before, verdict.detail, after)]
        rule.merge(counted)
        if listed and len(self.matches) < _MATCHES:
            self.matches.append({"id": document.id, "rule": verdict.rule, "match": verdict.detail})

    def merge(self, other: Self) -> None:
        """Add the counts of a later part."""
        self.read += other.read
        for name, rule in other.rules.items():
            self.rules.setdefault(name, RuleTally()).merge(rule)
        self.matches = [*self.matches, *other.matches][:_MATCHES]


def _excerpts(before: str, after: str, dropped: bool) -> tuple[str, str]:
    """Return the start of a dropped text, or a changed text around its first change, before and after."""
    if dropped:
        return before[:_SHOWN], ""
    pairs = enumerate(zip(before, after, strict=False))
    first_change = next((place for place, (old, new) in pairs if old != new), min(len(before), len(after)))
    start = max(0, first_change - _UNCHANGED)
    cut = "…" if start else ""
    return cut + before[start : start + _SHOWN], cut + after[start : start + _SHOWN]


@dataclass(frozen=True)
class PartTally:
    """The result of a pass for one part."""

    digest: str  # of the documents; empty after the first pass
    empty: int  # documents without text after their markup was removed
    markup: StepTally  # the other documents, and those whose markup could not be removed
    kept: int  # documents
    languages: dict[str, int]  # documents of each language, if their metadata tells it
    steps: list[StepTally]
