"""Forks: runs that start from the full state of another run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiment.files import write_json
from experiment.run_files.checkpoints import checkpoint_path
from experiment.run_files.provenance import ancestors_of, read_origin
from experiment.run_files.run_folder import RunFolder
from finetune.export.command import export_command
from finetune.options import ExportOptions
from launcher.cli import main
from rank_pool import RankPool
from runs import TINY, Tree, assert_same_tensors, evaluation_events, logged, pretrain_case, run_config, saved_tensors

pytestmark = pytest.mark.usefixtures("memory_measured_once")


def provenance(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RunFolder(folder).provenance.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def parent(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with dropout, and a checkpoint every second step."""
    folder = tmp_path_factory.mktemp("parent")
    tree = run_config(folder, wordpiece_corpus)
    tree["checkpoint"] = {"every_steps": 2, "keep_last": 100}
    pools[2].run(pretrain_case, tree)
    return folder


def fork(folder: Path, corpus: Path, parent: Path, step: int = 2, **changes: Any) -> Tree:
    tree = run_config(folder, corpus, **changes)
    tree["run"]["resume"] = str(checkpoint_path(parent / "checkpoints", step))
    return tree


def test_a_fork_with_the_same_config_repeats_its_parent(
    pools: dict[int, RankPool], wordpiece_corpus: Path, parent: Path, tmp_path: Path
) -> None:
    """Catches weights, moments, schedule, data position or dropout that a fork resets, also when it was stopped before
    its first checkpoint, where it forks again, and after it, where it resumes."""
    tree = fork(tmp_path, wordpiece_corpus, parent)
    write_json(RunFolder(tmp_path).provenance, {"run_id": "fork", "attempts": [], "ancestors": []})
    RunFolder(tmp_path).metrics.write_text('{"step": 3, "loss": 1.0}\n')  # stopped before its first checkpoint
    assert set(pools[2].run(pretrain_case, tree, 2)) == {"stopped"}
    assert logged(tmp_path, "step") == [3, 4]
    assert set(pools[2].run(pretrain_case, tree)) == {"done"}
    assert logged(tmp_path, "step") == [3, 4, 5, 6]
    log = RunFolder(tmp_path).rank_log(0).read_text(encoding="utf-8")
    assert [f"epochs since step 2; {step} finished" in log for step in (2, 4)] == [True, True]
    for key in ("loss", "lr", "grad_norm", "tokens"):
        assert logged(tmp_path, key) == logged(parent, key)[2:]
    assert evaluation_events(tmp_path) == [{"step": 2, "tokens": logged(parent, "tokens")[1]}], "where it begins"
    theirs, ours = (saved_tensors(checkpoint_path(folder / "checkpoints", 6)) for folder in (parent, tmp_path))
    assert_same_tensors(theirs, ours)
    assert provenance(tmp_path)["run_id"] != provenance(parent)["run_id"]
    assert len(provenance(tmp_path)["attempts"]) == 2
    assert provenance(tmp_path)["ancestors"] == [
        {
            "relation": "fork",
            "run_id": provenance(parent)["run_id"],
            "folder": parent.name,
            "step": 2,
            "tokens": logged(parent, "tokens")[1],
        }
    ]


def test_a_plan_names_the_steps_of_the_parent(
    wordpiece_corpus: Path, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches the time of a whole run that is taken for what a fork has left, tokens that its parent has not read, and
    a copied checkpoint whose name has no step."""
    config = tmp_path / "fork.yaml"
    tree = fork(tmp_path / "run", wordpiece_corpus, parent)
    tree["run"]["resume"] = str(tmp_path / "kept")
    shutil.copytree(checkpoint_path(parent / "checkpoints", 4), tmp_path / "kept")
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert main(["plan", "--config", str(config)]) == 0
    printed = capsys.readouterr().out
    assert "  in all 2 steps, " in printed
    assert "  these figures leave out 4 steps of the run that it forks\n" in printed
    assert "done: " not in printed
    budget = ["--schedule.steps=null", "--schedule.budget=1h", "--peak_tflops=1", "--json"]
    length = ["--peak_tflops=1", "--json"]
    planned = [length, ["--run.resume=never", *length], budget, ["--run.resume=never", *budget]]
    found = []
    for flags in planned:
        assert main(["plan", "--config", str(config), *flags]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [plan["steps_done"] for plan in found] == [4, 0, 4, 0]
    tokens = logged(parent, "tokens")
    assert [plan["tokens"] for plan in found[:2]] == [tokens[5] - tokens[3], tokens[5]]
    assert [(plan["steps"], plan["stages"][0]["steps"]) for plan in found[:2]] == [(6, 2), (6, 6)]
    assert found[0]["epochs"] == pytest.approx(found[1]["epochs"] / 3)
    assert found[0]["cost"]["seconds"] == pytest.approx(found[1]["cost"]["seconds"] / 3, rel=0.2)
    assert found[2]["budget_steps"] == found[3]["budget_steps"] + 4  # its clock starts over
    assert main(["plan", "--config", str(RunFolder(parent).config)]) == 0
    assert "  done: 6 steps of this run, which these figures include\n" in capsys.readouterr().out


def test_a_fork_of_another_step_needs_another_folder(
    pools: dict[int, RankPool], wordpiece_corpus: Path, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a changed `run.resume` that is ignored, also in a mirror, whose fork the new run would take for its own;
    and a plan whose budget forgets the steps of the parent as soon as the fork has a checkpoint."""
    mirror = {"mirror": f"file://{tmp_path / 'mirror'}", "every_steps": 2}
    tree = fork(tmp_path / "run", wordpiece_corpus, parent, step=2) | {"checkpoint": mirror}
    assert set(pools[1].run(pretrain_case, tree)) == {"done"}
    config = tmp_path / "fork.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    budget = ["--schedule.steps=null", "--schedule.budget=1h", "--peak_tflops=1", "--json"]
    assert main(["plan", "--config", str(config), *budget]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert main(["plan", "--config", str(config), f"--run.dir={tmp_path / 'unused'}", *budget]) == 0
    assert resumed["budget_steps"] == json.loads(capsys.readouterr().out)["budget_steps"]
    tree["run"]["resume"] = str(checkpoint_path(parent / "checkpoints", 4))
    for folder in ("run", "new"):
        tree["run"]["dir"] = str(tmp_path / folder)
        with pytest.raises(Exception, match="holds a run that is not a fork of"):
            pools[1].run(pretrain_case, tree)
    assert not (tmp_path / "new" / "checkpoints").exists() or not list((tmp_path / "new" / "checkpoints").iterdir())


def test_a_fork_can_change_all_but_the_model(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, parent: Path, tmp_path: Path
) -> None:
    """Catches another corpus, seed or batch size that a fork rejects or ignores, and changes that are not logged."""
    changes: dict[str, Any] = {"run__seed": 3, "batch__sequences": 11, "optimizer__lr": 1e-3, "schedule__steps": 4}
    tree = fork(tmp_path / "new", heldout_corpus, parent, **changes)
    tree["run"]["resume"] = str(checkpoint_path(parent / "checkpoints", 2))
    assert set(pools[1].run(pretrain_case, tree)) == {"done"}
    assert logged(tmp_path / "new", "step") == [3, 4]
    log = RunFolder(tmp_path / "new").rank_log(0).read_text(encoding="utf-8")
    for line in ("forking", "batch.sequences: 29 -> 11", "optimizer.lr: 0.003 -> 0.001", "corpus.train: "):
        assert line in log
    other = fork(tmp_path / "wide", wordpiece_corpus, parent, model__config=TINY | {"intermediate_size": 48})
    with pytest.raises(Exception, match=r"cannot be forked with another model\.intermediate_size"):
        pools[1].run(pretrain_case, other)


def test_a_fork_trains_on_the_tokens_that_its_parent_leaves(
    pools: dict[int, RankPool], wordpiece_corpus: Path, parent: Path, tmp_path: Path
) -> None:
    """Catches a fork whose length in tokens is computed from its own batches before it began, or again when it
    resumes."""
    tokens = logged(parent, "tokens")[3]
    tree = fork(tmp_path, wordpiece_corpus, parent, step=4, batch__sequences=11)
    tree["schedule"] = {"tokens": tokens + 1000, "warmup_steps": 2}
    assert pools[1].run(pretrain_case, tree, 2) == ["stopped"]
    assert pools[1].run(pretrain_case, tree) == ["done"]
    before, last = logged(tmp_path, "tokens")[-2:]
    assert before - 200 < tokens + 1000 < last + 200  # lengths are means
    log = RunFolder(tmp_path).rank_log(0).read_text(encoding="utf-8")
    assert log.count(f"training: {logged(tmp_path, 'step')[-1]} steps") == 2


def test_a_fork_evaluates_before_its_first_step(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, parent: Path, tmp_path: Path
) -> None:
    """Catches a fork without the metrics of what it started from, which may remain its best, and an evaluation that a
    resume repeats."""
    evaluation = {"every_steps": 4, "best_metric": "eval/held/loss"}
    tree = fork(tmp_path, wordpiece_corpus, parent, corpus__eval={"held": str(heldout_corpus)}, optimizer__lr=1.0)
    tree["evaluation"] = evaluation
    assert pools[1].run(pretrain_case, tree, 1) == ["stopped"]
    assert [event["step"] for event in evaluation_events(tmp_path)] == [2]
    assert (tmp_path / "checkpoints" / "best").read_text().strip() == "step-00000002"
    shutil.rmtree(checkpoint_path(tmp_path / "checkpoints", 3))
    assert pools[1].run(pretrain_case, tree) == ["done"]
    assert [event["step"] for event in evaluation_events(tmp_path)] == [2, 4, 6]
    assert logged(tmp_path, "step") == [3, 4, 5, 6]


def test_a_decay_forked_from_a_stable_run(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a learning rate that jumps at the fork, and a decay that sees other batches than the stable run."""
    stable = run_config(tmp_path / "stable", wordpiece_corpus, schedule__name="wsd", schedule__steps=60)
    assert set(pools[1].run(pretrain_case, stable, 5)) == {"stopped"}
    tree = run_config(
        tmp_path / "decay", wordpiece_corpus, schedule__name="wsd", schedule__steps=8, schedule__decay_steps=4
    )
    tree["run"]["resume"] = str(tmp_path / "stable")
    pools[1].run(pretrain_case, tree)
    pools[1].run(pretrain_case, stable, 2)
    assert logged(tmp_path / "decay", "step") == [6, 7, 8]
    peak = stable["optimizer"]["lr"]
    assert logged(tmp_path / "stable", "lr")[2:] == [peak] * 5
    assert logged(tmp_path / "decay", "lr") == pytest.approx([peak * (1 - (done / 4) ** 0.5) for done in (1, 2, 3)])
    assert logged(tmp_path / "decay")[0] == logged(tmp_path / "stable")[5], (
        "the first batch after the fork is another one"
    )


def test_a_fork_with_another_optimizer(
    pools: dict[int, RankPool], wordpiece_corpus: Path, parent: Path, tmp_path: Path
) -> None:
    """Catches moments of one optimizer that another one loads, and a missing warning."""
    tree = fork(tmp_path, wordpiece_corpus, parent, step=4, optimizer__name="lamb", optimizer__lr=1e-2)
    assert set(pools[2].run(pretrain_case, tree)) == {"done"}
    assert logged(tmp_path)[0] == logged(parent)[4]
    state = saved_tensors(checkpoint_path(tmp_path / "checkpoints", 6))
    assert {float(value) for key, value in state.items() if key.endswith("/step")} == {2.0}
    assert "optimizer states start at zero" in RunFolder(tmp_path).rank_log(0).read_text(encoding="utf-8")


def test_ancestors_are_recorded(
    pools: dict[int, RankPool], wordpiece_corpus: Path, parent: Path, tmp_path: Path
) -> None:
    """Catches ancestors that are lost at a fork, in an exported folder, or in a run that starts from such a folder."""
    pools[1].run(pretrain_case, fork(tmp_path / "forked", wordpiece_corpus, parent, step=4, schedule__steps=5))
    export_command(ExportOptions(checkpoint=str(tmp_path / "forked"), output=str(tmp_path / "exported")))
    tree = run_config(tmp_path / "target", wordpiece_corpus, schedule__steps=1)
    pools[1].run(pretrain_case, tree | {"model": {"init_from": str(tmp_path / "exported")}})
    ids = [provenance(folder)["run_id"] for folder in (parent, tmp_path / "forked", tmp_path / "target")]
    tokens = logged(parent, "tokens")[3]
    line = [
        {"relation": "fork", "run_id": ids[0], "folder": parent.name, "step": 4, "tokens": tokens},
        {"relation": "init_from", "run_id": ids[1], "folder": "forked", "step": 5},
    ]
    assert provenance(tmp_path / "target")["ancestors"] == line
    last = checkpoint_path(tmp_path / "target" / "checkpoints", 1) / "hf"
    assert read_origin(last) == {"run_id": ids[2], "folder": "target", "step": 1, "ancestors": line}
    assert [ancestor["run_id"] for ancestor in ancestors_of(last, "init_from")] == ids


def test_a_fork_resumes_without_its_ancestors(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a fork that needs the folder its parent was initialized from, or, once it has a checkpoint, its parent:
    the retention of the parent may delete the checkpoint at any time."""
    base, parent, forked = (tmp_path / name for name in ("base", "parent", "forked"))
    pools[1].run(pretrain_case, run_config(base, wordpiece_corpus, schedule__steps=1))
    model = {"model": {"init_from": str(base), "max_positions": 80}}
    pools[1].run(pretrain_case, run_config(parent, wordpiece_corpus, schedule__steps=2) | model)
    shutil.rmtree(base)
    tree = fork(forked, wordpiece_corpus, parent, schedule__steps=5) | model
    assert set(pools[1].run(pretrain_case, tree, 1)) == {"stopped"}
    shutil.rmtree(parent)
    assert set(pools[1].run(pretrain_case, tree, 1)) == {"stopped"}
    assert set(pools[1].run(pretrain_case, yaml.safe_load(RunFolder(forked).config.read_text()))) == {"done"}
    assert logged(forked, "step") == [3, 4, 5]
    assert [ancestor["relation"] for ancestor in provenance(forked)["ancestors"]] == ["init_from", "fork"]
