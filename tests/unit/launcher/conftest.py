"""Default signals, and a run folder with stand-ins for checkpoints."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from experiment.files import write_json
from experiment.run_files.checkpoints import checkpoint_path, mark_complete
from experiment.run_files.outcome_file import Outcome, RankRecord, write_outcome
from experiment.run_files.run_folder import RunFolder, open_run_folder


@pytest.fixture(autouse=True)
def default_signals() -> Iterator[None]:
    """The tests may run under nohup, which ignores SIGHUP, or in the background of a script, which ignores SIGINT; so
    would the processes that they start. A command that ends ignores all of them."""
    defaults = (
        (signal.SIGHUP, signal.SIG_DFL),
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGUSR1, signal.SIG_DFL),
        (signal.SIGUSR2, signal.SIG_DFL),
    )
    previous = {number: signal.signal(number, handler) for number, handler in defaults}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.fixture
def empty_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports, sweeps and comparisons in this process draw no PNG files, which takes most of their time."""
    from experiment.results import plots
    from launcher.run_sets import compare

    monkeypatch.setattr(plots, "draw_charts", lambda *_: None)
    for module in (plots, compare):
        monkeypatch.setattr(module, "draw_dots", lambda path, _: path.touch())


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that has started and not ended."""
    folder = open_run_folder(tmp_path / "run")
    tree = {"run": {"dir": str(folder.path)}, "model": {"config": {"model_type": "bert"}}}
    tree |= {"corpus": {"train": "unused"}, "schedule": {"steps": 500}}
    folder.config.write_text(yaml.safe_dump(tree))
    write_json(folder.provenance, {"run_id": "abc", "attempts": [], "ancestors": []})
    folder.metrics.write_text('{"step": 100, "loss": 5.0}\n{"step": 200, "loss": 4.0}\n')
    RankRecord(0, "here", 1, training=True).write(folder)
    return folder


@pytest.fixture
def save(run: RunFolder) -> Callable[..., Path]:
    """Saves a checkpoint with these weights."""

    def save_checkpoint(step: int, weights: str = "", complete: bool = True) -> Path:
        checkpoint = checkpoint_path(run.checkpoints, step)
        (checkpoint / "hf").mkdir(parents=True, exist_ok=True)
        (checkpoint / "hf" / "config.json").write_text("{}")
        (checkpoint / "hf" / "model.safetensors").write_text(weights or f"of step {step}")
        if complete:
            (checkpoint / "COMPLETE").unlink(missing_ok=True)
            mark_complete(checkpoint)
        return checkpoint

    return save_checkpoint


@pytest.fixture
def end(run: RunFolder) -> Callable[..., None]:
    """Ends the run."""

    def end_run(outcome: Outcome = Outcome.DONE) -> None:
        write_outcome(run, outcome)
        RankRecord(0, "here", 1, exit=outcome.exit_code).write(run)

    return end_run
