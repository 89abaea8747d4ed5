"""Runs from their config to their last file."""

import json
from pathlib import Path

import pytest
import yaml

from experiment.checkpoints import checkpoint_path, complete_checkpoints
from experiment.config import build_config
from experiment.run_folder import RunFolder
from pretrain.batching.sequences import open_index
from pretrain.config import PretrainConfig
from pretrain.corpus.reader import open_corpus
from pretrain.evaluate import evaluate_command
from rank_pool import RankPool
from runs import Tree, logged, pretrain_case, run_config, step_events

MODERN = {
    "model_type": "modernbert",
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "local_attention": 12,
}


def evaluations(folder: Path) -> list[Tree]:
    lines = RunFolder(folder).metrics.read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if "loss" not in event]


def test_one_epoch_trains_on_every_token_once(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a short last batch that is dropped, filled up or counted wrongly."""
    tree = run_config(tmp_path, wordpiece_corpus, "fp32_zero2", batch__sequences=250) | {"schedule": {"epochs": 1.0}}
    assert pools[2].run(pretrain_case, tree) == ["done", "done"]
    corpus = open_corpus(wordpiece_corpus)
    sequences = len(open_index(corpus, 38, tmp_path))
    assert sequences % 250 != 0
    assert logged(tmp_path, "step") == list(range(1, -(-sequences // 250) + 1))
    assert logged(tmp_path, "tokens")[-1] == corpus.tokens + 2 * sequences


def test_training_on_from_a_folder_and_scoring_it(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a folder that init_from opens differently than it was saved, and figures of `deepcloze evaluate` that are
    not those of the run."""
    first = run_config(
        tmp_path / "first",
        wordpiece_corpus,
        "fp32_zero3",
        model__config=MODERN,
        schedule__steps=3,
        corpus__eval={"held": str(heldout_corpus)},
    )
    pools[2].run(pretrain_case, first)
    start = checkpoint_path(tmp_path / "first" / "checkpoints", 3) / "hf"
    second = run_config(
        tmp_path / "second", wordpiece_corpus, schedule__steps=1, corpus__eval={"held": str(heldout_corpus)}
    ) | {"model": {"init_from": str(start)}}
    pools[3].run(pretrain_case, second)
    last, beginning = evaluations(tmp_path / "first")[-1], evaluations(tmp_path / "second")[0]
    assert (last["step"], beginning["step"]) == (3, 0)
    for figure in ("loss", "perplexity", "accuracy"):
        assert beginning[f"eval/held/{figure}"] == pytest.approx(last[f"eval/held/{figure}"], rel=1e-5)

    evaluate_command(str(tmp_path / "first"), str(heldout_corpus), json=True)
    (scores,) = json.loads(capsys.readouterr().out).values()
    for figure in ("loss", "perplexity", "accuracy"):
        assert scores[figure] == pytest.approx(last[f"eval/held/{figure}"], rel=1e-5)


def test_a_padded_model_trains_too(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a run that only packed models survive; and one that does not say that it is slower than it could be."""
    model = MODERN | {"model_type": "mpnet", "max_position_embeddings": 64}
    del model["local_attention"]
    pools[2].run(pretrain_case, run_config(tmp_path, wordpiece_corpus, "bf16_zero1", model__config=model))
    losses = logged(tmp_path)
    assert losses[-1] < losses[0]
    assert "'mpnet' trains padded" in RunFolder(tmp_path).rank_log(0).read_text(encoding="utf-8")


def test_checkpoints_by_the_clock(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches ranks that look at their own clocks, of which one would save alone and wait for ever."""
    tree = run_config(tmp_path, wordpiece_corpus, schedule__steps=3)
    tree["checkpoint"] = {"every_steps": None, "every_minutes": 1e-9, "keep_last": 9}
    pools[3].run(pretrain_case, tree)
    assert len(complete_checkpoints(tmp_path / "checkpoints")) == 3


def test_a_finished_run_that_is_started_again_is_finished(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches a step too many, and evaluations that are logged twice."""
    tree = run_config(tmp_path, wordpiece_corpus, schedule__steps=2, corpus__eval={"held": str(heldout_corpus)})
    pools[2].run(pretrain_case, tree)
    before = RunFolder(tmp_path).metrics.read_text(encoding="utf-8")
    assert pools[2].run(pretrain_case, tree) == ["done", "done"]
    assert RunFolder(tmp_path).metrics.read_text(encoding="utf-8") == before


def test_what_a_run_leaves_starts_the_same_run(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches relative paths in RUN/config.yaml, keys that are missing in it, and metrics without the promised keys."""
    tree = run_config(tmp_path / "first", wordpiece_corpus)
    pools[1].run(pretrain_case, tree)
    written = yaml.safe_load(RunFolder(tmp_path / "first").config.read_text(encoding="utf-8"))
    assert Path(written["engine"]["ds_config"]).is_absolute()
    assert build_config(PretrainConfig, written).model_dump(mode="json") == written
    written["run"]["dir"] = str(tmp_path / "second")
    pools[1].run(pretrain_case, written)
    assert logged(tmp_path / "second") == logged(tmp_path / "first")
    assert json.loads(RunFolder(tmp_path / "first").provenance.read_text(encoding="utf-8"))
    promised = {
        "step",
        "tokens",
        "loss",
        "lr",
        "grad_norm",
        "loss_scale",
        "skipped_steps",
        "overflows",
        "tokens_per_second",
        "mfu",
        "data_wait",
        "memory",
    }
    assert all(set(event) == promised for event in step_events(tmp_path / "first"))
