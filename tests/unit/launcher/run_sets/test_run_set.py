"""Sets of runs, with stand-ins for the commands that they start."""

from contextlib import suppress
from pathlib import Path

import pytest

from experiment.config import FlatConfig
from experiment.errors import UserError
from experiment.files import read_json, write_json
from experiment.run_files.outcome_file import Outcome, write_outcome
from experiment.run_files.run_folder import RunFolder, open_run_folder
from launcher.run_sets.child_run import DONE
from launcher.run_sets.run_set import PlannedRun, RunSet


def shell(script: str) -> tuple[str, ...]:
    return "sh", "-c", script


def finish(folder: Path, config: FlatConfig) -> bool:
    """Finish a set with one run; returns whether it was started."""
    started = folder / "started"
    started.unlink(missing_ok=True)
    runs = (PlannedRun("a", ("touch", str(started)), config),)
    to_finish = RunSet("sweep", open_run_folder(folder), "--output", "sweep.json", runs, header={})
    with to_finish.opened() as records:
        to_finish.finish(records)
    return started.exists()


def test_the_names_of_runs_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches runs of a comparison that W&B shows as many of the same name, and points of a sweep in one of its cells
    that do not say whose they are."""
    show = shell(f"echo $DEEPCLOZE_RUN_SET $WANDB_RUN_GROUP $WANDB_NAME >> {tmp_path}/log")

    def finish_set(name: str, run: str) -> None:
        runs = RunSet("sweep", open_run_folder(tmp_path / name), "--output", "a.json", (PlannedRun(run, show, {}),))
        with runs.opened() as records:
            runs.finish(records)

    for variable in ("WANDB_RUN_GROUP", "WANDB_NAME"):
        monkeypatch.delenv(variable, raising=False)
    finish_set("compare", "ours/toy")
    monkeypatch.setenv("WANDB_RUN_GROUP", "compare")
    monkeypatch.setenv("WANDB_NAME", "ours/toy")
    finish_set("compare/ours/toy", "lr=1e-3")
    assert (tmp_path / "log").read_text() == "1 compare ours/toy\n1 compare ours/toy/lr=1e-3\n"


@pytest.mark.parametrize("state", [None, DONE])
def test_a_fine_tuning_that_has_finished_is_not_started_again(tmp_path: Path, state: str | None) -> None:
    """Catches a run that starts again because the command was killed before it could note the end; and seeds that are
    added and not trained."""
    config = {"training.seeds": [1]}
    record = {"config": config} if state is None else {"config": config, "state": state}
    write_json(tmp_path / "sweep.json", {"runs": {"a": record}})
    run = open_run_folder(tmp_path / "a")
    write_json(run.results, {"seeds": [1]})
    write_outcome(run, Outcome.DONE)
    assert not finish(tmp_path, config)
    more = {"training.seeds": [1, 2]}
    assert finish(tmp_path, more)
    assert finish(tmp_path, more), "it was rejected or killed before it has replaced its outcome"
    run.outcome.unlink()  # as a fine-tuning run does when it starts
    assert finish(tmp_path, more), "it was killed"
    write_json(run.results, {"seeds": [1, 2]})
    write_outcome(run, Outcome.DONE)
    assert not finish(tmp_path, more)


def test_a_pretraining_that_was_resumed_and_stopped_is_not_done(tmp_path: Path) -> None:
    """Catches a record that outranks what the run itself has reported."""
    write_json(tmp_path / "sweep.json", {"runs": {"a": {"config": {}, "state": DONE}}})
    folder = open_run_folder(tmp_path / "a")
    write_outcome(folder, Outcome.FAILED)
    assert finish(tmp_path, {})
    write_outcome(folder, Outcome.DONE)
    assert not finish(tmp_path, {})


@pytest.mark.parametrize(
    "newer",
    [
        {"tracking.alerts.new": False},
        {"training.adam_eps": 1e-8},
        {"pretrain.optimizer.grad_clip": 1.0},
        {"training.parallel_seeds": 2},
        {"task.context": "article"},
    ],
)
def test_a_new_key_changes_no_run(tmp_path: Path, newer: FlatConfig) -> None:
    """Catches a sweep or comparison that a newer version, whose configs have one more key, cannot resume."""
    before = {"seed": 1, "task.kind": "cloze"}
    write_json(tmp_path / "sweep.json", {"runs": {"a": {"config": before}}})
    (tmp_path / "a").mkdir()
    assert finish(tmp_path, {**before, **newer})


def test_never_was_recorded_for_runs_that_may_resume(tmp_path: Path) -> None:
    """Catches a sweep or comparison of version 0.2.0 with `run.resume: never` that cannot be restarted."""
    keys = ("run.resume", "pretrain.run.resume")
    write_json(tmp_path / "sweep.json", {"runs": {"a": {"config": dict.fromkeys(keys, "never")}}})
    (tmp_path / "a").mkdir()
    assert finish(tmp_path, dict.fromkeys(keys, "auto"))
    assert finish(tmp_path, dict.fromkeys(keys, "never"))  # its pretraining was removed, to run again


def test_a_new_key_with_another_value_changes_a_run(tmp_path: Path) -> None:
    """Catches one table of runs with and without a setting that an earlier version did not have."""
    write_json(tmp_path / "sweep.json", {"runs": {"a": {"config": {"seed": 1}}}})
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"another training\.adam_eps: 1e-08, now 1e-06"):
        finish(tmp_path, {"seed": 1, "training.adam_eps": 1e-6})


def test_seeds_in_parallel_change_no_run(tmp_path: Path) -> None:
    """Catches a sweep that cannot go on with more seeds at a time, or without keeping models because a disk is full."""
    for parallel, keep in ((1, "best"), (2, "none")):
        config = {"training.parallel_seeds": parallel, "training.microbatch_size": parallel, "run.keep": keep}
        finish(tmp_path, config)
        (tmp_path / "a").mkdir(exist_ok=True)


def test_damaged_results_do_not_keep_other_runs_from_starting(tmp_path: Path) -> None:
    """Catches a sweep that ends at a damaged run, and starts the missing ones only after that has been removed."""
    runs = tuple(PlannedRun(name, shell(f"echo {name} >> {tmp_path}/log"), {}) for name in ("damaged", "good"))

    def measure(run: RunFolder) -> float:
        if run.path.name == "damaged":
            raise UserError("damaged results")
        return 0.5

    to_finish = RunSet("sweep", open_run_folder(tmp_path), "--output", "sweep.json", runs, header={})
    with pytest.raises(UserError, match="damaged results"), to_finish.opened() as records:
        to_finish.finish(records, measure)
    assert (tmp_path / "log").read_text() == "damaged\ngood\n"
    values = {name: run["value"] for name, run in read_json(tmp_path / "sweep.json")["runs"].items()}
    assert values == {"damaged": None, "good": 0.5}


def test_runs_that_failed_are_tried_again_after_the_others(tmp_path: Path) -> None:
    """Catches a point that diverges again before the missing ones have started, and a new task of a row that counts as
    failed before its pretraining is tried again."""
    log = tmp_path / "log"

    def order(**scripts: str) -> list[str]:
        """Finish runs of scripts, named after their letters; one of two letters needs the run of the first one."""
        log.write_text("")
        runs = tuple(
            PlannedRun(
                name, shell(f"mkdir -p {tmp_path / name}; echo {name} >> {log}; {script}"), {}, name[:-1] or None
            )
            for name, script in scripts.items()
        )
        to_finish = RunSet("compare", open_run_folder(tmp_path), "run.dir", "runs.json", runs)
        with suppress(SystemExit), to_finish.opened() as records:
            to_finish.finish(records)
        return log.read_text().split()

    assert order(p="false", px="true", b="true") == ["p", "b"]
    assert order(p="true", px="true", py="true", b="true", c="true") == ["b", "c", "p", "px", "py"]


def test_values_of_another_metric_are_not_kept(tmp_path: Path) -> None:
    """Catches a sweep restarted with other points and another metric, where the loss of an old point is the best
    accuracy."""

    def values(points: str, metric: str) -> dict[str, float | None]:
        runs = tuple(PlannedRun(name, shell(f"mkdir -p {tmp_path / name}"), {}) for name in points)
        a_set = RunSet("sweep", open_run_folder(tmp_path), "--output", "sweep.json", runs, header={"metric": metric})
        with a_set.opened() as records:
            before = {name: record["value"] for name, record in records.items() if "value" in record}
            a_set.finish(records, lambda _: len(metric))
        return before

    assert values("ab", "loss") == {}
    assert values("bc", "loss") == {"a": 4, "b": 4}
    assert values("bc", "accuracy") == {}
    assert values("a", "accuracy") == {"b": 8, "c": 8}


def test_runs_taken_out_before_they_started_are_forgotten(tmp_path: Path) -> None:
    """Catches rows that are `not started` forever, and results of removed rows that are lost."""

    def names(*planned: str) -> list[str]:
        runs = tuple(PlannedRun(name, shell("true"), {}) for name in planned)
        with RunSet("compare", open_run_folder(tmp_path), "run.dir", "runs.json", runs).opened() as records:
            for record in records.values():
                record["state"] = DONE
        return list(read_json(tmp_path / "runs.json"))

    assert names("a", "b", "c") == ["a", "b", "c"]
    (tmp_path / "b").mkdir()
    assert names("a") == ["a", "b"]


def test_runs_read_the_config_file_as_it_was_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a user's edit that reaches a later run of the set, and printed commands that only the set can run."""
    file = tmp_path / "run.yaml"
    file.write_text("planned\n")
    script = f"echo edited > {file}; cat $1; cat $1 >> {tmp_path}/log"
    runs = tuple(PlannedRun(f"row/{name}", (*shell(script), "--config", str(file)), {}) for name in "ab")
    folder = RunFolder(tmp_path / "set")
    to_finish = RunSet("compare", folder, "run.dir", "runs.json", runs, configs={str(file): b"planned\n"})
    to_finish.print_commands()
    assert capsys.readouterr().out.count(f"--config {file}\n") == 2
    assert not folder.path.exists()
    with to_finish.opened() as records:
        to_finish.finish(records)
    assert (tmp_path / "log").read_text() == "planned\n" * 2
    assert (folder.path / "configs" / "row" / "b" / "run.yaml").read_text() == "planned\n"
    assert file.read_text() == "edited\n"
    with pytest.raises(UserError, match=r"run\.yaml was changed while it was checked"), to_finish.opened():
        pass


def test_other_content_changes_a_run(tmp_path: Path) -> None:
    """Catches one table of runs on other data; and a set of an earlier version, which did not record them, that cannot
    continue."""
    (tmp_path / "a").mkdir()
    write_json(tmp_path / "sweep.json", {"runs": {"a": {"config": {"seed": 1}}}})
    assert finish(tmp_path, {"seed": 1, "data.train": "one", "encoder.config.json": "one"})
    with pytest.raises(UserError, match=r"another data\.train: 'one', now 'two'"):
        finish(tmp_path, {"seed": 1, "data.train": "two", "encoder.config.json": "one"})
    # A sweep that was moved with the comparison that it is a part of.
    assert finish(tmp_path, {"seed": 1, "data.train": "one", "encoder.config.json": "one", "model.init_from": "/new"})
    with pytest.raises(UserError, match=r"another data\.validation: None, now 'new'"):
        finish(tmp_path, {"seed": 1, "data.train": "one", "data.validation": "new", "encoder.config.json": "one"})


def test_other_content_changes_a_pretraining(tmp_path: Path) -> None:
    """Catches one table of runs that were evaluated on other text or start from other weights; and a set of version
    0.2.0, which did not record them, that cannot continue."""
    (tmp_path / "a").mkdir()
    before = {"corpus.fingerprint": "one", "model.init_from": "/model", "pretrain.corpus.fingerprint": "one"}
    write_json(tmp_path / "sweep.json", {"runs": {"a": {"config": before}}})
    texts = {"corpus.eval_fingerprints": {"wiki": "one"}, "pretrain.corpus.eval_fingerprints": {}}
    now = before | texts | {"encoder.config.json": "one", "pretrain.encoder.config.json": "one"}
    assert finish(tmp_path, now)
    with pytest.raises(UserError, match=r"another corpus\.eval_fingerprints: \{'wiki': 'one'\}, now \{'wiki': 'two'\}"):
        finish(tmp_path, now | {"corpus.eval_fingerprints": {"wiki": "two"}})
    with pytest.raises(UserError, match=r"other content of /model/config\.json"):
        finish(tmp_path, now | {"encoder.config.json": "two", "pretrain.encoder.config.json": "two"})


def test_one_message_names_all_runs_with_another_config(tmp_path: Path) -> None:
    """Catches a message for each run, so that the user removes one folder after the other."""
    for seed in (1, 2):
        runs = tuple(PlannedRun(f"row-{row}/task", shell("true"), {"seed": seed}) for row in range(12))
        to_finish = RunSet("compare", open_run_folder(tmp_path), "run.dir", "runs.json", runs)
        if seed == 1:
            with to_finish.opened() as records:
                to_finish.finish(records)
            for run in runs:
                open_run_folder(to_finish.run_folder(run).path)
    with pytest.raises(UserError, match=r"row-0/task was started with another seed: 1, now 2, and 11 more") as refused:
        to_finish.opened().__enter__()
    named = ", ".join(f"row-{row}/task" for row in range(1, 9))
    assert f"({named}, row…); choose another run.dir, or remove these folders" in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_chain_may_be_moved(tmp_path: Path) -> None:
    """Catches scores that must be made again because the folder of a comparison or of its encoder was moved, or its
    pretraining tracks or logs differently."""
    content = {"encoder.config.json": "one", "data.train": "one", "task.train": "/old/train.csv"}
    before = {"seed": 1, "model.init_from": "/old/a/pretrain", "pretrain.run.dir": "/old/a/pretrain"} | content
    before["pretrain.model.init_from"] = "/old/bert"
    now = before | {"model.init_from": "/new/a/pretrain", "pretrain.run.dir": "/new/a/pretrain"}
    now |= {"task.train": "/new/train.csv", "pretrain.model.init_from": "/new/bert"}
    for config in (before, now | {"pretrain.run.log_every": 7, "pretrain.tracking.wandb": "disabled"}):
        runs = (
            PlannedRun("a/pretrain", shell("true"), {}),
            PlannedRun("a/task", shell("true"), config, pretraining="a/pretrain"),
        )
        with RunSet("compare", open_run_folder(tmp_path), "run.dir", "runs.json", runs).opened() as records:
            assert records["a/task"]["config"] == config
            for record in records.values():
                record["state"] = DONE
        (tmp_path / "a" / "task").mkdir(parents=True, exist_ok=True)
        write_json(tmp_path / "runs.json", records)
    seeds = (PlannedRun("a/task", shell("true"), {**now, "pretrain.run.seed": 2}, pretraining="a/pretrain"),)
    with (
        pytest.raises(UserError, match=r"another pretrain\.run\.seed"),
        RunSet("compare", open_run_folder(tmp_path), "run.dir", "runs.json", seeds).opened(),
    ):
        pass
