"""Where a fork begins to read its corpora, compared with what its parent has read of them."""

import logging
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

from experiment.config import flatten, with_defaults
from experiment.formatting import counted
from experiment.run_files.checkpoints import read_state
from pretrain.batching.order import BatchSizes, ShuffledOrder, stage_sizes
from pretrain.config import PretrainConfig
from pretrain.resolve import ResolvedRun
from pretrain.training_stream import TrainingStream

log = logging.getLogger(__name__)

_MOST_CORPORA = 4  # in the warning


def warn_of_shifts(run: ResolvedRun, stream: TrainingStream) -> None:
    """Warn if a fork reads sequences again that its parent has read in the same epoch, or skips some."""
    plan = run.resume_plan
    if not plan.fork or plan.same_stream:
        return
    assert plan.checkpoint is not None
    shifts = position_shifts(stream, run.identity, read_state(plan.checkpoint)["identity"], plan.step)
    largest = sorted(shifts.items(), key=lambda shift: -abs(shift[1]))[:_MOST_CORPORA]
    parts = [
        f"{'skips' if shift < 0 else 'repeats'} about {counted(abs(shift), 'sequence')} of {name}"
        for name, shift in largest
    ]
    if parts:
        log.warning(
            "the fork does not continue where its parent has stopped reading, since batches or corpora differ: it %s",
            ", and ".join(parts),
        )


def position_shifts(
    stream: TrainingStream, now: Mapping[str, Any], before: Mapping[str, Any], step: int
) -> dict[str, int]:
    """Return how many sequences of each corpus a fork at `step` reads again, or, if negative, skips.

    Only corpora whose order is the same in both are compared, and none if the fork lacks one of its parent's.

    Args:
        stream: of the fork.
        now, before: identities of the fork and of its parent, see `run_identity`.
    """
    theirs = with_defaults(flatten(before), PretrainConfig)
    epochs_read, sizes = _epochs_at(theirs, max(0, step - 1))
    ours = bisect_right(stream.first_steps, step) - 1
    maker, order, train = stream.makers[ours], stream.orders[ours], theirs["corpus.train"]
    weights: dict[str, float] = dict(train) if isinstance(train, list) else {train: 1.0}
    places = {each.corpus.fingerprint: place for place, each in enumerate(maker.corpora)}
    is_same_order = epochs_read == _epochs_at(with_defaults(flatten(now), PretrainConfig), step)[0] and all(
        theirs.get(key, now[key]) == now[key] for key in ("run.seed", "corpus.special_tokens")
    )
    if not is_same_order or not weights.keys() <= places.keys():
        return {}
    shares = []
    for fingerprint, weight in weights.items():
        each = maker.corpora[places[fingerprint]]
        shares.append(weight / (each.corpus.tokens / len(each.index) + maker.vocabulary.num_special_tokens))
    parent = ShuffledOrder(tuple(order.corpora[places[found]] for found in weights), sizes, shares=tuple(shares))
    read, begin = (each.positions_by_corpus(each.start(step)) for each in (parent, order))
    shifts = {places[found]: int(count - begin[places[found]]) for found, count in zip(weights, read, strict=True)}
    for place in set(range(len(begin))) - set(shifts):  # corpora that the parent did not have
        shifts[place] = -int(begin[place] % order.corpora[place].sequences)
    return {stream.corpora[place]: shift for place, shift in shifts.items() if shift}


def _epochs_at(identity: Mapping[str, Any], step: int) -> tuple[tuple[int, int], BatchSizes]:
    """Return what the epochs of a step are: number of the stage that started them, length of the sequences; and the
    batch sizes there."""
    stages = identity["schedule.stages"] or [[0, identity["batch.max_seq_length"], identity["batch.sequences"]]]
    begun = number = bisect_right([stage[0] for stage in stages], step) - 1
    while "continued" in stages[begun]:
        begun -= 1
    own = [tuple(stage[:3]) for stage in stages[begun : number + 1]]
    return (begun, own[-1][1]), stage_sizes(own, identity["schedule.batch_warmup_steps"])[-1][1]
