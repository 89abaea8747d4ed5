"""results.json of several seeds."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from finetune.kinds.regression import Config, Kind
from finetune.resolve import ResolvedRun
from finetune.results.seed_summary import SeedRecord, write_results

EARLIER = {"pearson": 0.5, "spearman": 0.5}
NEW = {**EARLIER, "rmse": 1.0, "mae": 1.0}


@pytest.mark.parametrize("scores", [(NEW, EARLIER), (EARLIER, NEW)])
def test_seeds_of_an_earlier_version_have_fewer_metrics(tmp_path: Path, scores: tuple[dict[str, float], ...]) -> None:
    """Catches a traceback after all training, on a run of which an earlier version has finished a seed."""
    records = {
        seed: SeedRecord({}, 1, [], {"validation": found}, {"validation": {}}, {}, {}, [], None, {})
        for seed, found in enumerate(scores)
    }
    run: Any = SimpleNamespace(
        task=SimpleNamespace(kind=Kind(Config(train="f", validation="f"), ())),
        folder=SimpleNamespace(path=tmp_path, results=tmp_path / "results.json"),
        model=SimpleNamespace(folder=tmp_path, pretrained=True),
    )
    results = write_results(cast(ResolvedRun, run), records)
    assert results["splits"]["validation"].keys() == EARLIER.keys()
