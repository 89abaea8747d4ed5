import pytest

from experiment.config import build_config
from launcher.ranks.microbatch import max_doublings, max_halvings, scaled_microbatch
from pretrain.config import PretrainConfig


def config(stages: list[dict[str, int]], **batch: int) -> PretrainConfig:
    schedule = {"stages": stages} if stages else {"steps": 10}
    tree = {"run": {"dir": "r"}, "model": {"config": {"model_type": "bert"}}, "corpus": {"train": "c"}}
    return build_config(PretrainConfig, tree | {"schedule": schedule, "batch": batch})


STAGES = [{"steps": 5, "max_seq_length": 64, "microbatch_tokens": 100}, {"steps": 5, "sequences": 4}]


@pytest.mark.parametrize(
    ("doublings", "expected"), [(-9, (64, 128)), (-2, (64, 250)), (0, (100, 1000)), (1, (200, 2000))]
)
def test_all_stages_are_scaled(doublings: int, expected: tuple[int, int]) -> None:
    """Catches a stage that keeps its size, or is cut below one sequence, and another global batch."""
    before = config(STAGES, sequences=256, max_seq_length=128, microbatch_tokens=1000)
    after = scaled_microbatch(before, doublings)
    assert tuple(stage.microbatch_tokens for stage in after.stages) == expected
    assert [stage.sequences for stage in after.stages] == [256, 4]


@pytest.mark.parametrize(
    ("stages", "tokens", "ranks", "doublings", "halvings"),
    [
        ([], 1000, 1, 6, 3),  # 32 · 1,000 = 32,000 < 256 · 128 = 32,768
        ([], 1000, 3, 4, 3),  # 86 sequences
        ([], 1000, 300, 0, 3),
        (STAGES, 1000, 2, 7, 3),  # 128 · 64 = 8,192 in the first stage
        ([{"steps": 5}], 128, 2, 7, 0),
        ([{"steps": 5, "max_seq_length": 512, "microbatch_tokens": 512}], 1000, 2, 7, 3),  # of evaluations
        ([{"steps": 5, "microbatch_tokens": 4096}, {"steps": 5}], 1000, 2, 5, 5),  # of the first stage
    ],
)
def test_sizes_end_at_one_sequence_and_at_one_microbatch_per_step(
    stages: list[dict[str, int]], tokens: int, ranks: int, doublings: int, halvings: int
) -> None:
    """Catches trials and restarts with sizes that compute the same as others, and a largest size that is missing."""
    given = config(stages, sequences=256, max_seq_length=128, microbatch_tokens=tokens)
    assert max_doublings(given, ranks) == doublings
    assert max_halvings(given) == halvings
