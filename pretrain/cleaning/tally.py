"""Counts and examples of the effects of each step, which add up over parts in any order."""

import heapq
from dataclasses import dataclass, field
from typing import Self

import xxhash

from pretrain.cleaning.step import Document, Verdict

_EXAMPLES = 20
_MATCHES = 10_000
_SHOWN = 400  # characters of an example


@dataclass(order=True, frozen=True)
class Example:
    """A document that a rule was applied to. Those with the smallest priorities are kept: a random choice that does not
    depend on workers or time."""

    priority: int
    id: str
    text: str
    detail: str


@dataclass
class RuleTally:
    dropped: int = 0
    changed: int = 0
    examples: list[Example] = field(default_factory=list)  # the texts before the step, shortened

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

    def count(self, document: Document, text: str, verdict: Verdict | None, listed: bool) -> None:
        """Count a document. text: before the step. listed: whether the step lists its matches."""
        self.read += 1
        if verdict is None:
            return
        priority = xxhash.xxh3_64_intdigest(f"{verdict.rule}\0{document.id}".encode())
        example = Example(priority, document.id, text[:_SHOWN], verdict.detail)
        rule = RuleTally(int(verdict.dropped), int(not verdict.dropped), [example])
        self.rules.setdefault(verdict.rule, RuleTally()).merge(rule)
        if listed and len(self.matches) < _MATCHES:
            self.matches.append({"id": document.id, "rule": verdict.rule, "match": verdict.detail})

    def merge(self, other: Self) -> None:
        """Add the counts of a later part."""
        self.read += other.read
        for name, rule in other.rules.items():
            self.rules.setdefault(name, RuleTally()).merge(rule)
        self.matches = [*self.matches, *other.matches][:_MATCHES]


@dataclass(frozen=True)
class PartTally:
    """The result of a pass for one part."""

    digest: str  # of the documents; empty after the first pass
    empty: int  # documents without text after their markup was removed
    kept: int  # documents
    languages: dict[str, int]  # documents of each language, if their metadata tells it
    steps: list[StepTally]
    observed: list[str]  # names of the arrays
