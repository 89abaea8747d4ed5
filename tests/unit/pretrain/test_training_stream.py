"""The stream of a run: stages, batch warmup, a mixture and a scheduled masking rate, together."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiment.config import build_config
from experiment.errors import UserError
from pretrain.batching.batch import IGNORED, RankBatch
from pretrain.batching.loader import BatchLoader
from pretrain.batching.masking import MaskingSchedule
from pretrain.config import PretrainConfig
from pretrain.resolve import ResolvedRun, resolve
from pretrain.resume import ResumePlan
from pretrain.training_stream import TrainingStream, open_stream, run_layout
from pretrain.world import World
from waiting import LIMIT

TINY = {"model_type": "bert", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
OpenStream = Callable[..., TrainingStream]
Origin = tuple[int, int, int]  # corpus, epoch, sequence

STAGES = [
    {"steps": 6, "max_seq_length": 16, "sequences": 50, "microbatch_tokens": 64},
    {"steps": 5},
    {"max_seq_length": 64, "sequences": 9},
]


@pytest.fixture
def open_run_stream(wordpiece_corpus: Path, heldout_corpus: Path) -> OpenStream:
    """Returns a function that opens a stream, of a mixture of the training and the held-out corpus, 3 to 1."""

    def open_with(
        world: World = World(),  # noqa: B008 (it is frozen)
        mixed: bool = True,
        attention_ratio: float | None = None,
        **sections: Any,
    ) -> TrainingStream:
        run = resolve_run(wordpiece_corpus, heldout_corpus, mixed, sections)
        return open_stream(run, world, run_layout(run, "packed"), attention_ratio)

    return open_with


def resolve_run(train: Path, heldout: Path, mixed: bool, sections: dict[str, Any]) -> ResolvedRun:
    mixture = [{"path": str(train), "weight": 3.0}, {"path": str(heldout), "weight": 1.0}]
    tree = {
        "run": {"dir": "unused", "seed": 4},
        "model": {"config": TINY | {"max_position_embeddings": 64}},
        "corpus": {"train": mixture if mixed else str(train)},
        "batch": {"sequences": 29, "max_seq_length": 32, "microbatch_tokens": 128},
        "schedule": {"steps": 16},
        "engine": {"ds_config": "ds_configs/fp32_zero1.json"},
    }
    return resolve(build_config(PretrainConfig, tree | sections), 1)


def changing_batches(steps: int = 16) -> dict[str, Any]:
    return {
        "schedule": {"steps": steps, "batch_warmup_steps": 8, "stages": STAGES},
        "masking": {"rate": [0.4, 0.2, 0.1], "schedule": "linear"},
    }


def origins(batch: RankBatch) -> list[Origin]:
    return list(zip(*(column.tolist() for column in batch.origins), strict=True))


def equal(one: RankBatch, other: RankBatch) -> bool:
    pairs = zip(one.microbatches, other.microbatches, strict=True)
    same = all(torch.equal(a, b) for left, right in pairs for a, b in zip(left, right, strict=True))
    return same and one.step == other.step and one.fingerprint == other.fingerprint


def test_batches_are_the_same_alone_and_in_order(open_run_stream: OpenStream) -> None:
    """Catches a batch that depends on what was read before, in stages, warmup, mixture or masking rate."""
    stream = open_run_stream(**changing_batches())
    in_order = list(BatchLoader(stream, 0, stream.steps, workers=1, timeout=LIMIT))
    assert [batch.step for batch in in_order] == list(range(16))
    for step in (0, 5, 6, 10, 11, 15):
        assert equal(open_run_stream(**changing_batches())[step], in_order[step])
    later = BatchLoader(open_run_stream(**changing_batches()), 6, stream.steps, workers=1, timeout=LIMIT)
    assert equal(next(later), in_order[6])


def test_stages_have_their_own_lengths_and_batch_sizes(open_run_stream: OpenStream) -> None:
    """Catches a stage that starts a step early or late, has another stage's sizes, or restarts the warmup."""
    stream = open_run_stream(**changing_batches())
    batches = [stream[step] for step in range(16)]
    assert [batch.microbatches[0].input_ids.shape[1] for batch in batches] == [16] * 6 + [32] * 5 + [64] * 5
    full = [50] * 6 + [29] * 5 + [9] * 5
    grown = [sequences * min(1.0, (step + 1) / 9) for step, sequences in enumerate(full)]
    assert [len(batch.origins.ids) for batch in batches] == pytest.approx(grown, abs=1)


def test_each_stage_has_its_own_width_of_rows(open_run_stream: OpenStream) -> None:
    """Catches a width that is chosen for the sequences of another stage, or that other steps of the run change."""
    stream, again = (open_run_stream(attention_ratio=0.0, **changing_batches()) for _ in range(2))
    longest = [maker.layout.max_seq_length for maker in stream.makers]
    widths = [maker.layout.row_width for maker in stream.makers]
    assert longest == [16, 32, 64]
    assert all(length <= width <= 2 * length for length, width in zip(longest, widths, strict=True))
    assert widths != longest
    assert widths == [again[step].microbatches[0].input_ids.shape[1] for step in (3, 8, 12)]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_stage_of_another_length_starts_new_epochs(open_run_stream: OpenStream, stage: int) -> None:
    """Catches sequences that are lost or repeated in an epoch of a corpus, and epochs that span two stages."""
    first = (0, 6, 11)[stage]
    stream = open_run_stream(**changing_batches(steps=200))
    maker = stream.makers[stage]
    seen = [origin for step in range(first, first + 60) for origin in origins(maker[step])]
    assert len(seen) == len(set(seen))
    for corpus, source in enumerate(maker.corpora):
        own = [(epoch, sequence) for number, epoch, sequence in seen if number == corpus]
        assert min(epoch for epoch, _ in own) == 0
        for epoch in range(max(epoch for epoch, _ in own)):
            assert sorted(sequence for of, sequence in own if of == epoch) == list(range(len(source.index)))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("warmup", [0, 7])
def test_a_stage_of_the_same_length_continues_the_epochs(open_run_stream: OpenStream, mixed: bool, warmup: int) -> None:
    """Catches sequences that are lost or repeated where only the size of batches or microbatches changes, and a stage
    after it that does not start new epochs."""
    stages = [
        {"steps": 3, "sequences": 13},
        {"steps": 9, "microbatch_tokens": 96},
        {"steps": 40, "sequences": 40},
        {"max_seq_length": 64},
    ]
    stream = open_run_stream(mixed=mixed, schedule={"steps": 55, "batch_warmup_steps": warmup, "stages": stages})
    seen = [origin for step in range(52) for origin in origins(stream[step])]
    assert len(seen) == len(set(seen)) == stream.orders[2].start(52)
    for corpus, source in enumerate(stream.makers[0].corpora):
        first_epoch = [sequence for number, epoch, sequence in seen if (number, epoch) == (corpus, 0)]
        assert sorted(first_epoch) == list(range(len(source.index)))
        assert (corpus, 1) in {(number, epoch) for number, epoch, _ in seen}
    assert {epoch for _, epoch, _ in origins(stream[52])} == {0}


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("mixed", [False, True])
def test_equal_stages_are_one_stage(open_run_stream: OpenStream, mixed: bool, warmup: int) -> None:
    """Catches batches, epochs, tokens or a length that depend on how a run is divided into stages."""
    plain = {"steps": 20, "batch_warmup_steps": warmup}
    stages = {"stages": [{"steps": 6}, {"steps": 5}, {}]}
    split, whole = (open_run_stream(mixed=mixed, schedule=plain | more) for more in (stages, {}))
    length = {"steps": None, "tokens": 20_000}
    by_tokens = [open_run_stream(mixed=mixed, schedule=plain | length | more).steps for more in (stages, {})]
    assert by_tokens[0] == by_tokens[1]
    assert all(equal(split[step], whole[step]) for step in range(20))
    for step in (3, 9, 20):
        assert split.tokens_per_epoch(step) == pytest.approx(whole.tokens_per_epoch(step))
    assert split.epochs == whole.epochs


@pytest.mark.parametrize("world_size", [*range(1, 9), 22])
def test_all_ranks_together_see_each_sequence_once(open_run_stream: OpenStream, world_size: int) -> None:
    """Catches sequences that are lost, repeated or masked differently at some world size, in every stage."""
    stream = open_run_stream(**changing_batches())
    for step in (2, 8, 14):
        maker = stream.makers[(0, 1, 2)[(step > 5) + (step > 10)]]
        whole = stream[step]
        share = [dataclasses.replace(maker, world=World(rank, world_size))[step] for rank in range(world_size)]
        assert sorted(origin for batch in share for origin in origins(batch)) == sorted(origins(whole))
        assert sum(batch.masked_tokens for batch in share) == whole.masked_tokens
        assert {batch.fingerprint for batch in share} == {whole.fingerprint}
        assert np.array_equal(np.sum([batch.corpus_tokens for batch in share], axis=0), whole.corpus_tokens)


def test_sequences_of_a_mixture_keep_their_own_text(open_run_stream: OpenStream) -> None:
    """Catches text or labels of one corpus in the slots of another corpus's sequences."""
    maker = open_run_stream().makers[0]
    batch = maker[3]
    corpora, _, ids = batch.origins
    assert set(corpora) == {0, 1}
    for micro in batch.microbatches:
        restored, segments = micro.input_ids.reshape(-1).clone(), micro.segments.reshape(-1)
        real = micro.labels != IGNORED
        restored[micro.masked_positions[real]] = micro.labels[real]
        for segment in segments.unique()[segments.unique() != 0].tolist():
            source, sequence = maker.corpora[corpora[segment - 1]], ids[segment - 1]
            start, end = source.index.starts[sequence : sequence + 2]
            text = source.corpus.read(np.array([start]), np.array([end - start]))
            assert restored[segments == segment][1:-1].tolist() == text.tolist()


def test_weights_are_shares_of_the_tokens(open_run_stream: OpenStream) -> None:
    """Catches weights that are applied to sequences, or multiplied with the sizes of the corpora."""
    stream = open_run_stream(schedule={"steps": 150})
    tokens = np.sum([stream[step].corpus_tokens for step in range(150)], axis=0)
    assert tokens[0] / tokens.sum() == pytest.approx(0.75, abs=0.01)
    short, long = (source.corpus.tokens / len(source.index) for source in stream.makers[0].corpora)
    assert abs(short / long - 1) > 0.02, "the sequence lengths of the corpora should differ"


def test_schedule_tokens_is_the_length_of_the_run(open_run_stream: OpenStream) -> None:
    """Catches a token count without special tokens, stages, batch warmup or the mixture."""
    wanted = {"tokens": 150_000, "batch_warmup_steps": 30, "stages": STAGES}
    stream = open_run_stream(schedule=wanted)
    tokens = sum(stream[step].tokens for step in range(stream.steps))
    assert tokens == pytest.approx(150_000, rel=0.02)
    with pytest.raises(UserError, match=r"schedule\.tokens: the first 2 of schedule\.stages take about"):
        open_run_stream(schedule=wanted | {"tokens": 500})


@pytest.mark.parametrize("warmup", [0, 12])
def test_epochs_end_with_the_last_sequence(open_run_stream: OpenStream, warmup: int) -> None:
    """Catches a run by epochs that is a batch too short or too long, with and without batch warmup."""
    stream = open_run_stream(mixed=False, schedule={"epochs": 2.0, "batch_warmup_steps": warmup})
    seen = [origin for step in range(stream.steps) for origin in origins(stream[step])]
    sequences = len(stream.makers[0].corpora[0].index)
    assert sorted(seen) == [(0, epoch, sequence) for epoch in range(2) for sequence in range(sequences)]


def test_which_last_batch_is_a_small_rest(open_run_stream: OpenStream) -> None:
    """Catches a check of gradient norms that a whole batch, or a batch before the last one, escapes."""
    sequences = len(open_run_stream(mixed=False).makers[0].corpora[0].index)
    for rest, is_small in ((2, True), (3, False), (29, False)):
        stream = open_run_stream(mixed=False, schedule={"epochs": (2 * 29 + rest) / sequences})
        assert len(stream[2].origins.ids) == rest
        assert [stream.is_small_rest(step) for step in range(3)] == [False, False, is_small]
    assert not any(map(open_run_stream(schedule={"budget": "1m"}).is_small_rest, range(3)))


def test_a_budget_has_no_last_step(open_run_stream: OpenStream) -> None:
    """Catches a stream that ends before its time budget."""
    stream = open_run_stream(schedule={"budget": "1m"})
    assert stream.steps is None
    assert len(stream[10**9].origins.ids) == 29


def test_the_masking_rate_follows_the_run(open_run_stream: OpenStream) -> None:
    """Catches a masking rate that is constant, or does not reach its last value."""
    stream = open_run_stream(**changing_batches(steps=100))
    shares = [
        np.sum([stream[step].masked_tokens for step in steps])
        / np.sum([stream[step].tokens - 2 * len(stream[step].origins.ids) for step in steps])
        for steps in (range(12, 20), range(46, 54), range(92, 100))
    ]
    assert shares == pytest.approx([0.4 - 0.2 * 15.5 / 49.5, 0.2, 0.1 + 0.1 * 3.5 / 49.5], rel=0.1)


def test_masks_differ_between_stages(open_run_stream: OpenStream) -> None:
    """Catches a stage of another length that repeats the masks of the stage before."""
    stages = [{"steps": 4, "max_seq_length": 31}, {}]
    stream = open_run_stream(mixed=False, schedule={"steps": 9, "stages": stages}, masking={"rate": 0.3})
    first, second = (maker.corpora[0].masker for maker in stream.makers)
    ids = np.arange(50)
    sequences = stream[0].origins._replace(corpora=ids * 0, epochs=ids * 0, ids=ids)
    assert not np.intersect1d(first._keys(sequences), second._keys(sequences)).size
    assert origins(stream[0]) != origins(stream[4])


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (MaskingSchedule((0.3, 0.15, 0.05), "stepped", 9), [0.3] * 3 + [0.15] * 3 + [0.05] * 3),
        (MaskingSchedule((0.3, 0.15), "stepped", 5), [0.3] * 3 + [0.15] * 2),
        (MaskingSchedule((0.3, 0.1), "linear", 5), [0.3, 0.25, 0.2, 0.15, 0.1]),
        (MaskingSchedule((0.3, 0.1, 0.4), "linear", 5), [0.3, 0.2, 0.1, 0.25, 0.4]),
    ],
)
def test_masking_rates_equal_their_formulas(rate: MaskingSchedule, expected: list[float]) -> None:
    """Catches parts of unequal length, and a line that misses one of the given rates or the end."""
    assert [rate.at(step) for step in range(len(expected))] == pytest.approx(expected)
    assert rate.at(len(expected)) == rate.rates[-1], "a step beyond the end"
    assert math.isclose(MaskingSchedule(rate.rates, rate.schedule, 1).at(0), rate.rates[0])


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"schedule": {"steps": 9, "stages": [{"steps": 3, "max_seq_length": 65}, {}]}}, ["65", "64"]),
        ({"schedule": {"steps": 9, "stages": [{"steps": 3, "max_seq_length": 256}, {}]}}, ["(128)", "(256)"]),
        ({"schedule": {"epochs": 1}}, ["schedule.epochs", "mixture"]),
        ({"schedule": {"budget": "1m"}, "masking": {"rate": [0.3, 0.1], "schedule": "linear"}}, ["masking.schedule"]),
    ],
)
def test_conflicting_settings_are_rejected(
    wordpiece_corpus: Path, heldout_corpus: Path, sections: dict[str, Any], parts: list[str]
) -> None:
    """Catches stages longer than the model or microbatch allows, and run lengths that cannot be computed."""
    with pytest.raises(UserError) as rejected:
        resolve_run(wordpiece_corpus, heldout_corpus, True, sections)
    assert all(part in str(rejected.value) for part in parts)


def test_invalid_mixtures_are_rejected(wordpiece_corpus: Path, byte_level_corpus: Path, heldout_corpus: Path) -> None:
    """Catches ids of two tokenizers in one batch, and a corpus that is listed twice."""
    with pytest.raises(UserError, match="another tokenizer"):
        resolve_run(wordpiece_corpus, byte_level_corpus, True, {})
    with pytest.raises(UserError, match="the same corpus"):
        resolve_run(wordpiece_corpus, wordpiece_corpus, True, {})


def test_corpora_of_a_mixture_have_unique_names(wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path) -> None:
    """Catches metrics of two corpora under one name."""
    run = resolve_run(wordpiece_corpus, heldout_corpus, True, {})
    assert [given.name for given in run.corpora] == ["text", "text-heldout"]
    namesake = shutil.copytree(heldout_corpus, tmp_path / "other" / "text")
    run = resolve_run(wordpiece_corpus, namesake, True, {})
    assert [given.name for given in run.corpora] == [f"{wordpiece_corpus.parent.name}/text", "other/text"]


@pytest.mark.parametrize("length", [{"epochs": 0.5}, {"tokens": 3000}, {"steps": 8}])
def test_a_fork_ends_after_its_parents_step(
    wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path, length: dict[str, float]
) -> None:
    """Catches a fork that trains nothing and counts as done because its length in epochs or tokens is a total."""
    run = resolve_run(wordpiece_corpus, heldout_corpus, False, {"schedule": length})
    steps = open_stream(run, World(), run_layout(run, "packed")).steps

    def open_fork(step: int) -> TrainingStream:
        fork = dataclasses.replace(run, resume_plan=ResumePlan(tmp_path, step, fork=True))
        return open_stream(fork, World(), run_layout(run, "packed"))

    assert open_fork(steps - 1).steps == steps
    for step in (steps, steps + 5):
        with pytest.raises(UserError, match=rf"the run has {steps} steps, but .* is at step {step} already"):
            open_fork(step)


@pytest.mark.parametrize("schedule", [{}, {"stages": STAGES}, {"batch_warmup_steps": 12}], ids=str)
def test_the_tokens_of_a_fork_are_those_that_its_parent_leaves(
    wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path, schedule: dict[str, Any]
) -> None:
    """Catches a length that is computed as if the parent's batches had been those of the fork, and one that changes
    when the fork resumes."""
    run = resolve_run(wordpiece_corpus, heldout_corpus, False, {"schedule": {"tokens": 50_000, **schedule}})
    planned = ResumePlan(tmp_path, step=8, fork=True, forked_at=8, forked_tokens=45_000)

    def open_with(plan: ResumePlan) -> TrainingStream:
        return open_stream(dataclasses.replace(run, resume_plan=plan), World(), run_layout(run, "packed"))

    stream = open_with(planned)
    own = [stream[step].tokens for step in range(8, stream.steps)]
    assert sum(own[:-1]) - 500 < 5_000 < sum(own) + 500  # lengths are means
    assert open_with(dataclasses.replace(planned, step=stream.steps - 1, fork=False)).steps == stream.steps
    with pytest.raises(UserError, match=r"schedule\.tokens is 5e\+04, but a fork .* has 6e\+04 already"):
        open_with(dataclasses.replace(planned, forked_tokens=60_000))
    if "stages" in schedule:
        with pytest.raises(UserError, match=r"which leaves none of 5e\+04 for the last one"):
            open_with(dataclasses.replace(planned, step=9, fork=False, forked_tokens=60_000))


def test_epochs_are_those_of_all_stages(open_run_stream: OpenStream, wordpiece_corpus: Path) -> None:
    """Catches a start message and a plan with the epochs of one stage, or without those of the batch warmup, a report
    with others, and a list of one corpus that counts as a mixture."""
    stream = open_run_stream(mixed=False, **changing_batches())
    read = [len(origins(stream[step])) for step in range(16)]
    lengths = [len(maker.corpora[0].index) for maker in stream.makers]
    of_stages = [sum(read[:6]) / lengths[0], sum(read[6:11]) / lengths[1], sum(read[11:]) / lengths[2]]
    assert stream.epochs == pytest.approx(sum(of_stages))
    forked = dataclasses.replace(stream, begin=8)
    assert forked.epochs == pytest.approx(sum(read[8:11]) / lengths[1] + of_stages[2]), "without those of its parent"
    tokens = sum(stream[step].tokens for step in range(16))
    assert tokens / stream.tokens_per_epoch(16)["text"] == pytest.approx(stream.epochs, rel=0.02)
    whole = open_run_stream(mixed=False, schedule={"epochs": 2.0})
    assert sum(whole[step].tokens for step in range(whole.steps)) == 2 * whole.tokens_per_epoch(whole.steps)["text"]
    of_a_list = open_run_stream(schedule={"epochs": 2.0}, corpus={"train": [{"path": str(wordpiece_corpus)}]})
    assert of_a_list.steps == whole.steps
    assert equal(of_a_list[whole.steps - 1], whole[whole.steps - 1])
    assert set(open_run_stream(**changing_batches()).tokens_per_epoch(0)) == {"text", "text-heldout"}, "before step 1"
    assert open_run_stream(**changing_batches()).epochs is None, "of a mixture"
