"""Small runs still give the recorded results."""

import json
import shutil
from pathlib import Path

import pytest

from golden_runs import HERE, RANKS, RECORDED, RUNS, build_corpora, results_of, resumed
from rank_pool import RankPool
from runs import logged, pretrain_case

# Other CPUs sum in another order, which Adam amplifies; a change of masks, rates or order is far outside.
RELATIVE = {"fp32": 1e-3, "bf16": 2e-2}


@pytest.fixture(scope="module")
def corpora(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_corpora(text_file, tmp_path_factory.mktemp("golden_corpora"))


@pytest.mark.parametrize("name", RUNS)
def test_results_are_those_recorded(
    name: str, pools: dict[int, RankPool], corpora: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Catches an unintended change of order, masks, schedules, gradients, optimizers or averages."""
    found = results_of(name, pools[RANKS], corpora, tmp_path)
    path = RECORDED / f"{name}.json"
    if request.config.getoption("--record"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    expected = json.loads(path.read_text(encoding="utf-8"))
    relative = RELATIVE["bf16" if name == "bf16" else "fp32"]
    assert found["masks"] == expected["masks"]
    assert len(found["steps"]) == len(expected["steps"])
    for event, recorded in zip(found["steps"], expected["steps"], strict=True):
        assert {key: event[key] for key in ("step", "tokens")} == {key: recorded[key] for key in ("step", "tokens")}
        assert event["lr"] == pytest.approx(recorded["lr"], rel=1e-12)
        assert event["loss"] == pytest.approx(recorded["loss"], rel=relative)
        assert event["grad_norm"] == pytest.approx(recorded["grad_norm"], rel=10 * relative)
    assert len(found["evaluations"]) == len(expected["evaluations"])
    for event, recorded in zip(found["evaluations"], expected["evaluations"], strict=True):
        assert event == pytest.approx(recorded, rel=relative, abs=2e-2)
    assert found["norms"] == pytest.approx(expected["norms"], rel=10 * relative)


def test_a_checkpoint_of_version_0_1_resumes(pools: dict[int, RankPool], corpora: Path, tmp_path: Path) -> None:
    """Catches a change of names or format that makes existing checkpoints unusable.

    Two ranks wrote `checkpoint_0_1` at commit 98378c0; `losses.json` has the four losses of the same run uninterrupted.
    """
    written = tmp_path / "checkpoints" / "step-00000002"
    shutil.copytree(HERE / "checkpoint_0_1" / written.name, written)
    assert set(pools[RANKS].run(pretrain_case, resumed(tmp_path, corpora))) == {"done"}
    expected = json.loads((HERE / "checkpoint_0_1" / "losses.json").read_text(encoding="utf-8"))
    assert logged(tmp_path) == pytest.approx(expected[2:], rel=RELATIVE["fp32"])
