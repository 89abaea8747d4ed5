"""Warnings about the data of a task, and lengths in tokens, before training."""

import math
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import table as rich_table
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from experiment.formatting import counted, shorten
from experiment.models.tokenizer import decode_token, many_unknown
from finetune.data.columns import CONTEXT, LABEL, TEXT, as_number
from finetune.data.records import Record, Table
from finetune.data.task_config import TaskConfig
from finetune.encoding.examples import Split
from finetune.task_kind import TaskKind

_MANY_NUMBERS = 30  # different labels that are numbers: more are probably a scale

_SHOWN_TOKENS = 40

_PERCENTILES = (50, 90, 99)
_ROUND_TO = 8  # tensor cores prefer multiples of it
_ACCEPTABLE = 0.01  # share of sequences that may be cut without a suggestion


def data_warnings(tables: Mapping[str, Table], kind: TaskKind[Any]) -> list[str]:
    """Return a line for each oddity of the splits, with examples."""
    columns = kind.config.columns
    targets = [role for role, cell_type in columns.cell_types().items() if not cell_type.read_by_model]
    texts = columns.roles(TEXT, CONTEXT)
    lines = [
        f"{split}: {counted(empty, 'row')} with an empty text"
        for split, table in tables.items()
        if (empty := sum(not all(record.values[role].strip() for role in texts) for record in table.records))
    ]
    if train := tables.get("train"):
        for role in columns.roles(LABEL):
            labels = [record.values[role] for record in train.records]
            lines += _odd_labels(labels, role)
            lines += _swapped(labels, [record.values[texts[0]] for record in train.records], role)
        lines += _missing(tables, kind.config)
        lines += _contradictions(train, targets, kind)
    return [*lines, *_shared(tables, targets)]


def _odd_labels(labels: Sequence[str], role: str) -> Iterator[str]:
    counts = Counter(labels)
    if (once := sum(count == 1 for count in counts.values())) > len(counts) / 2:
        yield (
            f"train: {once:,} of {len(counts):,} labels occur only once, such as '{shorten(labels[0])}': is "
            f"task.columns.{role} the column of the labels?"
        )
    elif len(counts) > _MANY_NUMBERS and None not in map(as_number, counts):
        yield f"train: {len(counts):,} labels, and all are numbers: if they are a scale, set task.kind: regression"
    seen: dict[str, str] = {}
    for label in sorted(counts):
        if (other := seen.setdefault(_appearance(label), label)) != label:
            places = " and ".join(f"{each!r} ({counted(counts[each], 'row')})" for each in (other, label))
            yield f"train: the labels {places} look alike, but are two classes"
            break


def _appearance(label: str) -> str:
    """Return a label without case, spaces, invisible characters and full-width forms."""
    characters = unicodedata.normalize("NFKC", label)
    return "".join(each for each in characters if unicodedata.category(each) not in ("Cf", "Zs")).casefold()


def _swapped(labels: Sequence[str], texts: Sequence[str], role: str) -> Iterator[str]:
    if fmean(map(len, labels)) > fmean(map(len, texts)) and len(set(labels)) > len(set(texts)):
        yield (
            f"train: the labels are longer than the texts, such as '{shorten(labels[0])}' for '{shorten(texts[0])}': "
            f"are task.columns.{role} and the text column swapped?"
        )


def _missing(tables: Mapping[str, Table], config: TaskConfig) -> Iterator[str]:
    labels = {
        split: {label for record in table.records for label in config.labels_of(record.values)}
        for split, table in tables.items()
        if table.labelled
    }
    for split, found in labels.items():
        if missing := labels["train"] - found:
            yield f"{split}: no row with {counted(len(missing), 'label')} of train, such as '{shorten(min(missing))}'"


def _contradictions(train: Table, targets: Sequence[str], kind: TaskKind[Any]) -> Iterator[str]:
    first: dict[str, Record] = {}
    found: dict[str, tuple[Record, Record]] = {}
    for record in train.records:
        key = _inputs(record, targets)
        other = first.setdefault(key, record)
        if key not in found and kind.target(record, targets) != kind.target(other, targets):
            found[key] = other, record
    if found:
        one, other = next(iter(found.values()))
        yield f"train: {counted(len(found), 'text')} with different labels, such as in {one.place} and {other.place}"


def _shared(tables: Mapping[str, Table], targets: Sequence[str]) -> Iterator[str]:
    places = {  # of the first row with a text
        split: {_inputs(record, targets): record.place for record in reversed(table.records)}
        for split, table in tables.items()
    }
    for (split, known), (other, found) in combinations(places.items(), 2):
        if shared := [text for text in reversed(found) if text in known]:
            rows = sum(_inputs(record, targets) in known for record in tables[other].records)
            yield (
                f"{other}: {rows:,} of {len(tables[other]):,} rows have a text that is also in {split}, such as in "
                f"{found[shared[0]]} and {known[shared[0]]}"
            )


def _inputs(record: Record, targets: Sequence[str]) -> str:
    """Return the inputs of a record, as a key."""
    return repr({role: value for role, value in record.values.items() if role not in targets})


def describe_example(split: Split, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> str:
    """Return the tokens and the target of the first example, as the model gets them: they show a wrong tokenizer, or
    columns that are swapped. labels: the names of targets that are numbers of labels."""
    example = split.examples[0]
    ids = example.sequences[0].input_ids.tolist()
    first = ids[:_SHOWN_TOKENS]
    names = zip(first, tokenizer.convert_ids_to_tokens(first), strict=True)
    tokens = [decode_token(tokenizer, token) if " " in name else name for token, name in names]
    more = f" … ({len(ids):,} tokens)" if len(ids) > _SHOWN_TOKENS else ""
    shown = "" if example.target is None else f"; target: {_describe_target(example.target, labels)}"
    return f"first example: {' '.join(tokens)}{more}{shown}"


def unknown_warnings(splits: Mapping[str, Split], unknown_id: int | None) -> Iterator[str]:
    """Yield a line for each split with many unknown tokens. unknown_id: of the tokenizer, if it has one."""
    for name, split in splits.items():
        ids = [tokens.input_ids for example in split.examples for tokens in example.sequences]
        share = (torch.cat(ids) == unknown_id).float().mean().item() if ids and unknown_id is not None else 0.0
        yield from many_unknown(name, share)


def _describe_target(target: Any, labels: Sequence[str]) -> str:
    """Describe a target by names of labels: of the only one, of each token, or of the ones that are set."""
    match target.tolist() if isinstance(target, torch.Tensor) else target:
        case int(label) if labels:
            return labels[label]
        case [float(), *_] as are_set if labels:
            return ", ".join(label for label, is_set in zip(labels, are_set, strict=True) if is_set) or "no label"
        case [int(), *_] as of_tokens if labels:
            return " ".join(labels[label] if label >= 0 else "–" for label in of_tokens[:_SHOWN_TOKENS])
        case other:
            return shorten(str(other))


@dataclass(frozen=True)
class Lengths:
    """Lengths of the sequences of a split before they are cut."""

    tokens: NDArray[np.int64]
    share_cut: float

    @classmethod
    def of(cls, split: Split) -> "Lengths":
        sequences = [tokens for example in split.examples for tokens in example.sequences]
        return cls(
            np.array([len(tokens) + tokens.cut for tokens in sequences]),
            sum(tokens.cut > 0 for tokens in sequences) / len(sequences),
        )

    def percentile(self, percent: int) -> int:
        """Return the length that at least this share of the sequences does not exceed."""
        return int(np.percentile(self.tokens, percent, method="higher"))

    def row(self) -> dict[str, str]:
        percentiles = {f"{percent} %": f"{self.percentile(percent):,}" for percent in _PERCENTILES}
        return {**percentiles, "max": f"{self.tokens.max():,}", "cut": f"{self.share_cut:.1%}"}


def print_lengths(console: Console, splits: Mapping[str, Split], positions: int | None) -> None:
    """Print a table on a terminal, a line per split elsewhere, and perhaps a better length.

    positions: of the model; None if it has no limit.
    """
    lengths = {name: Lengths.of(split) for name, split in splits.items() if split.examples}
    rows = {name: found.row() for name, found in lengths.items()}
    if console.is_terminal:
        table = rich_table.Table("tokens of a sequence", *next(iter(rows.values())))
        for name, row in rows.items():
            table.add_row(name, *row.values())
        console.print(table)
    else:
        for name, row in rows.items():
            figures = ", ".join(f"{title} {value}" for title, value in row.items())
            console.print(f"{name}: tokens of a sequence: {figures}")
    if line := suggest_length(lengths, positions):
        console.print(line)


def suggest_length(lengths: Mapping[str, Lengths], positions: int | None) -> str | None:
    """Return a line with a length that holds 99 % of each split, if more than 1 % of one is cut."""
    if all(found.share_cut <= _ACCEPTABLE for found in lengths.values()):
        return None
    needed = _ROUND_TO * math.ceil(max(found.percentile(99) for found in lengths.values()) / _ROUND_TO)
    if positions is not None and needed > positions:
        return f"99 % of the sequences have up to {needed:,} tokens, but the model has {positions:,} positions"
    return f"model.max_seq_length: {needed} would hold 99 % of the sequences"
