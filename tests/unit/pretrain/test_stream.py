"""The stream of a run, from its config: stages, batch warmup, a mixture and a masking rate that changes, together."""

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
from pretrain.batching.masking import MaskingSchedule
from pretrain.config import PretrainConfig
from pretrain.resolve import ResolvedRun, resolve
from pretrain.stream import TrainingStream, open_stream
from pretrain.world import World

TINY = {"model_type": "bert", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
Open = Callable[..., TrainingStream]
Origin = tuple[int, int, int]  # corpus, epoch, sequence

STAGES = [
    {"steps": 6, "max_seq_length": 16, "sequences": 50, "microbatch_tokens": 64},
    {"steps": 5},
    {"max_seq_length": 64, "sequences": 9},
]


@pytest.fixture
def open_(wordpiece_corpus: Path, heldout_corpus: Path) -> Open:
    """The stream of a run whose mixture is of the training corpus (weight 3) and the held-out one (weight 1)."""

    def open_it(world: World = World(), mixed: bool = True, **sections: Any) -> TrainingStream:  # noqa: B008 (it is frozen)
        run = resolved(wordpiece_corpus, heldout_corpus, mixed, sections)
        return open_stream(run, world, packed=True, first_position=0)

    return open_it


def resolved(train: Path, heldout: Path, mixed: bool, sections: dict[str, Any]) -> ResolvedRun:
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


def everything(steps: int = 16) -> dict[str, Any]:
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


def test_a_batch_is_the_same_alone_and_in_order(open_: Open) -> None:
    """Catches state anywhere between the config and a batch, in stages, warmup, mixture or masking rate."""
    in_order = list(open_(**everything()).load(0, on_gpu=False))
    assert [batch.step for batch in in_order] == list(range(16))
    for step in (0, 5, 6, 10, 11, 15):
        assert equal(open_(**everything())[step], in_order[step])
    assert equal(next(open_(**everything()).load(6, on_gpu=False)), in_order[6])


def test_stages_have_their_own_lengths_and_batches_that_grow(open_: Open) -> None:
    """Catches a stage that begins a step early or late, keeps another's sizes, or restarts the warmup."""
    stream = open_(**everything())
    batches = [stream[step] for step in range(16)]
    assert [batch.microbatches[0].input_ids.shape[1] for batch in batches] == [16] * 6 + [32] * 5 + [64] * 5
    full = [50] * 6 + [29] * 5 + [9] * 5
    grown = [sequences * min(1.0, (step + 1) / 9) for step, sequences in enumerate(full)]
    assert [batch.sequences for batch in batches] == pytest.approx(grown, abs=1)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_each_stage_begins_fresh_epochs(open_: Open, stage: int) -> None:
    """Catches sequences lost or seen twice in an epoch of any corpus and stage, and streams that go on over a cut."""
    first = (0, 6, 11)[stage]
    stream = open_(**everything(steps=200))
    maker = stream.makers[stage]
    seen = [origin for step in range(first, first + 60) for origin in origins(maker[step])]
    assert len(seen) == len(set(seen))
    for corpus, source in enumerate(maker.corpora):
        own = [(epoch, sequence) for number, epoch, sequence in seen if number == corpus]
        assert min(epoch for epoch, _ in own) == 0
        for epoch in range(max(epoch for epoch, _ in own)):
            assert sorted(sequence for of, sequence in own if of == epoch) == list(range(len(source.index)))


@pytest.mark.parametrize("world_size", [*range(1, 9), 22])
def test_all_ranks_together_see_each_sequence_once(open_: Open, world_size: int) -> None:
    """Catches sequences that are lost, doubled or masked otherwise between ranks, in every stage."""
    stream = open_(**everything())
    for step in (2, 8, 14):
        maker = stream.makers[(0, 1, 2)[(step > 5) + (step > 10)]]
        whole = stream[step]
        share = [dataclasses.replace(maker, world=World(rank, world_size))[step] for rank in range(world_size)]
        assert sorted(origin for batch in share for origin in origins(batch)) == sorted(origins(whole))
        assert sum(batch.masked_tokens for batch in share) == whole.masked_tokens
        assert {batch.fingerprint for batch in share} == {whole.fingerprint}
        assert np.array_equal(np.sum([batch.corpus_tokens for batch in share], axis=0), whole.corpus_tokens)


def test_sequences_of_a_mixture_keep_their_own_text(open_: Open) -> None:
    """Catches texts or labels of one corpus that land in the slots of another's sequences."""
    maker = open_().makers[0]
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


def test_weights_are_shares_of_the_tokens(open_: Open) -> None:
    """Catches weights that are taken for shares of the sequences, or of the corpora's own sizes."""
    stream = open_(schedule={"steps": 150})
    tokens = np.sum([stream[step].corpus_tokens for step in range(150)], axis=0)
    assert tokens[0] / tokens.sum() == pytest.approx(0.75, abs=0.01)
    short, long = (source.corpus.tokens / len(source.index) for source in stream.makers[0].corpora)
    assert abs(short / long - 1) > 0.02, "the corpora's sequences are too alike for this test"


def test_a_length_in_tokens_is_met(open_: Open) -> None:
    """Catches a token count that forgets special tokens, stages, batch warmup or the mixture."""
    wanted = {"tokens": 150_000, "batch_warmup_steps": 30, "stages": STAGES}
    stream = open_(schedule=wanted)
    assert stream.steps is not None
    tokens = sum(stream[step].tokens for step in range(stream.steps))
    assert tokens == pytest.approx(150_000, rel=0.02)
    with pytest.raises(UserError, match=r"schedule\.tokens: the first 2 of schedule\.stages take about"):
        open_(schedule=wanted | {"tokens": 500})


@pytest.mark.parametrize("warmup", [0, 12])
def test_epochs_end_with_the_last_sequence(open_: Open, warmup: int) -> None:
    """Catches an epochs run that is a batch too short or too long when batches grow."""
    stream = open_(mixed=False, schedule={"epochs": 2.0, "batch_warmup_steps": warmup})
    assert stream.steps is not None
    seen = [origin for step in range(stream.steps) for origin in origins(stream[step])]
    sequences = len(stream.makers[0].corpora[0].index)
    assert sorted(seen) == [(0, epoch, sequence) for epoch in range(2) for sequence in range(sequences)]


def test_a_budget_has_no_last_step(open_: Open) -> None:
    """Catches a stream that ends before the clock says so."""
    stream = open_(schedule={"budget": "1m"})
    assert stream.steps is None
    assert stream[10**9].sequences == 29


def test_the_masking_rate_follows_the_run(open_: Open) -> None:
    """Catches a rate that stays as it was, or that held-out text and training text end with differently."""
    stream = open_(**everything(steps=100))
    shares = [
        np.sum([stream[step].masked_tokens for step in steps])
        / np.sum([stream[step].tokens - 2 * stream[step].sequences for step in steps])
        for steps in (range(12, 20), range(46, 54), range(92, 100))
    ]
    assert shares == pytest.approx([0.4 - 0.2 * 15.5 / 49.5, 0.2, 0.1 + 0.1 * 3.5 / 49.5], rel=0.1)


def test_masks_of_another_stage_are_others(open_: Open) -> None:
    """Catches a second stage that shows a sequence with the very masks of the first."""
    stream = open_(mixed=False, schedule={"steps": 9, "stages": [{"steps": 4}, {}]}, masking={"rate": 0.3})
    first, second = (maker.corpora[0].masker for maker in stream.makers)
    ids = np.arange(50)
    sequences = stream[0].origins._replace(corpora=ids * 0, epochs=ids * 0, ids=ids)
    assert not np.intersect1d(first.keys(sequences), second.keys(sequences)).size
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
def test_masking_rates_are_their_closed_form(rate: MaskingSchedule, expected: list[float]) -> None:
    """Catches unequal parts, and a line that misses a rate on its way or its end."""
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
def test_what_does_not_fit_together_is_refused(
    wordpiece_corpus: Path, heldout_corpus: Path, sections: dict[str, Any], parts: list[str]
) -> None:
    """Catches stages that outgrow the model or their microbatches, and lengths nobody can reckon with."""
    with pytest.raises(UserError) as refused:
        resolved(wordpiece_corpus, heldout_corpus, True, sections)
    assert all(part in str(refused.value) for part in parts)


def test_a_mixture_of_what_does_not_mix_is_refused(
    wordpiece_corpus: Path, byte_level_corpus: Path, heldout_corpus: Path
) -> None:
    """Catches ids of two tokenizers in one batch, and a corpus that is there twice under two names."""
    with pytest.raises(UserError, match="another tokenizer"):
        resolved(wordpiece_corpus, byte_level_corpus, True, {})
    with pytest.raises(UserError, match="the same corpus"):
        resolved(wordpiece_corpus, wordpiece_corpus, True, {})


def test_corpora_of_a_mixture_have_names_that_tell_them_apart(
    wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches figures of two corpora that are logged under one name."""
    run = resolved(wordpiece_corpus, heldout_corpus, True, {})
    assert [given.name for given in run.corpora] == ["text", "text-heldout"]
    namesake = shutil.copytree(heldout_corpus, tmp_path / "other" / "text")
    run = resolved(wordpiece_corpus, namesake, True, {})
    assert [given.name for given in run.corpora] == [f"{wordpiece_corpus.parent.name}/text", "other/text"]
