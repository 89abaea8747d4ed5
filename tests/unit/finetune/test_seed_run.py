import csv
import errno
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiment.errors import HostError, StoppedError, UserError
from experiment.files import write_text
from experiment.run_files.metrics_file import is_evaluation, read_events
from experiment.run_files.provenance import read_provenance, wandb_id
from experiment.run_files.run_folder import RunFolder, open_run_folder
from experiment.run_files.run_lock import is_locked, lock_run
from experiment.tracking.config import TrackingConfig
from experiment.tracking.tracker import TrackedRun, Trackers, open_trackers
from finetune import resolve as resolve_module
from finetune import run as run_module
from finetune import seed_run
from finetune.device import Device
from finetune.results.seed_summary import SeedRecord
from finetune.run import finetune
from finetune.seed_run import read_finished_seeds
from finetune.training.fit import StateFile
from launcher.cli import main
from launches import patched
from small_disk import SmallDisk
from waiting import LIMIT

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("no_figures")
RunPatched = Callable[[str, list[str]], subprocess.CompletedProcess[str]]


def results(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "results.json").read_text()))


def test_finished_seeds_are_not_run_again(config_file: Path, tmp_path: Path, seeds_trained: list[int]) -> None:
    """Catches a restart that trains finished seeds again, results without the seeds of the first start, and counts that
    become 78.0 when they are read from disk."""
    finetune(config_file, {"training.seeds": "[1]"})
    weights = tmp_path / "run" / "seed-1" / "model" / "model.safetensors"
    written, result = weights.stat().st_mtime_ns, (tmp_path / "run" / "results.json").read_text()
    finetune(config_file, {"training.seeds": "[1]"})
    assert (tmp_path / "run" / "results.json").read_text() == result
    finetune(config_file, {"training.seeds": "[1, 2]"})
    assert seeds_trained == [1, 2]
    assert weights.stat().st_mtime_ns == written
    assert results(tmp_path / "run")["seeds"] == [1, 2]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 2 * 2 * 5


@pytest.mark.parametrize("finished", [True, False])
def test_seeds_of_another_version_are_kept_with_a_warning(
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finished: bool,
) -> None:
    """Catches scores of two versions in one table, or a seed that two versions trained, without a word, and a warning
    if no seed is added."""
    if finished:
        finetune(config_file, {"training.seeds": "[1]"})
    else:
        stop_at_the_first_evaluation(config_file, {"training.seeds": "[1]"}, monkeypatch)
    provenance = tmp_path / "run" / "provenance.json"
    record = json.loads(provenance.read_text())
    record["attempts"][-1]["versions"]["deepcloze"] = "0.1.9"
    provenance.write_text(json.dumps(record))
    capsys.readouterr()
    for seeds, said in (("[1]", not finished), ("[1, 2]", True), ("[1, 2]", False), ("[1, 2, 3]", True)):
        finetune(config_file, {"training.seeds": seeds})
        printed = " ".join(capsys.readouterr().err.split())
        assert ("seeds were trained with deepcloze 0.1.9" in printed) == said, seeds


def test_one_process_at_a_time_uses_a_run_folder(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches two processes that train the same seeds, a lock that is not released, and data read for nothing."""
    with lock_run(open_run_folder(tmp_path / "run")), pytest.raises(UserError, match="another deepcloze process is"):
        finetune(config_file)
    assert not (tmp_path / "run" / "config.yaml").exists()
    with lock_run(RunFolder(tmp_path / "run")):
        capsys.readouterr()
        assert main(["finetune", "--config", str(config_file)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"deepcloze: run.dir: another deepcloze process is using {tmp_path / 'run'}"
    ]
    finetune(config_file, {"training.seeds": "1"})
    assert not is_locked(RunFolder(tmp_path / "run"))


def test_a_killed_seed_is_trained_again_and_agrees(
    config_file: Path, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an incomplete seed folder counted as a result, and a repeated seed with other weights."""
    save = seed_run.write_worst_rows

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(seed_run, "write_worst_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(config_file, {"training.seeds": "[1]"})
    assert not (tmp_path / "run" / "seed-1").exists()
    assert not (tmp_path / "run" / "results.json").exists()
    monkeypatch.setattr(seed_run, "write_worst_rows", save)
    finetune(config_file, {"training.seeds": "[1]"})
    runs = (tmp_path / "run", trained_run)
    once, again = (load_file(run / "seed-1" / "model" / "model.safetensors") for run in runs)
    assert all(torch.equal(once[key], again[key]) for key in once)
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, os.strerror(errno.ESTALE)), KeyboardInterrupt()])
def test_the_state_of_a_finished_seed_is_removed_later_if_need_be(
    config_file: Path,
    tmp_path: Path,
    seeds_trained: list[int],
    monkeypatch: pytest.MonkeyPatch,
    error: OSError | KeyboardInterrupt,
) -> None:
    """Catches gigabytes that stay in a hidden folder because a network disk or a signal has interrupted their removal,
    and a command that fails although its seed is finished."""
    unlink, flags = os.unlink, {"training.seeds": "[1]", "training.epochs": "1"}

    def fail(path: str, **options: Any) -> None:
        if Path(path).name == "state.pt":
            raise error
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail)
        if isinstance(error, OSError):
            finetune(config_file, flags)
        else:
            with pytest.raises(KeyboardInterrupt):
                finetune(config_file, flags)
    assert (tmp_path / "run" / ".seed-1" / "state.pt").is_file()
    finetune(config_file, flags)
    assert seeds_trained == [1]
    assert not list((tmp_path / "run").glob(".seed*"))


def test_other_settings_do_not_mix_into_a_run(
    config_file: Path, task_files: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches seeds of two learning rates, or of two versions of the data, in one table; data that are read for
    nothing; and `validate` and --dry_run that find nothing wrong."""
    one_seed = {"training.seeds": "[1]"}
    finetune(config_file, one_seed)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(resolve_module, "read_splits", lambda *_: pytest.fail("the data are read"))
        other = ["--config", str(config_file), "--training.seeds=[2]", "--training.lr=0.5", "--training.epochs=4"]
        for command in (["finetune", *other], ["finetune", *other, "--dry_run"], ["validate", other[1], *other[2:]]):
            assert main(command) == 2
            assert capsys.readouterr().err == (
                f"deepcloze: run.dir: {config_file.parent / 'run' / 'seed-1'} was trained with other settings: "
                "training.epochs (was 2, is 4), training.lr (was 0.03, is 0.5); choose another run.dir\n"
            )
    with pytest.raises(UserError, match=r"seed-1 was trained with other settings: training\.lr \(.*was 0\.03, is 0\.5"):
        finetune(config_file, {"training.seeds": "[2]", "training.lr": "0.5"})
    with Path(task_files["train"]).open("a", encoding="utf-8") as file:
        file.write("low\tword1\n")
    with pytest.raises(UserError, match=r"data\.train"):
        finetune(config_file, one_seed)


def test_another_encoder_in_the_same_place_does_not_mix_into_a_run(
    config_file: Path, encoder: Path, tmp_path: Path
) -> None:
    """Catches seeds of two encoders in one table, because the folder has the same name, and of two tokenizers."""
    folder = Path(shutil.copytree(encoder, tmp_path / "encoder"))
    overrides = {"model.init_from": str(folder), "training.seeds": "[1]", "training.epochs": "1"}
    finetune(config_file, overrides)
    weights = load_file(folder / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"other settings: encoder\.model\.safetensors"):
        finetune(config_file, overrides)
    shutil.copy(encoder / "model.safetensors", folder)
    vocabulary = (folder / "vocab.txt").read_text().splitlines()
    (folder / "vocab.txt").write_text("\n".join([*vocabulary[:-2], vocabulary[-1], vocabulary[-2]]) + "\n")
    with pytest.raises(UserError, match=r"other settings: encoder\.vocab\.txt; choose"):
        finetune(config_file, overrides)


def test_a_copied_project_is_the_same_run(
    config_file: Path, encoder: Path, trained_run: Path, tmp_path: Path, seeds_trained: list[int]
) -> None:
    """Catches seeds that cannot be added where data and encoder have other paths."""
    shutil.copytree(encoder, tmp_path / "encoder")
    shutil.copytree(trained_run, tmp_path / "run")  # its data have the content of `task_files`
    overrides = {"model.init_from": str(tmp_path / "encoder"), "training.seeds": "[1]"}
    finetune(config_file, overrides)
    assert not seeds_trained
    with pytest.raises(UserError, match=r"other settings: data\.again, data\.test; choose"):
        finetune(config_file, {**overrides, "task.test": json.dumps({"again": str(config_file.parent / "test.tsv")})})


def test_another_resolved_precision_does_not_mix_into_a_run(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches seeds of bf16 and fp32 in one table, trained with `precision: auto` on two machines."""
    overrides = {"training.precision": "auto", "training.seeds": "[1]", "training.epochs": "1"}
    cpu = torch.device("cpu")
    monkeypatch.setattr(resolve_module, "choose_device", lambda _: Device(cpu, torch.bfloat16))
    finetune(config_file, overrides)
    monkeypatch.setattr(resolve_module, "choose_device", lambda _: Device(cpu, None))
    with pytest.raises(UserError, match=r"training\.precision \(was 'bf16', is 'fp32'\)"):
        finetune(config_file, {**overrides, "training.seeds": "[1, 2]"})


def test_another_microbatch_size_is_the_same_run(config_file: Path, seeds_trained: list[int]) -> None:
    """Catches a run that cannot be resumed with smaller microbatches after it ran out of memory."""
    for size in ("null", "4"):
        finetune(config_file, {"training.epochs": "1", "training.seeds": "[1]", "training.microbatch_size": size})
    assert seeds_trained == [1]


# The command runs this first: it gets a signal after its second evaluation.
SEND_SIGNAL = """
import os
from finetune.training.fit import StateFile
save, saved = StateFile.save, []
def save_and_send(self, state):
    save(self, state)
    saved.append(state)
    if len(saved) == 2:
        os.kill(os.getpid(), {number})
StateFile.save = save_and_send
"""


def run_files(run: Path) -> dict[str, str]:
    """The files of a run without what differs between equal runs: times, the name of the run and its path."""
    kept = [run / "results.json", run / "curves.png", run / "confusion.png", *run.glob("seed-*/**/*")]
    found = {str(path.relative_to(run)): path.read_bytes().decode("latin-1") for path in kept if path.is_file()}
    del found["seed-1/model/deepcloze.json"]
    for name in found:
        if name.endswith("COMPLETE"):
            found[name] = re.sub(r'"seconds": [\d.e-]+', "", found[name])
        if name.endswith("epochs.csv"):
            rows = list(csv.DictReader(found[name].splitlines()))
            found[name] = str([{**row, "seconds": None} for row in rows])
    return found


@pytest.fixture
def run_patched(config_file: Path, tmp_path: Path, handed_over: Mapping[str, str]) -> RunPatched:
    """Runs the command with these flags, which runs this code first."""

    def run(code: str, flags: list[str]) -> subprocess.CompletedProcess[str]:
        variables = {"OMP_NUM_THREADS": "1", **handed_over, **patched(tmp_path, code)}
        command = [sys.executable, "-m", "launcher", "finetune", "--config", str(config_file), *flags]
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False, timeout=LIMIT
        )

    return run


def test_a_stop_signal_ends_with_a_message_and_can_be_resumed(
    run_patched: RunPatched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches SIGTERM that ends a run silently, with an exit code that queue systems count as a failure, and a
    status or log that does not tell about it."""
    flags = ["--training.seeds=1", "--training.epochs=2", "--training.evaluate_every=4"]
    stopped = run_patched(SEND_SIGNAL.format(number=int(signal.SIGTERM)), flags)
    assert stopped.returncode == 75, stopped.stderr
    message = "stopped: seed 1 at step 8, saved; run the same command again to resume\n"
    assert stopped.stderr.endswith(f"deepcloze: {message}")
    assert "Traceback" not in stopped.stderr
    assert list((tmp_path / "run" / ".seed-1").iterdir())
    assert main(["status", str(tmp_path / "run")]) == 0
    status = capsys.readouterr().out
    assert "  state      stopped\n  seeds      0 of 1\n" in status
    assert status.endswith(f"  {message}")
    assert main(["logs", str(tmp_path / "run")]) == 0
    assert "INFO experiment.progress: step 8/" in capsys.readouterr().out


# The command runs this first: it gets a signal while it imports a module, which the fork server has imported.
SEND_SIGNAL_DURING_IMPORTS = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "finetune.run":
            os.kill(os.getpid(), signal.SIGTERM)
del sys.modules["finetune.run"]
sys.meta_path.insert(0, Finder())
"""


def test_a_stop_signal_during_the_imports_ends_with_a_message(run_patched: RunPatched) -> None:
    """Catches SIGTERM in the first seconds, while torch is imported, that ends the command silently."""
    stopped = run_patched(SEND_SIGNAL_DURING_IMPORTS, [])
    assert stopped.returncode == 75, stopped.stderr
    assert stopped.stderr == "deepcloze: interrupted; run the same command again to resume\n"


def test_a_killed_run_resumes_within_a_seed(
    run_patched: RunPatched, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a kill that costs a whole seed, and a resume whose files differ: by order, dropout, or the best weights.
    Also the files of two runs with the same seed that differ, and files that are left by a killed process."""
    overrides = {"training.seeds": "[1]", "training.epochs": "3", "training.evaluate_every": "4"}
    flags = [f"--{key}={value}" for key, value in overrides.items()]
    killed = run_patched(SEND_SIGNAL.format(number=int(signal.SIGKILL)), flags)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run, other = tmp_path / "run", tmp_path / "other"
    assert not (run / "seed-1").exists()
    unfinished = f".state.pt.{platform.node()}.{2**22 + 1}"  # above the largest number of a process
    for folder in (run, run / ".seed-2", run / "seed-2" / "model"):
        write_text(folder / unfinished, "")
    finetune(config_file, overrides)
    assert not list(run.rglob(unfinished))
    assert "seed 1: resuming after step 8" in capsys.readouterr().err
    finetune(config_file, {**overrides, "run.dir": str(other)})
    assert "resuming" not in capsys.readouterr().err
    assert run_files(run) == run_files(other)
    assert len(run_files(run)) > 8
    steps = [[json.loads(line)["step"] for line in (at / "metrics.jsonl").open()] for at in (run, other)]
    assert steps[0] == steps[1]
    assert not (run / ".seed-1").exists()


def stop_at_the_first_evaluation(config_file: Path, overrides: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    save = StateFile.save

    def save_and_stop(self: StateFile, state: Any) -> None:
        save(self, state)
        monkeypatch.setattr(StateFile, "save", save)
        raise KeyboardInterrupt

    monkeypatch.setattr(StateFile, "save", save_and_stop)
    with pytest.raises(StoppedError):
        finetune(config_file, overrides)


def losses_by_seed(run: Path) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for event in map(json.loads, (run / "metrics.jsonl").open(encoding="utf-8")):
        if "loss" in event:
            found.setdefault(event["seed"], []).append(event["loss"])
    return found


def test_seeds_in_another_order_keep_their_events(
    config_file: Path, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a curve that lacks its beginning, or is missing, after seeds were added before an unfinished one, or
    were left out."""
    stop_at_the_first_evaluation(config_file, {"training.seeds": "[1]"}, monkeypatch)
    finetune(config_file, {"training.seeds": "[3, 1]"})
    finetune(config_file, {"training.seeds": "[2, 3]"})
    finetune(config_file, {"training.seeds": "[3]", "run.dir": str(tmp_path / "other")})
    assert losses_by_seed(tmp_path / "run") == losses_by_seed(trained_run) | losses_by_seed(tmp_path / "other")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").open(encoding="utf-8")]
    assert steps == sorted(steps)


def test_an_evaluation_is_logged_once(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two events of an evaluation that a stop prevented and a kill left unsaved, and a finished seed whose last
    one is dropped."""
    overrides = {"training.seeds": "[1]", "training.epochs": "1"}
    for function, error in (("evaluate", KeyboardInterrupt), ("StateFile.save", SystemExit)):
        with monkeypatch.context() as patch:
            patch.setattr(f"finetune.training.fit.{function}", Mock(side_effect=error))
            with pytest.raises((StoppedError, SystemExit)):
                finetune(config_file, overrides)
    for seeds, steps in (("[1]", [5]), ("[1, 2]", [5, 10])):
        finetune(config_file, {**overrides, "training.seeds": seeds})
        logged = read_events(tmp_path / "run" / "metrics.jsonl")
        assert [event["step"] for event in logged if is_evaluation(event)] == steps


@pytest.mark.parametrize("stopped", ["after it was saved", "before"])
def test_a_run_that_starts_over_with_other_settings_is_another_one_in_wandb(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: str
) -> None:
    """Catches W&B that keeps the curve of a discarded training, because it ignores steps that it has; and a W&B run for
    each attempt."""
    opened: list[str] = []

    def open_recorded(config: TrackingConfig, folder: RunFolder, tracked: TrackedRun, console: bool) -> Trackers:
        opened.append(tracked.wandb_id)
        return open_trackers(config, folder, tracked, console)

    monkeypatch.setattr(run_module, "open_trackers", open_recorded)
    one_seed = {"training.seeds": "[1]"}
    for lr in ("1e-2", "1e-2", "3e-2"):
        stop_at_the_first_evaluation(config_file, one_seed | {"training.lr": lr}, monkeypatch)
        if stopped == "before":
            shutil.rmtree(tmp_path / "run" / ".seed-1")
    finetune(config_file, one_seed)
    finetune(config_file, {"training.seeds": "[1, 2]"})
    run_id = json.loads((tmp_path / "run" / "provenance.json").read_text())["run_id"]
    assert opened == [run_id, run_id, *[f"{run_id}-2"] * 3]


def test_a_copied_run_gets_an_id_of_its_own(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a copy of a run folder that logs to the W&B run of the first one."""
    finetune(config_file, {"training.seeds": "[1]"})
    first, copy = tmp_path / "run", tmp_path / "copy"
    shutil.copytree(first, copy)
    finetune(config_file, {"training.seeds": "[1, 2]", "run.dir": str(copy)})
    warning = "".join(f"this is a copy of the run in {first}: it gets an id of its own".split())
    assert warning in "".join(capsys.readouterr().err.split())
    finetune(config_file, {"training.seeds": "[1, 2]", "run.dir": str(copy)})
    finetune(config_file, {"training.seeds": "[1]"})
    assert warning not in "".join(capsys.readouterr().err.split())
    ids = [wandb_id(read_provenance(RunFolder(folder)) or {}) for folder in (first, copy)]
    assert len(set(ids)) == 2


def test_what_an_earlier_training_leaves_is_mentioned(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches hours of an interrupted seed that are lost silently, and a finished seed that is left out."""
    finetune(config_file, {"training.seeds": "[2]"})
    stop_at_the_first_evaluation(config_file, {"training.seeds": "[1]"}, monkeypatch)
    out, err = capsys.readouterr()
    assert "finished, but not one of training.seeds: seed 2" in out + err
    state = config_file.parent / "run" / ".seed-1" / "state.pt"
    saved = torch.load(state, weights_only=True)
    saved["settings"]["training"]["epochs"] = 60  # of all settings of a run without finished seeds
    torch.save(saved, state)
    finetune(config_file, {"training.seeds": "[1, 2]"})
    out, err = capsys.readouterr()
    assert "seed 1 starts over: it was stopped with other settings: training.epochs (was 60, is 2)" in out + err
    assert "not one of" not in out + err


@pytest.mark.parametrize("unfinished", ["removed", "stopped"])
def test_a_seed_that_is_trained_after_a_later_one_keeps_the_events_of_both(
    config_file: Path, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unfinished: str
) -> None:
    """Catches curves of finished seeds that are lost because an earlier one is trained again, or continues."""
    run = tmp_path / "run"
    if unfinished == "removed":
        finetune(config_file, {"training.seeds": "[1, 2]"})
        shutil.rmtree(run / "seed-1")
    else:
        stop_at_the_first_evaluation(config_file, {"training.seeds": "[1]"}, monkeypatch)
        finetune(config_file, {"training.seeds": "[2]"})
    finetune(config_file, {"training.seeds": "[1, 2]"})
    assert losses_by_seed(run) == losses_by_seed(trained_run)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    assert steps == sorted(steps)


def test_models_of_evaluations_are_kept_only_if_asked_for(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a resume without `run.keep: all` that keeps the models of some evaluations, and a hidden folder."""
    stop_at_the_first_evaluation(config_file, {"training.seeds": "[1]", "run.keep": "all"}, monkeypatch)
    run = tmp_path / "run"
    assert len(list((run / ".seed-1" / "evaluations").iterdir())) == 1
    finetune(config_file, {"training.seeds": "[1]", "run.keep": "best"})
    assert not (run / "seed-1" / "evaluations").exists()
    assert not list(run.glob(".seed*"))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(None, id="a folder"),
        pytest.param('{"se', id="torn"),
        pytest.param(f'{{"settings": {"9" * 10_000}}}', id="too many digits"),
        pytest.param(json.dumps(dict.fromkeys(SeedRecord.__dataclass_fields__, 1)), id="wrong types"),
    ],
)
def test_a_damaged_seed_is_rejected(tmp_path: Path, content: str | None) -> None:
    """Catches a traceback that does not say what to remove."""
    complete = tmp_path / "seed-1" / "COMPLETE"
    complete.parent.mkdir()
    if content is None:
        complete.mkdir()
    else:
        complete.write_text(content)
    with pytest.raises(UserError, match=r"COMPLETE is damaged: remove .*seed-1 to train this seed again"):
        read_finished_seeds(RunFolder(tmp_path), {})


@pytest.mark.parametrize(("number", "expected"), [(errno.EIO, HostError), (errno.EACCES, UserError)])
def test_a_seed_that_cannot_be_read_now_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[UserError]
) -> None:
    """Catches the advice to delete a good seed, and a seed that is trained again, after an error of the disk."""
    (tmp_path / "seed-1").mkdir()
    (tmp_path / "seed-1" / "COMPLETE").write_text("{}")

    def fail(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(expected, match=rf"COMPLETE cannot be read: {os.strerror(number)}") as caught:
            read_finished_seeds(RunFolder(tmp_path), {})
        assert type(caught.value) is expected
    monkeypatch.setattr(os, "listdir", fail)
    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        read_finished_seeds(RunFolder(tmp_path), {})


def test_a_copy_of_a_seed_is_no_seed(tmp_path: Path) -> None:
    """Catches a traceback for a folder that a user has copied aside, such as seed-1.bak."""
    for name in ("seed-1.bak", "seed-01", "seed-"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "COMPLETE").write_text("{}")
    assert read_finished_seeds(RunFolder(tmp_path), {}) == {}


@pytest.mark.parametrize(("pages", "code"), [(0, 2), (12, 75), (54, 75)])  # 54: safetensors fails
def test_a_full_disk_keeps_finished_seeds_only(
    config_file: Path, small_disk: SmallDisk, capsys: pytest.CaptureFixture[str], pages: int, code: int
) -> None:
    """Catches a traceback, half a seed that keeps the disk full, and an exit code that does not say to resume."""
    run = small_disk.path / "run"
    command = ["finetune", "--config", str(config_file), f"--run.dir={run}", "--training.epochs=1"]
    small_disk.fill(leave=pages * 4096)
    assert main(command) == code
    error = capsys.readouterr().err
    assert str(run) in error.splitlines()[-1]
    assert "disk full" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert {path.name for path in run.glob("*seed-*/*")} <= {"state.pt"}
    small_disk.free()
    assert main(command) == 0
    assert len(results(run)["splits"]["test"]["accuracy"]["values"]) == 2


def test_a_folder_that_cannot_be_written_is_rejected_first(
    config_file: Path, small_disk: SmallDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches data that are read for minutes before the run is rejected."""
    open_run_folder(small_disk.path / "run")
    small_disk.set_writable(False)
    assert main(["finetune", "--config", str(config_file), f"--run.dir={small_disk.path / 'run'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"deepcloze: run.dir: the run folder {small_disk.path / 'run'} is not writable"


def test_a_disk_that_is_full_at_an_evaluation(
    config_file: Path, small_disk: SmallDisk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback of torch, whose writer says nothing of the disk, when the state of a seed is saved."""
    save = StateFile.save

    def fill_and_save(self: StateFile, state: Any) -> None:
        small_disk.fill(leave=4 * 4096)
        save(self, state)

    monkeypatch.setattr(StateFile, "save", fill_and_save)
    run = small_disk.path / "run"
    command = ["finetune", "--config", str(config_file), f"--run.dir={run}", "--training.seeds=[1]"]
    assert main(command) == 75
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("deepcloze: ")]
    assert line == f"deepcloze: run.dir {run}: {run}/.seed-1/state.pt: disk full; the same command resumes"
    assert list(run.glob(".seed-1/*")) == []
    monkeypatch.undo()
    small_disk.free()
    assert main(command) == 0
