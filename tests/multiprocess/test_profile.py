"""`deepcloze pretrain --profile`."""

import json
from pathlib import Path

import pytest

from pretrain.training.profiler import PROFILED, SKIPPED
from rank_pool import RankPool
from runs import pretrain_case, run_config, soak, step_events


@pytest.mark.parametrize("ds_config", ["bf16_zero1", *soak("fp32_zero0", "fp32_zero2")])
def test_a_profile_shows_the_parts_of_a_step(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str
) -> None:
    """Catches a part of the step that is missing or counted twice, a profile of every rank, and other losses."""
    profiled, plain = (
        run_config(
            tmp_path / name,
            wordpiece_corpus,
            ds_config,
            run__profile=name == "profiled",
            schedule__steps=SKIPPED + PROFILED + 1,
        )
        for name in ("profiled", "plain")
    )
    assert [*pools[2].run(pretrain_case, profiled), *pools[2].run(pretrain_case, plain)] == ["done"] * 4
    text = (tmp_path / "profiled" / "profile" / "profile.txt").read_text(encoding="utf-8")
    for part in ("data", "forward", "backward", "update weights", "wait for ranks", "aten::"):
        assert part in text
    rest = next(line for line in text.splitlines() if "the rest" in line)
    assert float(rest.split("│")[2]) >= 0, "parts of a step do not overlap"
    trace = json.loads((tmp_path / "profiled" / "profile" / "trace.json").read_text(encoding="utf-8"))
    steps = {event["name"] for event in trace["traceEvents"] if str(event.get("name")).startswith("ProfilerStep")}
    assert len(steps) == PROFILED
    losses = [[event["loss"] for event in step_events(tmp_path / name)] for name in ("profiled", "plain")]
    assert losses[0] == losses[1]


def test_a_run_that_is_too_short_says_so(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a profile that is silently missing."""
    pools[1].run(pretrain_case, run_config(tmp_path, wordpiece_corpus, run__profile=True, schedule__steps=3))
    assert not (tmp_path / "profile").exists()
    (written,) = (tmp_path / "logs").glob("rank-0*.log")
    assert "before its steps 5 to 7 were profiled" in written.read_text(encoding="utf-8")
