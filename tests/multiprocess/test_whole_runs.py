"""Whole runs, from the config to the last file."""

import itertools
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from experiment.config import build_config
from experiment.run_files.checkpoints import checkpoint_path, complete_checkpoints, read_state
from experiment.run_files.run_folder import RunFolder
from launches import Start, config_file, patched, wait_for_exit
from pretrain.batching.sequences import open_index
from pretrain.config import PretrainConfig
from pretrain.corpus.reader import open_corpus
from pretrain.evaluate import evaluate_command
from pretrain.training import step_agreement
from pretrain.world import World
from rank_pool import RankPool
from runs import (
    Tree,
    evaluation_events,
    events_without_timing,
    logged,
    planned,
    pretrain_case,
    run_config,
    soak,
    step_events,
)

MODERN = {
    "model_type": "modernbert",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "local_attention": 12,
}


# Python then imports these packages as if they were not installed.
NOT_INSTALLED = """
import sys
missing = "wandb tensorboard apprise datasets matplotlib sklearn seqeval onnx fastapi jieba".split()
for name in [name for name in sys.modules if name.partition(".")[0] in missing]:
    del sys.modules[name]
sys.modules.update(dict.fromkeys(missing))
"""


def test_a_run_needs_only_the_packages_that_it_uses(start: Start, wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches an import of W&B, or of another large package, in a run whose config does not ask for it."""
    config = config_file(tmp_path, wordpiece_corpus, schedule__steps=2)
    command = (sys.executable, "-m", "launcher", "pretrain", "--config", str(config))
    code, output = wait_for_exit(start(*command, **patched(tmp_path, NOT_INSTALLED)))
    assert code == 0, output
    assert logged(tmp_path / "run", "step") == [1, 2]


@pytest.mark.usefixtures("memory_measured_once")
def test_one_epoch_trains_on_every_token_once(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a short last batch that is dropped, filled up or miscounted, also in a plan."""
    tree = run_config(tmp_path, wordpiece_corpus, "fp32_zero2", batch__sequences=250, batch__microbatch_tokens=2000)
    tree["schedule"] = {"epochs": 1.0}
    plan = planned(tree, ranks=2)
    assert pools[2].run(pretrain_case, tree) == ["done", "done"]
    corpus = open_corpus(wordpiece_corpus)
    sequences = len(open_index(corpus, 38, tmp_path))
    assert sequences % 250 != 0
    assert logged(tmp_path, "step") == list(range(1, -(-sequences // 250) + 1))
    assert logged(tmp_path, "tokens")[-1] == corpus.tokens + 2 * sequences
    assert (logged(tmp_path, "step")[-1], logged(tmp_path, "tokens")[-1]) == (plan.stream.steps, plan.tokens)


def test_init_from_and_evaluate_agree_with_the_run(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a Hugging Face folder that init_from loads differently than it was saved, and scores of `deepcloze
    evaluate` that are not the run's."""
    first = run_config(
        tmp_path / "first",
        wordpiece_corpus,
        "fp32_zero3",
        model__config=MODERN,
        schedule__steps=2,
        corpus__eval={"held": str(heldout_corpus)},
    )
    pools[2].run(pretrain_case, first)
    start = checkpoint_path(tmp_path / "first" / "checkpoints", 2) / "hf"
    second = run_config(
        tmp_path / "second", wordpiece_corpus, schedule__steps=1, corpus__eval={"held": str(heldout_corpus)}
    ) | {"model": {"init_from": str(start)}}
    pools[1].run(pretrain_case, second)
    last, first_event = evaluation_events(tmp_path / "first")[-1], evaluation_events(tmp_path / "second")[0]
    assert (last["step"], first_event["step"]) == (2, 0)
    for metric in ("loss", "perplexity", "accuracy"):
        assert first_event[f"eval/held/{metric}"] == pytest.approx(last[f"eval/held/{metric}"], rel=1e-5)

    evaluate_command(str(tmp_path / "first"), str(heldout_corpus), as_json=True)
    (scores,) = json.loads(capsys.readouterr().out).values()
    for metric in ("loss", "perplexity", "accuracy"):
        assert scores[metric] == pytest.approx(last[f"eval/held/{metric}"], rel=1e-5)


def test_a_padded_model_trains_too(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a run that fails for padded models, and a missing warning about them."""
    model = MODERN | {"model_type": "mpnet", "max_position_embeddings": 64}
    del model["local_attention"]
    changes = {"model__config": model, "schedule__steps": 3}
    pools[2].run(pretrain_case, run_config(tmp_path, wordpiece_corpus, "bf16_zero1", **changes))
    losses = logged(tmp_path)
    assert losses[-1] < losses[0]
    assert "'mpnet' trains padded" in RunFolder(tmp_path).rank_log(0).read_text(encoding="utf-8")


@pytest.mark.parametrize(("ranks", "ds_config"), [(1, "fp32_zero1"), *soak((2, "fp32_zero3"))])
def test_a_run_begins_with_the_frequencies_of_tokens(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ranks: int, ds_config: str
) -> None:
    """Catches an output bias that does not reach the engine, and one that is set again when a run resumes."""
    changes = {"model__output_bias": "log_frequency", "schedule__steps": 3}
    resumed, undisturbed = (
        run_config(tmp_path / name, wordpiece_corpus, ds_config, **changes) for name in ("resumed", "undisturbed")
    )
    assert set(pools[ranks].run(pretrain_case, resumed, 1)) == {"stopped"}
    assert set(pools[ranks].run(pretrain_case, resumed)) == {"done"}
    assert set(pools[ranks].run(pretrain_case, undisturbed)) == {"done"}
    assert logged(tmp_path / "resumed") == logged(tmp_path / "undisturbed")
    uniform = math.log(open_corpus(wordpiece_corpus).manifest.vocabulary_size)
    assert logged(tmp_path / "resumed")[0] < uniform - 0.5


def timed_case(world: World, tree: Tree, stop_after: int | None = None) -> str:
    """A run with clocks that show 0.1 s more at each look, and that of rank 1 a second more."""
    looks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(looks) * (0.1 + world.rank))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_agreement, "time", clock)
        return pretrain_case(world, tree, stop_after)


def test_checkpoints_by_the_clock(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches ranks that go by their own clocks, so that one would save alone and hang, and a clock that a save does
    not restart."""
    tree = run_config(tmp_path, wordpiece_corpus, schedule__steps=7)
    tree["checkpoint"] = {"every_steps": None, "every_minutes": 0.45 / 60, "keep_last": 9}
    assert set(pools[2].run(timed_case, tree)) == {"done"}
    steps = [read_state(checkpoint)["step"] for checkpoint in complete_checkpoints(tmp_path / "checkpoints")]
    assert steps == [2, 5, 7]


def test_a_time_budget_spans_attempts(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches ranks that go by their own clocks, time that a resume forgets, a learning rate that does not reach its
    minimum, and an end without an evaluation or a checkpoint."""
    tree = run_config(tmp_path, wordpiece_corpus, corpus__eval={"held": str(heldout_corpus)})
    tree["schedule"] = {"budget": "2s", "warmup_steps": 2, "min_lr_ratio": 0.1}
    assert set(pools[2].run(timed_case, tree, 5)) == {"stopped"}
    stopped = read_state(complete_checkpoints(tmp_path / "checkpoints")[-1])["progress"]
    assert (stopped["step"], 0.0 < stopped["seconds"] < 2.0) == (5, True)
    assert set(pools[2].run(timed_case, tree)) == {"done"}

    ended = read_state(complete_checkpoints(tmp_path / "checkpoints")[-1])["progress"]
    rates = logged(tmp_path, "lr")
    assert 2.0 <= ended["seconds"] < 2.5
    assert len(rates) == ended["step"] > 5
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == pytest.approx(0.1 * 3e-3)
    share = stopped["seconds"] / 2.0
    assert 0.7 < rates[5] / (3e-3 * (1.0 - 0.9 * share)) <= 1.0, "the second attempt starts a new clock"
    assert events_without_timing(tmp_path)[-1].keys() > {"step", "eval/held/loss"}
    assert events_without_timing(tmp_path)[-1]["step"] == ended["step"]


def test_a_run_says_that_its_budget_ended_before_the_decay(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a run that ends at its peak rate silently, because a step takes longer than the decay, and one that
    says so although its rate has decayed."""
    said = {}
    for name in ("wsd", "linear"):
        tree = run_config(tmp_path / name, wordpiece_corpus)
        tree["schedule"] = {"budget": "1s", "name": name, "warmup_steps": 0}
        assert pools[1].run(timed_case, tree) == ["done"]
        log = RunFolder(tmp_path / name).rank_log(0).read_text(encoding="utf-8")
        said[name] = re.findall("outlasted the decay from a learning rate of .*", log)
    assert said == {"wsd": ["outlasted the decay from a learning rate of 3.00e-03"], "linear": []}


def test_restarting_a_finished_run_does_nothing(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches an extra step, evaluations that are logged twice, the time since the end counted as down, and a config or
    provenance of an attempt that trained nothing."""
    tree = run_config(tmp_path, wordpiece_corpus, schedule__steps=2, corpus__eval={"held": str(heldout_corpus)})
    pools[2].run(pretrain_case, tree)
    run = RunFolder(tmp_path)
    files = run.metrics, run.goodput, run.config, run.provenance
    before = [file.read_text(encoding="utf-8") for file in files]
    tree["optimizer"] = {"lr": 0.5}
    assert pools[2].run(pretrain_case, tree) == ["done", "done"]
    assert [file.read_text(encoding="utf-8") for file in files] == before


def test_a_run_that_only_its_evaluation_finishes(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches the config of a longer run that is kept, so that the run looks unfinished."""
    tree = run_config(tmp_path, wordpiece_corpus, schedule__steps=6, corpus__eval={"held": str(heldout_corpus)})
    assert pools[1].run(pretrain_case, tree, 3) == ["stopped"]
    tree["schedule"]["steps"] = 3
    assert pools[1].run(pretrain_case, tree) == ["done"]
    assert yaml.safe_load(RunFolder(tmp_path).config.read_text(encoding="utf-8"))["schedule"]["steps"] == 3


def test_the_written_config_starts_the_same_run(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches relative paths, paths of the installation or missing keys in RUN/config.yaml, and metrics without the
    documented keys."""
    tree = run_config(tmp_path / "first", wordpiece_corpus, schedule__steps=3)
    pools[1].run(pretrain_case, tree)
    written = yaml.safe_load(RunFolder(tmp_path / "first").config.read_text(encoding="utf-8"))
    assert written["engine"]["ds_config"] == Path(tree["engine"]["ds_config"]).stem
    assert build_config(PretrainConfig, written).model_dump(mode="json") == written
    written["run"]["dir"] = str(tmp_path / "second")
    pools[1].run(pretrain_case, written)
    assert logged(tmp_path / "second") == logged(tmp_path / "first")
    assert json.loads(RunFolder(tmp_path / "first").provenance.read_text(encoding="utf-8"))
    documented = {
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
        "goodput",
        "checkpoint_seconds",
        "memory",
    }
    assert all(set(event) == documented for event in step_events(tmp_path / "first"))
