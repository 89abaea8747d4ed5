from pathlib import Path

import pytest

from experiment.errors import UserError
from pretrain.arguments import read_arguments


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: {dir: RUN}\nmodel: {config: {model_type: bert}}\ncorpus: {train: DIR}\nschedule: {steps: 5}\n"
    )
    return str(path)


@pytest.mark.parametrize(
    ("argv", "steps", "name"),
    [
        (["--config", "{file}"], 5, None),
        (["--config={file}", "--schedule.steps=7"], 7, None),
        (["--schedule.steps", "7", "--config", "{file}"], 7, None),
        (["--local_rank=3", "--config={file}", "--tracking.name=1e-3"], 5, "1e-3"),
        (["--local_rank", "3", "--config={file}", "--tracking.name", "a=b"], 5, "a=b"),
        (["--config={file}", "--tracking.name=a=b"], 5, "a=b"),
    ],
)
def test_both_forms_of_a_flag_are_read(file: str, argv: list[str], steps: int, name: str | None) -> None:
    """Catches an order or a form of flags that is not read, DeepSpeed's --local_rank taken for a config key, and values
    cut at an equals sign."""
    config = read_arguments([argument.format(file=file) for argument in argv])
    assert (config.schedule.steps, config.tracking.name) == (steps, name)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--config FILE is missing"),
        (["--schedule.steps=7"], "--config FILE is missing"),
        (["--config"], "--config needs a value"),
        (["--config={file}", "--schedule.steps"], r"--schedule\.steps needs a value"),
        (["--config={file}", "schedule.steps=7"], r"unexpected argument 'schedule\.steps'"),
        (["{file}"], "unexpected argument"),
        (["--config={file}", "--schedule.stps=7"], r"schedule\.stps"),
    ],
)
def test_malformed_arguments_are_rejected(file: str, argv: list[str], message: str) -> None:
    """Catches a trace for a mistyped command, and an override that is ignored."""
    with pytest.raises(UserError, match=message):
        read_arguments([argument.format(file=file) for argument in argv])
