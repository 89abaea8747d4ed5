import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pytest
from pydantic import Field, PositiveInt, field_validator, model_validator

from experiment.config import Metavar, Positional, Section
from experiment.errors import UserError
from launcher.command_line import Command, flags_of, help_text, is_help_request, parse_command_line, table


class TrainOptions(Section):
    config: Annotated[str, Metavar("FILE")]
    """What
    to train."""

    ranks: PositiveInt | None = None
    """Number of ranks."""

    seed: int = 42
    """Seed of the order."""

    unit: Literal["line", "file"] = "line"
    """What is read."""

    quoting: Literal[0, 3] = 0
    """How it is read."""

    dry_run: bool = False
    """Print the plan only."""

    overrides: dict[str, str] = {}
    """Any key."""

    @field_validator("config")
    @classmethod
    def _no_folder(cls, config: str) -> str:
        if config.endswith("/"):
            raise ValueError(f"'{config}' is a folder")
        return config

    @model_validator(mode="after")
    def _ranks_of_a_file(self) -> Self:
        if self.unit == "file" and self.ranks is not None:
            raise ValueError("--unit file takes no --ranks")
        return self


class ShowOptions(Section):
    run: Annotated[str, Positional("RUN")]
    """The folder."""

    key: Annotated[str | None, Positional("KEY")] = None
    """One key of it."""

    as_json: Annotated[bool, Field(alias="json")] = False
    """As JSON."""


class ListOptions(Section):
    runs: Annotated[tuple[str, ...], Positional("RUN…")]
    """The folders."""

    as_json: Annotated[bool, Field(alias="json")] = False
    """As JSON."""


def train(options: TrainOptions) -> None:
    """Train a model.

    In many steps.

    Example:
        deepcloze train --config a.yaml
    """


def show(options: ShowOptions) -> None:
    """Show a run.

    Example:
        deepcloze show a
    """


COMMANDS: dict[str, Command] = {"train": train, "show": show}


def parsed(line: str) -> dict[str, Any]:
    """The options of a line of words separated by |."""
    name, options = parse_command_line(line.split("|"), COMMANDS)
    assert isinstance(options, {"train": TrainOptions, "show": ShowOptions}[name])
    return dict(options)


@pytest.mark.parametrize(
    "text",
    [
        "2024_01",
        "a,b",
        "run#1",
        "1e5",
        "0x10",
        "[1,2]",
        "None",
        "True",
        "'q'",
        '"',
        "a=b",
        "-1",
        "-",
        "",
        "a b",
        "ü",
        "{x: 1}",
    ],
)
def test_text_is_taken_literally(text: str):
    """Catches values parsed as Python or YAML: 2024_01 as 202401, run#1 as run, a,b as a tuple."""
    assert parsed(f"train|--config={text}")["config"] == text
    assert parsed(f"train|--config|{text}")["config"] == text
    assert parsed(f"train|--config=c|--a.b={text}")["overrides"] == {"a.b": text}
    assert parsed(f"train|--config=c|--a.b|{text}")["overrides"] == {"a.b": text}


def test_numbers_switches_and_defaults():
    """Catches a switch that consumes the next argument, and numbers left as text."""
    assert parsed("train|--dry_run|--ranks|2|--config|c|--quoting=3") == dict(
        TrainOptions(config="c", ranks=2, dry_run=True, quoting=3)
    )
    assert parsed("train|--dry-run=false|--seed=7|--config=c") == dict(TrainOptions(config="c", seed=7))


def test_override_keys_are_taken_literally():
    """Catches `-` becoming `_` in a key, which would rename a corpus, and a changed order of overrides."""
    overrides = parsed("train|--config=c|--corpus.eval.my-news=d|--a.b=1|--a.b=2")["overrides"]
    assert list(overrides.items()) == [("corpus.eval.my-news", "d"), ("a.b", "2")]


def test_a_positional_argument():
    """Catches a positional argument that is not accepted by position and by name."""
    expected = {"run": "a/b", "key": None, "as_json": True}
    assert parsed("show|a/b|--json") == parsed("show|--json|--run=a/b") == expected
    assert parsed("show|a/b|c|--json") == parsed("show|--run=a/b|c|--json") == expected | {"key": "c"}


def test_a_config_alone():
    """Catches `deepcloze pretrain my-run.yaml` being rejected."""
    assert parsed("train|c.yaml|--a.b=1|--ranks=2") == parsed("train|--config=c.yaml|--a.b=1|--ranks=2")
    assert parsed("train|--dry_run|c.yaml") == parsed("train|--config=c.yaml|--dry_run")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "unknown command 'trian'; did you mean 'train'?"),
        ("train|--config=c|--rank=2", "unknown flag '--rank'; did you mean '--ranks'?"),
        ("train|--config=c|--overrides={}", "unknown flag '--overrides'"),
        ("show|a|--x.y=1", "unknown flag '--x.y'"),
        ("train|--config=c|stray", "unexpected argument 'stray'"),
        ("train|--config=c|--dry_run|true", "unexpected argument 'true'"),
        ("train|--config=c|-x", "unexpected argument '-x'; flags are written --name=value"),
        ("train|c.yaml|d.yaml", "unexpected argument 'd.yaml'; flags are written --name=value"),
        ("train|stray|--config=c", "unexpected argument 'stray'; flags are written --name=value"),
        ("train|-config|c.yaml", "unexpected argument '-config'; flags are written --name=value"),
        ("train|--config=c|—ranks=2", "unexpected argument '—ranks=2'; flags are written --name=value"),
        ("train|--config=c|dry-run=true", "unexpected argument 'dry-run=true'; flags are written --name=value"),
        ("train|--config=c|a.b=1", "unexpected argument 'a.b=1'; flags are written --name=value"),
        ("train|--config=c|--a.b=[1,|2]", "unexpected argument '2]'; flags are written --name=value, with quotes"),
        ("show|-a", "unexpected argument '-a'"),
        ("show|a|b|c", "unexpected argument 'c'"),
        ("show|--run=a|b|c", "unexpected argument 'c'"),
        ("train|--config", "--config needs a value"),
        ("train|--config|--dry_run", "--config needs a value"),
        ("train|--config=c|--a.b", "--a.b needs a value"),
        ("train|--dry_run", "missing: --config FILE"),
        ("show", "missing: RUN"),
        ("train|--config=c|--ranks=two", "--ranks: expected a whole number > 0, found 'two'"),
        ("train|--config=c|--ranks=1_0", "--ranks: expected a whole number > 0, found '1_0'"),
        ("train|--config=c|--ranks=0", "--ranks: expected a whole number > 0, found '0'"),
        ("train|--config=c|--seed=1.5", "--seed: expected a whole number, found '1.5'"),
        ("train|--config=c|--unit=lin", "--unit: expected 'line' or 'file', found 'lin'; did you mean 'line'?"),
        ("train|--config=c|--quoting=1", "--quoting: expected 0 or 3, found '1' (deepcloze train --help)"),
        ("train|--config=c/", "--config: 'c/' is a folder (deepcloze train --help)"),
        ("train|--config=c|--unit=file|--ranks=1", "--unit file takes no --ranks (deepcloze train --help)"),
        ("train|--config=c|--dry_run=maybe", "--dry_run: expected nothing, true or false, found 'maybe'"),
        ("train|--config=c|--", "unknown flag '--'"),
    ],
)
def test_mistakes_are_rejected(line: str, message: str):
    """Catches a mistake that is ignored, or that only the running command would find."""
    with pytest.raises(UserError, match=re.escape(message)):
        parsed(line)


def test_flags_come_from_the_fields():
    """Catches help that differs from what the command accepts."""
    config, ranks, *_, dry_run = flags_of(TrainOptions).values()
    assert (config.metavar, config.meaning, config.required, config.types) == ("FILE", "What to train", True, (str,))
    assert (ranks.required, ranks.types, ranks.metavar) == (False, (int,), "N")
    assert (dry_run.is_switch, dry_run.metavar) == (True, "")


@pytest.mark.parametrize("line", ["", "--help", "-h", "train|--help", "train|--config|c|-h"])
def test_a_request_for_help(line: str):
    """Catches a command that runs although help was requested."""
    assert is_help_request(line.split("|") if line else [])
    assert not is_help_request(["train", "--config", "c"])


def test_help_lists_flags_defaults_and_an_example():
    """Catches a flag, default or example missing from the help, and lines wider than the terminal."""
    page = help_text(["train", "--help"], COMMANDS, "about", width=60)
    assert page.splitlines()[0] == "usage: deepcloze train --config FILE [flags] [--section.key=value …]"
    for part in (
        "In many steps.",
        "What to train (required)",
        "Seed of the order (default: 42)",
        "--unit line|file",
        "How it is read (default: 0)",
        "--section.key=value  Any key",
    ):
        assert part in page
    assert page.endswith("example:\n  deepcloze train --config a.yaml")
    overview = help_text([], COMMANDS, "about " * 30, width=60)
    assert "  train  Train a model." in overview
    assert max(map(len, overview.splitlines())) <= 60


def test_help_names_the_keys_that_a_command_takes() -> None:
    """Catches help of a command that takes some keys only, such as predict, which says that it takes any key."""
    from launcher.commands import COMMANDS

    page = help_text(["predict", "--help"], COMMANDS, "about", width=80)
    assert page.splitlines()[0].endswith(" [flags] [--columns.ROLE=NAME …]")
    assert "\n  --columns.ROLE=NAME " in page
    assert "--section.key" not in page


def test_values_of_a_flag_that_is_given_twice(tmp_path: Path) -> None:
    """Catches a corpus without its first source, and half of a grid."""
    from launcher.commands import COMMANDS

    line = ["corpus", "--source=a,b", "--source", "c", "--tokenizer=t", "--output=first", "--output=last"]
    _, options = parse_command_line(line, COMMANDS)
    assert (options.source, options.output.name) == (("a", "b", "c"), "last")
    (tmp_path / "c").touch()
    _, options = parse_command_line(["sweep", f"--config={tmp_path}/c", "--grid=a=1,2", "--grid", "b=3"], COMMANDS)
    assert options.grid == "a=1,2 b=3"
    _, options = parse_command_line(["pretrain", f"--config={tmp_path}/c", "--include=n1", "--include=n2:0"], COMMANDS)
    assert options.include == "n1@n2:0"


def test_a_file_with_a_comma_in_its_name_is_one_of_several_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a name that is split at its comma if --source is given twice; alone it is not."""
    from launcher.commands import COMMANDS

    monkeypatch.chdir(tmp_path)
    Path("a,b.txt").touch()
    for flags, source in {
        "--source a,b.txt --source c,d": ("a,b.txt", "c", "d"),
        "--source a,b.txt": "a,b.txt",
    }.items():
        line = f"corpus {flags} --tokenizer t --output o"
        assert parse_command_line(line.split(), COMMANDS)[1].source == source


@pytest.mark.parametrize(
    "line", ["pretrain --config=a --config b", "compare a --file=b", "validate --config=a --config=b"]
)
def test_a_second_config_is_rejected(line: str) -> None:
    """Catches a run without the settings of the first file, as if files were merged."""
    from launcher.commands import COMMANDS

    with pytest.raises(UserError, match="expected one config, found a and b"):
        parse_command_line(line.split(), COMMANDS)


@pytest.mark.parametrize("key", ["--document_start=x", "--document-start=x"])
def test_dashes_in_a_key_without_a_section(key: str, tmp_path: Path) -> None:
    """Catches a key of a cleaning that is unknown with a dash, unlike flags."""
    from launcher.commands import COMMANDS

    assert parse_command_line(["clean", "--config=c", key], COMMANDS)[1].overrides == {"document_start": "x"}


@pytest.mark.parametrize("command", ["plan", "preflight", "pretrain"])
def test_only_keys_of_the_config_are_suggested(command: str) -> None:
    """Catches a key of a task that is suggested for a pretraining run, which then rejects it."""
    from launcher.commands import COMMANDS

    with pytest.raises(UserError, match=r"did you mean '--optimizer.lr' or '--optimizer.muon.lr'\? "):
        parse_command_line([command, "--lr=1"], COMMANDS)


def test_an_unknown_flag_says_how_keys_are_written() -> None:
    """Catches a user of another program who does not learn of config keys, or only of a flag that is no match."""
    from launcher.commands import COMMANDS

    for flag, message in {
        "--lr": "did you mean '--training.lr'? (",
        "--momentum": "known: --config, --dry_run; config keys are written --section.key=value; `deepcloze config fine",
        "--confg": "did you mean '--config'? Config keys are written --section.key=value; `deepcloze config finetune` ",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            parse_command_line(["finetune", "--config=c", f"{flag}=1"], COMMANDS)
    with pytest.raises(UserError, match=r"'--optimizer.lr' or .*'--training.lr'\?"):
        parse_command_line(["sweep", "--config=c", "--lr=1"], COMMANDS)


def test_flags_of_deepspeed() -> None:
    """Catches `--num_nodes` taken for `--num_gpus`."""
    from launcher.commands import COMMANDS

    for flag, message in {
        "--num_nodes": "did you mean '--include'?",
        "--hosts": "did you mean '--hostfile'?",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            parse_command_line(["pretrain", "--config=c", f"{flag}=1"], COMMANDS)


def test_an_argument_may_be_repeated() -> None:
    """Catches a command of several runs that sees one of them, takes a flag for a run, or accepts none."""

    def listed(options: ListOptions) -> None:
        """List."""

    commands: dict[str, Command] = {"listed": listed}
    lines = {
        "listed a": ("a",),
        "listed a --json b c": ("a", "b", "c"),
        "listed --runs=a": ("a",),
        "listed --runs=a --runs b": ("a", "b"),
        "listed --runs a b": ("a", "b"),
    }
    for line, runs in lines.items():
        assert parse_command_line(line.split(), commands)[1] == ListOptions(runs=runs, json="--json" in line)
    with pytest.raises(UserError, match="missing: RUN…"):
        parse_command_line(["listed", "--json"], commands)
    assert "usage: deepcloze listed RUN… [flags]" in help_text(["listed"], commands, "", 100)


def test_help_keeps_names_whole() -> None:
    """Catches `my-` at the end of a line and `run.yaml` on the next one, which nobody can copy."""
    name = "my-run-of-a-model-with-a-long-name.yaml"
    assert name in "".join(table([("--config", f"a file, such as {name}")], width=30))
