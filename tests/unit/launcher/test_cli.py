import errno
import importlib.metadata
import io
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from experiment.errors import QUIET_VARIABLE, StoppedError, UserError, inform, is_quiet, notify
from experiment.process.fast_imports import fast_imports
from experiment.progress import terminal
from launcher.cli import RESUMABLE, main
from launcher.command_line import flags_of, options_of, parse_command_line
from launcher.commands import COMMANDS
from launcher.hosts.machine import Devices

ROOT = Path(__file__).parents[3]


def deepcloze(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "launcher", *argv],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def imported(answer: subprocess.CompletedProcess[str]) -> set[str]:
    return {line.rsplit("|", 1)[1].strip() for line in answer.stderr.splitlines() if line.startswith("import time:")}


@pytest.fixture
def report_stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., object]], None]:
    """Replaces the function that `deepcloze report` calls."""

    def put(function: Callable[..., object]) -> None:
        module = ModuleType("launcher.report")
        module.report_runs = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "launcher.report", module)

    return put


@pytest.mark.parametrize("argv", [(), ("--help",), ("pretrain", "--help")])
def test_help_is_fast(argv: tuple[str, ...]):
    """Catches an import of torch or other heavy libraries, which makes help take seconds."""
    answer = deepcloze(*argv)
    assert answer.returncode == 0
    assert answer.stdout.startswith("usage: deepcloze")
    modules = imported(answer)
    assert "launcher.cli" in modules
    assert not modules & {"torch", "transformers", "datasets", "wandb", "numpy", "deepspeed"}


def test_what_a_command_does_not_need_is_not_imported():
    """Catches libraries that take a second of the start of each command, collections among the million objects that
    imports make, and settings of the garbage collector that stay for the rest of the process."""
    evaluate = ["evaluate", "--checkpoint=nowhere", "--corpus=nowhere"]
    predict = ["predict", "--model=nowhere", f"--input={__file__}", "--output=labels.csv"]
    code = (
        "import gc, sys; from finetune.config import FinetuneConfig; from launcher.cli import main\n"
        "print(len(FinetuneConfig.variants()), 'transformers' in sys.modules)\n"
        "gc.collect(); gc.unfreeze()\n"  # Python 3.12 starts with frozen objects
        "state = gc.get_threshold(), gc.get_freeze_count(), gc.isenabled()\n"
        "full = []\n"
        "gc.callbacks.append(lambda phase, info: full.extend([phase] * (info['generation'] == 2)))\n"
        f"print(main({evaluate}), 'transformers' in sys.modules, *full, 'full collections')\n"
        "print((gc.get_threshold(), gc.get_freeze_count(), gc.isenabled()) == state)\n"
        f"print(main({predict}), *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[:3] == ["8 False", "2 True full collections", "True"]
    status, *modules = lines[3].split()
    assert status == "2"
    assert not set(modules) & {"deepspeed", "scipy", "sklearn", "matplotlib", "datasets", "wandb", "pandas"}


def test_a_start_is_announced_before_torch_is_imported(tmp_path: Path):
    """Catches a command that seems to hang for the seconds that its imports take."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"run: {{dir: {tmp_path}/run}}\ncorpus: {{train: {tmp_path}/none}}\n"
        "model: {config: {model_type: bert}}\nschedule: {steps: 2}\n"
    )
    code = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            sys.exit('importing torch')\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from launcher.cli import main\n"
        f"main(['pretrain', '--config', {str(config)!r}, '--num_gpus=1'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == f"deepcloze: checking {config} for 1 rank on this machine\nimporting torch\n"


def test_the_version_of_a_clone_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Catches a traceback of `python -m launcher --version`."""
    monkeypatch.setattr(importlib.metadata.Distribution, "discover", lambda **_: iter(()))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "deepcloze (not installed)\n"


def test_help_explains_every_command_and_flag(capsys: pytest.CaptureFixture[str]):
    """Catches a command or flag that is missing from the help, and an example that the command would reject."""
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert "deepcloze --version" in " ".join(overview.split())
    for name, command in COMMANDS.items():
        assert f"  {name}" in overview
        assert main([name, "--help"]) == 0
        page = capsys.readouterr().out
        for flag in flags_of(options_of(command)).values():
            assert flag.meaning.split()[0] in page
            assert (flag.metavar if flag.positional else f"--{flag.name}") in page
        program, *example = shlex.split(page.partition("\nexample:\n")[2])
        assert program == "deepcloze"
        assert parse_command_line(example, COMMANDS)[0] == name


@pytest.mark.parametrize("argv", ["-q report a", "report --quiet a", "report a -q"])
def test_quiet_commands(
    argv: str, report_stand_in: Callable[[Callable[..., object]], None], capsys: pytest.CaptureFixture[str]
):
    """Catches progress that is shown with --quiet, in this process or in those that it starts; results, warnings and
    errors that are not; and a later command that is quiet, too."""

    def command(*_: object) -> str:
        inform("as expected")
        terminal().print("progress")
        inherited = subprocess.run(["sh", "-c", f"echo ${QUIET_VARIABLE}"], capture_output=True, text=True, check=True)
        assert inherited.stdout.strip() == ("1" if is_quiet() else "")
        notify("warning: unexpected")
        return "the result"

    report_stand_in(command)
    assert main(argv.split()) == 0
    assert capsys.readouterr() == ("the result\n", "deepcloze: warning: unexpected\n")
    assert main(["report", "a"]) == 0
    assert "as expected" in capsys.readouterr().err
    report_stand_in(lambda *_: (_ for _ in ()).throw(UserError("a mistake")))
    assert main(argv.split()) == 2
    assert capsys.readouterr() == ("", "deepcloze: a mistake\n")


@pytest.mark.parametrize("name", ["serving", "state", "_fail", "main"])
def test_only_commands_that_exist(name: str, capsys: pytest.CaptureFixture[str]):
    """Catches a command that is listed or reachable but does nothing."""
    assert main([name]) == 2
    assert f"unknown command '{name}'" in capsys.readouterr().err


def test_a_mistake_is_one_message_and_exit_2():
    """Catches a traceback, or a message on stdout, for a user's mistake, through the real entry point."""
    answer = deepcloze("pretrain", "--config", "none.yaml", "--num_gpu", "2")
    messages = [line for line in answer.stderr.splitlines() if not line.startswith("import time:")]
    assert answer.returncode == 2
    assert answer.stdout == ""
    about_keys = "Config keys are written --section.key=value; `deepcloze config pretrain` lists them"
    suggestion = f"unknown flag '--num_gpu'; did you mean '--num_gpus'? {about_keys}"
    assert messages == [f"deepcloze: {suggestion} (deepcloze pretrain --help)"]


def test_exceptions_become_exit_codes(
    report_stand_in: Callable[[Callable[..., object]], None], capsys: pytest.CaptureFixture[str]
):
    """Catches outcomes that scripts and job queues cannot tell apart."""

    def ends_with(error: BaseException) -> int:
        def report_runs(*_: object) -> object:
            raise error

        report_stand_in(report_runs)
        return main(["report", "2024_01"])

    assert ends_with(UserError("no such run")) == 2
    assert capsys.readouterr().err == "deepcloze: no such run\n"
    assert ends_with(StoppedError("stopped at step 5")) == 75
    assert capsys.readouterr().err == "deepcloze: stopped at step 5\n"
    assert ends_with(KeyboardInterrupt()) == 130
    capsys.readouterr()
    assert ends_with(OSError(28, "No space left on device", "runs/a/launch.jsonl")) == 2
    assert capsys.readouterr().err == "deepcloze: runs/a/launch.jsonl: disk full\n"
    assert ends_with(MemoryError()) == 1
    assert capsys.readouterr().err == "deepcloze: memory ran out\n"
    assert ends_with(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")) == 1
    message = capsys.readouterr().err
    assert message.startswith("deepcloze: memory ran out; other programs may use the GPU")
    assert message.endswith(" (CUDA out of memory. Tried to allocate 2.00 GiB.)\n")
    assert ends_with(RuntimeError("could not create a primitive")) == 1
    assert capsys.readouterr().err == "deepcloze: memory ran out (could not create a primitive)\n"
    unsupported = RuntimeError("could not create a primitive descriptor for a matmul primitive")
    for bug in (ZeroDivisionError(), FileNotFoundError(2, "No such file or directory", "x"), unsupported):
        with pytest.raises(type(bug)):
            ends_with(bug)


def test_ctrl_c_during_an_import_is_delayed(
    report_stand_in: Callable[[Callable[..., object]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback of a half imported library, and a command in the background of a script that stops."""
    (tmp_path / "slow_library.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\ndone = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    imported = []

    def report_runs(*_: object) -> None:
        with fast_imports():
            imported.append(importlib.import_module("slow_library").done)
        sys.modules.pop("slow_library")

    report_stand_in(report_runs)
    assert main(["report", "2024_01"]) == 130
    sys.modules.pop("slow_library")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert main(["report", "2024_01"]) == 0
    assert imported == [True, True]


def test_a_closed_terminal_does_not_change_the_exit_code(
    report_stand_in: Callable[[Callable[..., object]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches exit code 1 of a run that has saved and can be resumed, because its last message cannot be written."""

    class ClosedTerminal(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def report_runs(*_: object) -> object:
        raise StoppedError("stopped at step 5")

    report_stand_in(report_runs)
    monkeypatch.setattr(sys, "stderr", ClosedTerminal())
    assert main(["report", "2024_01"]) == 75


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_reader_that_ends_is_no_error(unbuffered: str) -> None:
    """Catches a traceback after `deepcloze pretrain --help | head -1`, or another exit code if the text is short."""
    reader, writer = os.pipe()
    os.close(reader)
    answer = show_help(writer, unbuffered)
    os.close(writer)
    assert (answer.returncode, answer.stderr) == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_full_disk_below_stdout_is_reported(unbuffered: str) -> None:
    """Catches `deepcloze predict … > FILE` that loses its last lines on a full disk without a word."""
    with Path("/dev/full").open("w") as full:
        answer = show_help(full.fileno(), unbuffered)
    assert (answer.returncode, answer.stderr.strip()) == (2, "deepcloze: disk full")


def test_lines_are_shown_at_once() -> None:
    """Catches a log of a job, or a pipe, without the URL of a server or the sources that a corpus is built from."""
    code = "import launcher.cli, os; launcher.cli.main = lambda: print('shown') or os.kill(os.getpid(), 9)"
    command = [sys.executable, "-c", f"{code}; from launcher.__main__ import run; run()"]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    assert subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment).stdout == b"shown\n"


def show_help(stdout: int, unbuffered: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", "pretrain", "--help"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, cwd=ROOT, env=environment, text=True, check=False
    )


def test_scores_are_all_that_is_on_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `deepcloze evaluate --json` that is not JSON: DeepSpeed prints there which device it has found."""
    seen: list[str | None] = []
    module = ModuleType("pretrain.evaluate")
    module.evaluate_command = lambda *_, **__: seen.append(os.environ.get("DS_ACCELERATOR"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pretrain.evaluate", module)
    monkeypatch.setenv("DS_ACCELERATOR", "")  # restored at the end
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr("launcher.hosts.machine.find_devices", lambda _: Devices("cpu", (0, 1)))
    assert main(["evaluate", "--checkpoint", "runs/a", "--corpus", "corpora/b", "--json"]) == 0
    assert seen == ["cpu"]


@pytest.mark.parametrize(
    ("command", "function"),
    [("pretrain", "launcher.launch.launch_pretraining"), ("finetune", "finetune.run.finetune")],
)
def test_an_interrupted_run_can_be_resumed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, function: str
):
    """Catches Ctrl-C before the ranks start giving another exit code than Ctrl-C after."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launcher.commands.load_config", lambda *_: None)
    monkeypatch.setattr(function, interrupted)
    assert main([command, "--config", "x.yaml"]) == 75
    assert capsys.readouterr().err == "deepcloze: interrupted; run the same command again to resume\n"


def test_report_prints_the_path(
    report_stand_in: Callable[[Callable[..., object]], None], capsys: pytest.CaptureFixture[str]
):
    """Catches a folder name read as a number: 2024_01 is a folder."""
    report_stand_in(lambda runs, output: Path(runs[0]) / "report" / "index.html")
    assert main(["report", "2024_01"]) == 0
    assert capsys.readouterr().out == "2024_01/report/index.html\n"


def test_every_resumable_command_exists() -> None:
    """Catches a command that was renamed, and whose message after Ctrl-C no longer says how to resume."""
    assert set(RESUMABLE) <= set(COMMANDS)


def test_a_deleted_working_directory_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback without the name of a file."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["status", "runs/mine"]) == 2
    assert "the working directory no longer exists" in capsys.readouterr().err


def test_a_name_that_is_not_utf_8_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback when a command writes the name to a file, such as RUN/provenance.json."""
    folder = tmp_path / os.fsdecode(b"\xfcbung")
    folder.mkdir()
    assert main(["status", str(folder)]) == 2
    assert "\\xfcbung' is not UTF-8, as names of files and other arguments have to be" in capsys.readouterr().err
    monkeypatch.chdir(folder)
    assert main(["status", "runs/mine"]) == 2
    assert "\\xfcbung' is not UTF-8, as names of files and other arguments have to be" in capsys.readouterr().err
