"""Where a fork begins to read, compared with what its parent has read."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from experiment.config import build_config
from pretrain.config import PretrainConfig
from pretrain.fork_position import position_shifts, warn_of_shifts
from pretrain.resolve import ResolvedRun, resolve
from pretrain.resume import ResumePlan
from pretrain.training_stream import TrainingStream, open_stream
from pretrain.world import World

STEP = 5


def open_run(train: Any, **sections: Any) -> tuple[ResolvedRun, TrainingStream]:
    tree = {
        "run": {"dir": "unused"},
        "model": {"config": {"model_type": "bert", "hidden_size": 24, "num_attention_heads": 2}},
        "corpus": {"train": train if isinstance(train, str) else [{"path": path, "weight": w} for path, w in train]},
        "batch": {"sequences": 12, "max_seq_length": 32, "microbatch_tokens": 128},
        "schedule": {"steps": 40},
        "engine": {"ds_config": "ds_configs/fp32_zero1.json"},
    }
    run = resolve(build_config(PretrainConfig, tree | sections), 1)
    return run, open_stream(run, World(), rows="windows", first_position=0)


def read(stream: TrainingStream, steps: Iterable[int]) -> set[tuple[str, int, int]]:
    """The sequences that a run reads in these steps: name of the corpus, epoch, number."""
    origins = [stream[step].origins for step in steps]
    columns = [zip(each.corpora, each.epochs, each.ids, strict=True) for each in origins]
    return {(stream.corpora[corpus], int(epoch), int(number)) for rows in columns for corpus, epoch, number in rows}


BATCH = {"max_seq_length": 32, "microbatch_tokens": 128}


@pytest.mark.parametrize(
    ("before", "now", "changes"),
    [
        ("a", "a", {"batch": {"sequences": 5, **BATCH}}),
        ("a", "a", {"batch": {"sequences": 20, **BATCH}}),
        ("a", "a", {"schedule": {"steps": 40, "batch_warmup_steps": 3}}),
        ("a", "a", {"schedule": {"steps": 40, "stages": [{"steps": 2, "sequences": 4}, {}]}}),
        ("a", "ab", {}),
        ("aaab", "abbb", {}),
    ],
)
def test_sequences_that_a_fork_reads_again_or_skips(
    wordpiece_corpus: Path, heldout_corpus: Path, before: str, now: str, changes: dict[str, Any]
) -> None:
    """Catches a wrong count of the sequences of an epoch that are trained on twice, or not at all."""
    paths = {"a": str(wordpiece_corpus), "b": str(heldout_corpus)}
    mixtures = [[(paths[name], float(count)) for name, count in Counter(text).items()] for text in (before, now)]
    parent, theirs = open_run(mixtures[0])
    fork, ours = open_run(mixtures[1], **changes)
    shifts = position_shifts(ours, fork.identity, json.loads(json.dumps(parent.identity)), STEP)
    assert shifts
    done, next_ones, all_ones = read(theirs, range(STEP)), read(ours, range(STEP, 40)), read(ours, range(40))
    again = Counter(name for name, _, _ in done & next_ones)
    skipped = Counter(name for name, _, _ in all_ones - next_ones - done)
    for name in ours.corpora:
        assert shifts.get(name, 0) == again[name] - skipped[name]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"run": {"dir": "unused", "seed": 7}, "batch": {"sequences": 5, **BATCH}},
        {"batch": {"sequences": 5, "max_seq_length": 16, "microbatch_tokens": 128}},
        {"schedule": {"steps": 40, "stages": [{"steps": STEP}, {"sequences": 4}]}},
    ],
)
def test_another_order_is_not_compared(wordpiece_corpus: Path, changes: dict[str, Any]) -> None:
    """Catches a warning about a fork that continues, or that reads sequences of its own."""
    parent, _ = open_run(str(wordpiece_corpus))
    fork, ours = open_run(str(wordpiece_corpus), **changes)
    assert position_shifts(ours, fork.identity, parent.identity, STEP) == {}


def test_stages_of_a_parent_that_started_new_epochs_are_not_compared(wordpiece_corpus: Path) -> None:
    """Catches a made-up count for a parent of an earlier version, whose stages of one length did not continue."""
    stages = {"schedule": {"steps": 40, "stages": [{"steps": 3, "sequences": 4}, {}]}}
    parent, _ = open_run(str(wordpiece_corpus), **stages)
    earlier = parent.identity | {"schedule.stages": [stage[:3] for stage in parent.identity["schedule.stages"]]}
    fork, ours = open_run(str(wordpiece_corpus), batch={"sequences": 5, **BATCH})
    assert position_shifts(ours, fork.identity, parent.identity, STEP)
    assert position_shifts(ours, fork.identity, earlier, STEP) == {}


def test_a_corpus_that_the_fork_does_not_have_is_not_compared(wordpiece_corpus: Path, heldout_corpus: Path) -> None:
    """Catches a KeyError instead of a fork, and a count without the parent's share of its corpora."""
    parent, _ = open_run([(str(wordpiece_corpus), 1.0), (str(heldout_corpus), 1.0)])
    fork, ours = open_run(str(wordpiece_corpus))
    assert position_shifts(ours, fork.identity, parent.identity, STEP) == {}


@pytest.mark.parametrize("is_fork", [True, False])
def test_the_warning(wordpiece_corpus: Path, tmp_path: Path, is_fork: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a fork that trains on sequences twice without a word, and a warning about each resume."""
    parent, _ = open_run(str(wordpiece_corpus))
    fork, ours = open_run(str(wordpiece_corpus), batch={"sequences": 5, **BATCH})
    (tmp_path / "state.json").write_text(json.dumps({"identity": parent.identity}))
    plan = ResumePlan(tmp_path, step=STEP, fork=is_fork, same_stream=False)
    warn_of_shifts(dataclasses.replace(fork, resume_plan=plan), ours)
    message = f"since batches or corpora differ: it repeats about 35 sequences of {fork.corpora[0].name}"
    assert caplog.text.count(message) == int(is_fork)
