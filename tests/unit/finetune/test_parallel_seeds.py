import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from empty_figures import EMPTY_FIGURES
from experiment.files import write_json
from experiment.run_files.metrics_file import write_events
from experiment.run_files.outcome_file import Outcome, read_outcome
from experiment.run_files.run_folder import RunFolder, open_run_folder
from experiment.run_files.run_lock import is_locked, lock_run
from finetune.parallel_seeds import _share, log_events_of_process, train_seeds_in_parallel
from finetune.run import finetune
from finetune.seed_run import state_file
from launcher.cli import main
from launches import patched
from runs import soak
from waiting import wait_until

ROOT = Path(__file__).resolve().parents[3]
FLAGS = {"training.seeds": "[1, 2, 3]", "training.epochs": "3", "training.evaluate_every": "4"}


@pytest.fixture(autouse=True)
def forked(handed_over: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None) -> None:
    """Commands, and the processes that they start, are forked from one that has imported their modules."""
    for name, value in {**handed_over, **patched(tmp_path, EMPTY_FIGURES)}.items():
        monkeypatch.setenv(name, value)


def events(run: Path) -> list[tuple[int, int, float | None]]:
    return [
        (event["step"], event["seed"], event.get("loss"))
        for event in map(json.loads, (run / "metrics.jsonl").open(encoding="utf-8"))
    ]


def start(config: Path, **flags: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "launcher", "finetune", "--config", str(config)]
    return subprocess.Popen([*command, *(f"--{key}={value}" for key, value in flags.items())], cwd=ROOT)


def run_here(config: Path, **flags: str) -> int:
    """The exit code of the command in this process."""
    return main(["finetune", "--config", str(config), *(f"--{key}={value}" for key, value in flags.items())])


def children_with(path: Path) -> list[int]:
    """Processes of seeds of this run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"finetune.parallel_seeds" in command and str(path / "config.yaml").encode() in command:
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize(("number", "resumed"), [(signal.SIGTERM, "2"), *soak((signal.SIGKILL, "1"))])
def test_parallel_seeds_give_the_results_of_one_after_the_other(
    config_file: Path, tmp_path: Path, number: signal.Signals, resumed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches seeds that share a random state, events that are lost or doubled by a resume, events whose steps
    decrease, which W&B drops, and processes that go on when the command was stopped or killed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = tmp_path / "run"
    process = start(config_file, **FLAGS, **{"training.parallel_seeds": "2"})
    folder = RunFolder(run)
    wait_until(lambda: all((folder.logs / f"seed-{seed}.jsonl").exists() for seed in (1, 2)), process)
    wait_until(lambda: any((run / f".seed-{seed}" / "state.pt").exists() for seed in (1, 2)), process)
    process.send_signal(number)
    assert process.wait() == (75 if number is signal.SIGTERM else -number)
    wait_until(lambda: not children_with(run))
    flags = {**FLAGS, "training.parallel_seeds": resumed}
    assert run_here(config_file, **flags) == 0

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    finetune(config_file, {**FLAGS, "run.dir": str(tmp_path / "other")})
    results = [json.loads((at / "results.json").read_text()) for at in (run, tmp_path / "other")]
    assert results[0]["splits"] == results[1]["splits"]
    assert sorted(event[1] for event in events(run)) == sorted(event[1] for event in events(tmp_path / "other"))
    steps = [step for step, *_ in events(run)]
    assert steps == sorted(steps)
    assert not list(folder.logs.glob("seed-*.jsonl"))


def test_a_collapsed_seed_is_reported(config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches advice that only the log of the seed has."""
    flags = {"training.seeds": "[1, 2]", "training.parallel_seeds": "2", "training.lr": "1e-30", "training.steps": "2"}
    assert run_here(config_file, **flags) == 0
    reported = [line for line in capfd.readouterr().err.splitlines() if "has collapsed: " in line]
    collapsed = json.loads((tmp_path / "run" / "results.json").read_text())["collapsed"]
    assert collapsed
    assert sorted(line.split(" has ")[0] for line in reported) == [f"seed {seed}" for seed in collapsed]
    assert all("; usual values of training.lr are in docs/finetuning.md" in line for line in reported)


@pytest.mark.parametrize("parallel", ["1", "2"])
def test_a_seed_that_fails_ends_the_command(config_file: Path, tmp_path: Path, parallel: str) -> None:
    """Catches a failure that only a log file tells of, and one that counts as a mistake in the config: `watch` would
    end, and a sweep call the run rejected."""
    flags = {
        **FLAGS,
        "training.seeds": "[1, 2]",
        "training.parallel_seeds": parallel,
        "training.lr": "1e30",
        "training.grad_clip": "0",
    }
    with pytest.raises(SystemExit, match=r"^deepcloze: seed [12](, step| failed).*training diverged"):  # exit code 1
        run_here(config_file, **flags)
    outcome = read_outcome(RunFolder(tmp_path / "run"))
    assert outcome.outcome is Outcome.FAILED
    assert outcome.message.startswith("seed ")
    assert not children_with(tmp_path / "run")


@pytest.mark.parametrize(
    ("error", "reason", "has_traceback"),
    [
        ("OutOfMemoryError('CUDA out of memory. Tried')", r"memory ran out; .* see nvidia-smi \(CUDA out .*\)", False),
        ("AcceleratorError('launch failed\\nFor debugging')", "AcceleratorError: launch failed", True),
    ],
)
def test_an_unexpected_error_of_a_seed(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str, reason: str, has_traceback: bool
) -> None:
    """Catches a traceback for a lack of memory, a command that gives no advice, and a bug that aborts the process or
    has a reason of many lines."""
    code = f"""
import torch, finetune.seed_run
def train_seed(*_): raise torch.{error}
finetune.seed_run.train_seed = train_seed
"""
    for name, value in patched(tmp_path, EMPTY_FIGURES + code).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=rf"seed [12] failed \(exit code 1\): {reason}; see ") as caught:
        run_here(config_file, **{**FLAGS, "training.seeds": "[1, 2]", "training.parallel_seeds": "2"})
    log = Path(str(caught.value).rpartition("; see ")[2]).read_text()
    assert re.search(f"\ndeepcloze: {reason}$", log.rstrip())
    assert ("Traceback" in log) == has_traceback


def test_a_reason_that_its_log_cannot_take(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches the last line of the log as the reason, if the disk of the run folder fails: advice on the learning rate
    for a disk that is read-only."""
    patch = """
import errno, os, finetune.seed_run
def train_seed(*_):
    print("part of a line", end="")
    os.write(2, b"deepcloze: seed 1 has collapsed\\n")
    for stream in (1, 2): os.dup2(os.open("/dev/full", os.O_WRONLY), stream)
    raise OSError(errno.EROFS, "", "/runs/a/state.pt")
finetune.seed_run.train_seed = train_seed
"""
    for name, value in patched(tmp_path, EMPTY_FIGURES + patch).items():
        monkeypatch.setenv(name, value)
    assert run_here(config_file, **{**FLAGS, "training.seeds": "[1, 2]", "training.parallel_seeds": "2"}) == 2
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"deepcloze: run.dir {tmp_path}/run: /runs/a/state.pt: Read-only file system"
    )


def test_a_seed_that_outlives_its_command_is_waited_for(config_file: Path, tmp_path: Path) -> None:
    """Catches two processes that train one seed, after the command was killed and started again at once."""
    folder = open_run_folder(tmp_path / "run")
    write_json(folder.provenance, {})  # a run has written the config
    folder.config.write_text(config_file.read_text().replace("epochs: 2", "epochs: 1000"))
    command = [sys.executable, "-m", "finetune.parallel_seeds", str(folder.config), "1"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE) as process:
        wait_until(lambda: is_locked(folder), process)
        process.stdin.close()  # as the system does when the command is killed
        with lock_run(folder):
            assert process.wait() == 75


@pytest.mark.parametrize(("evaluated", "expected"), [(None, [1, 2, 2]), ([{"steps": 2}], [1, 2, 2]), ([], [1, 2])])
def test_events_are_logged_once(tmp_path: Path, evaluated: list[object] | None, expected: list[int]) -> None:
    """Catches events that Ctrl-C doubles, because it comes while they are logged: the next command logs them again.
    evaluated: in the state from which a seed resumes; it repeats an evaluation that is not there."""
    run, logged = SimpleNamespace(folder=open_run_folder(tmp_path), steps=2, settings={}), list[int]()
    if evaluated is None:
        write_json(tmp_path / "seed-1" / "COMPLETE", {})
    else:
        state_file(1, run).save({"updater": {"steps": 2}, "epochs": evaluated})  # type: ignore[arg-type]
    write_events(run.folder.logs / "seed-1.jsonl", [{"step": 1}, {"step": 2}, {"step": 2, "eval/validation/loss": 1.0}])

    def log(step: int, _: object) -> None:
        logged.append(step)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        log_events_of_process(1, run, log)  # type: ignore[arg-type]
    assert logged == expected
    assert not list(run.folder.logs.iterdir())


def test_the_memory_of_the_inspected_model_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a command that keeps gigabytes of a GPU while the processes of seeds train on it."""
    freed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    run = SimpleNamespace(folder=open_run_folder(tmp_path), training=SimpleNamespace(parallel_seeds=2), steps=0)
    run.settings = {}
    assert train_seeds_in_parallel(run, {}) == {}  # type: ignore[arg-type]
    assert freed == [True]


def test_each_process_gets_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches processes on the same GPU, and GPUs that the user has hidden."""

    def share(slot: int, kind: str = "cuda") -> dict[str, str]:
        device = SimpleNamespace(torch_device=SimpleNamespace(type=kind))
        return _share(slot, 2, SimpleNamespace(task=SimpleNamespace(device=device)))  # type: ignore[arg-type]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [share(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert [share(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["3", "GPU-5"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert share(0, "cpu") == {"OMP_NUM_THREADS": "2"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,GPU-5"
