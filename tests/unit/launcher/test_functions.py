"""The functions of the module `deepcloze`, without training. Their examples run in test_documented_commands.py."""

import inspect
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import deepcloze
from deepcloze import UserError
from experiment import progress
from experiment.config import load_config
from experiment.config.yaml_dialect import write_yaml
from experiment.errors import is_quiet, warn_once
from experiment.process import own_process
from experiment.process.hardware import keep_freed_memory
from experiment.process.own_process import hide_gpus, use_cpu
from experiment.process.signals import ignore_stop_signals
from launcher.hosts.machine import Devices
from launcher.options import PretrainOptions
from pretrain.config import PretrainConfig

RUN = {
    "run": {"dir": "runs/mine"},
    "model": {"config": {"model_type": "bert"}},
    "corpus": {"train": "corpora/books"},
    "schedule": {"steps": 10},
}
TASK = {"run": {"dir": "runs/task"}, "task": {"train": "train.csv"}, "model": {"init_from": "model"}}
COMPARISON = {"run": {"dir": "runs/comparison"}, "rows": {"a": {"init_from": "model"}}, "tasks": ["task.yaml"]}


def run_script(file: Path, code: str) -> "subprocess.CompletedProcess[str]":
    """Run a script as a user does, with its folder first on Python's path."""
    file.write_text(code, encoding="utf-8")
    return subprocess.run([sys.executable, file.name], cwd=file.parent, capture_output=True, text=True, check=False)


def test_an_import_imports_nothing_else(tmp_path: Path) -> None:
    """Catches an import that takes seconds before anything is called."""
    code = "import sys, deepcloze; dir(deepcloze); print({'numpy', 'pydantic', 'torch', 'launcher'} & set(sys.modules))"
    assert run_script(tmp_path / "script.py", code).stdout == "set()\n"


@pytest.mark.parametrize("name", deepcloze.__all__)
def test_public_names_are_documented(name: str) -> None:
    """Catches a name that cannot be imported, and one without types or docs."""
    value = getattr(deepcloze, name)
    assert inspect.getdoc(value)
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        parameters = signature.parameters.values()
        assert inspect.Parameter.empty not in (signature.return_annotation, *(each.annotation for each in parameters))


def test_unknown_names_are_rejected() -> None:
    """Catches a misspelled name that is found to be something else, such as a package."""
    with pytest.raises(AttributeError, match="module 'deepcloze' has no attribute 'launcher'"):
        deepcloze.launcher  # noqa: B018


def test_other_systems_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback about `fcntl` on Windows and `sched_getaffinity` on macOS."""
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SystemExit, match=r"^deepcloze needs Linux; on Windows use WSL 2$"):
        deepcloze.run()
    with pytest.raises(ImportError, match=r"^deepcloze needs Linux"):
        deepcloze.__getattr__("pretrain")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: deepcloze.evaluate(None, ["corpora/books"]),  # type: ignore[arg-type]
            "evaluate: 'checkpoint': expected a folder or the name of a model, found None",
        ),
        (
            lambda: deepcloze.evaluate("runs/mine", "corpora/books"),
            "evaluate: 'corpora': expected a list of folders, found one: ['corpora/books']",
        ),
        (
            lambda: deepcloze.evaluate("runs/mine", Path("corpora/books")),
            "evaluate: 'corpora': expected a list of folders, found one: ['corpora/books']",
        ),
        (
            lambda: deepcloze.finetune(TASK | {"training": {"seeds": 42}}),
            "config: 'training.seeds': expected a list, found a whole number (42)",
        ),
        (
            lambda: deepcloze.compare(COMPARISON | {"tasks": "task.yaml"}),
            """config: 'tasks': expected a list, found text ("task.yaml")""",
        ),
        (
            lambda: deepcloze.compare(COMPARISON, rows=1),
            "compare: unknown argument 'rows'",
        ),
        (
            lambda: deepcloze.build_corpus("text.txt", "tokenizer", Path("corpus"), worker=2),
            "build_corpus: unknown argument 'worker'; did you mean 'workers'?",
        ),
        (
            lambda: deepcloze.build_corpus([Path("text.txt")], "tokenizer", "corpus"),
            "--source text.txt: no such file or folder",
        ),
        (
            lambda: deepcloze.build_corpus("org/reviews", "tokenizer", "corpus"),
            "--source org/reviews: no such file or folder; a data set of the Hugging Face Hub is hub:org/reviews",
        ),
        (
            lambda: deepcloze.build_corpus("text.txt", "tokenizer", "corpus", engine="slurm"),
            "build_corpus: 'engine': expected 'local' or 'ray'; tasks of SLURM run `deepcloze corpus`",
        ),
        (
            lambda: deepcloze.compare(COMPARISON, dry_run=True),
            "compare: 'dry_run': only the command has this flag",
        ),
        (
            lambda: deepcloze.pretrain(RUN | {"batch": {"sequence": 64}}),
            "config: unknown config key 'batch.sequence'; did you mean 'batch.sequences'?",
        ),
        (
            lambda: deepcloze.pretrain(RUN, {"optimizer.lr": "fast"}),
            """overrides: 'optimizer.lr': expected a number, found text ("fast")""",
        ),
        (
            lambda: deepcloze.pretrain("roberta-base", {"optimizer.lr": "fast"}),
            """overrides: 'optimizer.lr': expected a number, found text ("fast")""",
        ),
        (
            lambda: deepcloze.pretrain(RUN, "optimizer.lr=1e-3"),  # type: ignore[arg-type]
            "'overrides': expected a mapping, such as {'optimizer.lr': 1e-4}, found 'optimizer.lr=1e-3'",
        ),
        (
            lambda: deepcloze.pretrain("my-run.yaml", num_gpus="two"),  # type: ignore[arg-type]
            """pretrain: 'num_gpus': expected a whole number or null, found text ("two")""",
        ),
        (
            lambda: deepcloze.pretrain(Path("my-run.yaml")),
            "cannot read the config file my-run.yaml: No such file or directory",
        ),
        (
            lambda: deepcloze.pretrain([RUN]),  # type: ignore[arg-type]
            "'config': expected a file, the name of a recipe or a mapping, found [{'run': ",
        ),
        (
            lambda: deepcloze.pretrain(RUN, hostfile="hosts"),
            "cannot read the hostfile hosts: No such file or directory",
        ),
        (
            lambda: deepcloze.pretrain(RUN, {"model.freeze": {"embeddings"}}),
            "overrides.model.freeze: expected numbers, text, paths, lists and mappings, found set: {'embeddings'}",
        ),
        (
            lambda: deepcloze.pretrain({**RUN, "model": {"freeze": [np.longdouble(1)]}}),
            "config.model.freeze[0]: expected numbers, text, paths, lists and mappings, found longdouble",
        ),
        (
            lambda: deepcloze.pretrain(RUN, {5: 1}),  # type: ignore[dict-item]
            "overrides: unknown config key '5'",
        ),
        (
            lambda: deepcloze.build_corpus(iter(["a"]), "tokenizer", "out"),  # type: ignore[arg-type]
            "build_corpus.source: expected numbers, text, paths, lists and mappings, found list_iterator",
        ),
        (
            lambda: deepcloze.pretrain("pretrain/demo", detach=True),
            "pretrain: 'detach': only the command has this flag",
        ),
        (
            lambda: deepcloze.read_metrics("runs/mine"),
            "read_metrics: runs/mine/metrics.jsonl does not exist; expected the folder of a run that has started",
        ),
        (
            lambda: deepcloze.Predictor.load("runs/mine"),
            "runs/mine: no such folder, and no such model in ",
        ),
        (
            lambda: deepcloze.Predictor.load("https://huggingface.co/org/tiny"),
            "https://huggingface.co/org/tiny: did you mean 'org/tiny', the name of the model?",
        ),
        (
            lambda: deepcloze.Predictor.load("runs/mine", batch_size=0),
            "batch_size: expected at least 1, found 0",
        ),
    ],
)
def test_mistakes_get_one_line(
    call: Callable[[], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback of pydantic, and a text that is taken for a list of its characters."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        call()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        (SystemExit("deepcloze: the run failed: a rank was killed"), RuntimeError("the run failed: a rank was killed")),
        (SystemExit(2), UserError("the run was rejected, for the reason that is printed above")),
        (KeyboardInterrupt(), KeyboardInterrupt()),
    ],
)
def test_the_caller_survives_a_failed_run(
    ending: BaseException, expected: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a notebook that ends with a run, or that cannot be interrupted after the first interrupt."""
    received: list[PretrainOptions] = []

    def launch(options: PretrainOptions) -> None:
        received.append(options)
        ignore_stop_signals()
        raise ending

    monkeypatch.setattr("launcher.launch.launch_pretraining", launch)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    overrides = {"optimizer.lr": 1e-5, "run.dir": Path("runs/other"), "schedule.steps": np.int64(4)}
    overrides |= {"optimizer.betas": np.array([0.9, 0.98])}
    with pytest.raises(type(expected)) as error:
        deepcloze.pretrain(RUN, overrides, num_gpus=2, oversubscribe=True)
    assert str(error.value) == str(expected)
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    texts = {"optimizer.lr": "1e-05", "optimizer.betas": "[0.9, 0.98]", "run.dir": "runs/other", "schedule.steps": "4"}
    assert received[0].overrides == texts
    assert (received[0].num_gpus, received[0].oversubscribe) == (2, True)
    assert not Path(received[0].config).exists(), "a temporary file"


def test_a_config_may_have_values_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches values that are kinds of Python's numbers and text, which YAML cannot write."""
    written: list[PretrainConfig] = []
    monkeypatch.setattr(
        "launcher.launch.launch_pretraining",
        lambda options: written.append(load_config(PretrainConfig, options.config)),
    )
    deepcloze.pretrain({**RUN, "optimizer": {"lr": np.float64(1e-3), "name": np.str_("lamb")}})
    assert (written[0].optimizer.lr, written[0].optimizer.name) == (1e-3, "lamb")


def test_a_quiet_call_ends_with_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a call that prints its progress although it is quiet, or after which the notebook is quiet, or no longer;
    and a task that is called 'config' because its config is a mapping."""
    names, modes = [], []

    def launch(options: PretrainOptions) -> None:
        names.append(Path(options.config).name)
        modes.append(is_quiet())

    monkeypatch.setattr("launcher.launch.launch_pretraining", launch)
    for quiet in (True, False):
        deepcloze.pretrain(RUN, {"run.dir": "runs/other"}, quiet=quiet)
        assert not is_quiet()
    with progress.quiet():
        deepcloze.pretrain(RUN, quiet=True)
        assert is_quiet()
    monkeypatch.setattr("pretrain.evaluate.evaluate", lambda *_: is_quiet())
    assert deepcloze.evaluate("runs/mine", ["corpus"], quiet=True) is True
    assert deepcloze.evaluate("runs/mine", ["corpus"]) is False
    assert (names, modes) == (["other.yaml", "other.yaml", "mine.yaml"], [True, False, True])


def test_the_run_folder_is_of_the_config_that_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the folder of another run, or an error after weeks of training, because the file was edited meanwhile,
    and a path that is wrong after a change of the working directory."""
    file = tmp_path / "my-run.yaml"

    def launch(_: PretrainOptions) -> None:
        file.write_text("run: {dir: runs/next")
        os.chdir("/")

    monkeypatch.setattr("launcher.launch.launch_pretraining", launch)
    monkeypatch.chdir(tmp_path)
    file.write_text(write_yaml(RUN))
    assert deepcloze.pretrain(file) == tmp_path / "runs" / "mine"


def test_each_call_warns_about_data(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a warning about a file that only the first call of a notebook shows, or one that a call shows twice."""

    def launch(*_: object) -> None:
        for _ in range(2):
            warn_once("a.csv: skipped 12 rows")

    monkeypatch.setattr("launcher.launch.launch_pretraining", launch)
    monkeypatch.setattr("pretrain.evaluate.evaluate", launch)
    for _ in range(2):
        deepcloze.pretrain(RUN)
        deepcloze.evaluate("runs/mine", ["corpus"])
    assert caplog.messages == ["a.csv: skipped 12 rows"] * 4


@pytest.mark.parametrize("given", [None, "cpu"])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("launcher.launch.launch_pretraining", lambda: deepcloze.pretrain(RUN)),
        ("pretrain.evaluate.evaluate", lambda: deepcloze.evaluate("runs/mine", ["corpus"])),
        ("finetune.run.run", lambda: deepcloze.finetune(TASK)),
    ],
)
def test_the_device_is_chosen_for_the_call_alone(
    name: str, call: Callable[[], object], given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a notebook on a machine without GPUs whose later commands tell hosts with GPUs to use their CPUs, and one
    that never finds its GPUs again."""

    def choose(*_: object) -> None:
        use_cpu()
        hide_gpus()
        chosen.append((os.environ["DS_ACCELERATOR"], os.environ.get("CUDA_VISIBLE_DEVICES")))

    chosen: list[tuple[str, str | None]] = []
    monkeypatch.setattr(own_process, "_given", {})
    monkeypatch.setattr("launcher.hosts.machine.find_devices", lambda _: Devices("cpu", (0, 1)))
    monkeypatch.setattr(name, choose)  # before the next line: modules imported after that keep the substitute
    monkeypatch.setattr("finetune.resolve.load_run_config", lambda *_: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # restored at the end
    if given is None:
        monkeypatch.delenv("DS_ACCELERATOR")
    call()
    assert chosen == [("cpu", "0,1" if given is None else "-1")]
    assert (os.environ.get("DS_ACCELERATOR"), os.environ["CUDA_VISIBLE_DEVICES"]) == (given, "0,1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert own_process.own_environment()["DS_ACCELERATOR"] == "cpu", "the choice of the user now"


def test_a_predictor_restores_the_choice_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a notebook with DS_ACCELERATOR=cpu that never finds its GPUs again, because it has loaded a model."""

    def find(*_: object, **__: object) -> None:
        hide_gpus()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1"
        raise UserError("no model")

    monkeypatch.setattr("finetune.prediction.predictor.local_model", find)
    for name, value in {"CUDA_VISIBLE_DEVICES": "0,1", "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)
    for given, after in (({}, "0,1"), ({"DS_ACCELERATOR": "cpu"}, "-1")):
        monkeypatch.setattr(own_process, "_given", given)  # the second: in a command
        with pytest.raises(UserError, match="no model"):
            deepcloze.Predictor.load("runs/mine")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == after


def test_handlers_in_c_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a program that handles a signal in C, and whose calls end with a TypeError of `signal.signal`."""
    changed: list[int] = []
    get, change = signal.getsignal, signal.signal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGUSR1 else get(number))
    monkeypatch.setattr(signal, "signal", lambda number, handler: changed.append(number) or change(number, handler))
    monkeypatch.setattr("finetune.run.run", lambda _: {})
    monkeypatch.setattr("finetune.resolve.load_run_config", lambda *_: None)
    assert deepcloze.finetune(TASK) == {}
    assert signal.SIGUSR2 in changed
    assert signal.SIGUSR1 not in changed


def test_memory_is_returned_after_fine_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a notebook that keeps the memory of a fine-tuning, and all that it frees later."""
    pins: list[bytes] = []

    def train(_: None) -> dict[str, Any]:
        keep_freed_memory()
        blocks = []
        for _ in range(200):
            blocks.append(b"x" * 2**20)
            pins.append(bytes(2**18))  # between blocks that are freed: too large for gaps elsewhere
        used.append(psutil.Process().memory_info().rss)
        return {}

    def measure() -> None:
        deepcloze.finetune(TASK)
        used.append(psutil.Process().memory_info().rss)
        for _ in range(2):
            b"x" * 2**27
        used.append(psutil.Process().memory_info().rss)
        sender.send(used)

    used: list[int] = []
    receiver, sender = multiprocessing.Pipe(duplex=False)
    monkeypatch.setattr("finetune.run.run", train)
    monkeypatch.setattr("finetune.resolve.load_run_config", lambda *_: None)
    process = multiprocessing.get_context("fork").Process(target=measure)  # without the threads of earlier tests
    process.start()
    sender.close()
    training, after, later = receiver.recv()
    process.join()
    assert after < training - 150e6
    assert later < after + 50e6


@pytest.mark.parametrize("function", ["pretrain.evaluate.evaluate", "finetune.run.run"])
def test_the_state_of_torch_is_the_callers(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a notebook whose random numbers repeat after each evaluation, and training without gradients because the
    notebook computes none."""

    def compute(*_: object) -> dict[str, Any]:
        torch.manual_seed(0)
        return {"gradients": torch.is_grad_enabled() and not torch.is_inference_mode_enabled()}

    monkeypatch.setattr(function, compute)
    monkeypatch.setattr("finetune.resolve.load_run_config", lambda *_: None)
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)  # True in a fork after a look for GPUs
    seed, before = torch.initial_seed(), torch.get_rng_state()
    with torch.inference_mode():
        if function == "finetune.run.run":
            found: Any = deepcloze.finetune(TASK)
        else:
            found = deepcloze.evaluate("runs/mine", ["corpus"])
        assert torch.is_inference_mode_enabled()
    assert found == {"gradients": True}
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.cuda.is_initialized() or seeds == [0, seed]  # type: ignore[no-untyped-call]


def test_the_state_of_torch_is_the_callers_after_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a comparison that builds models to check them, and changes the random numbers of the notebook."""

    def plan(_: object) -> None:
        torch.manual_seed(0)
        raise UserError("a row")

    monkeypatch.setattr("launcher.run_sets.compare_plan.plan_comparison", plan)
    before = torch.get_rng_state()
    with pytest.raises(UserError, match="a row"):
        deepcloze.compare(COMPARISON)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_memory_of_gpus_is_free_after_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that run out of memory because the notebook that starts them keeps what it has evaluated with."""

    class Model:
        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            events.append("deleted")

    def evaluate(*_: object) -> None:
        Model()
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)

    events: list[str] = []
    monkeypatch.setattr("pretrain.evaluate.evaluate", evaluate)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("freed"))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: None)
    deepcloze.evaluate("runs/mine", ["corpus"])
    assert events == ["deleted", "freed"]


@pytest.mark.parametrize(
    "function",
    [deepcloze.open_corpus, deepcloze.Predictor.load, lambda path: deepcloze.evaluate(path, [path])],
    ids=["open_corpus", "Predictor", "evaluate"],
)
def test_paths_may_begin_with_the_home_folder(
    function: Callable[[str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches `~` that commands expand and functions do not."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/none")):
        function("~/none")


def test_another_thread_is_rejected() -> None:
    """Catches the error of Python about signals."""
    errors: list[str] = []

    def call() -> None:
        try:
            deepcloze.pretrain(RUN)
        except UserError as error:
            errors.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert errors == ["call deepcloze in the main thread, which gets the signals that stop a run"]


def test_a_script_may_have_the_name_of_a_package(tmp_path: Path, wordpiece: Path, text_file: Path) -> None:
    """Catches workers that execute the script, as main module or as `pretrain`, which would build the corpus again."""
    for name in ("a.txt", "b.txt"):  # one for each worker
        shutil.copy(text_file, tmp_path / name)
    code = f"""print("executed")
import deepcloze
corpus = deepcloze.build_corpus(["a.txt", "b.txt"], {str(wordpiece)!r}, "corpus", workers=2)
print(corpus.documents)"""
    done = run_script(tmp_path / "pretrain.py", code)
    assert done.stdout.count("executed") == 1, done.stderr
    assert done.stdout.endswith("\n1280\n")


def test_a_wheel_does_not_hide_the_standard_library(tmp_path: Path) -> None:
    """Catches a backport beside an installed deepcloze that is imported because the script is called pretrain.py."""
    site = tmp_path / "site"
    for file in ("launcher/functions.py", "pretrain/__init__.py", "finetune/__init__.py", "experiment/__init__.py"):
        (site / file).parent.mkdir(parents=True)
        (site / file).write_text("from pretrain import __file__ as pretrain\n" if "launcher" in file else "")
    (site / "launcher" / "__init__.py").touch()
    (site / "wave.py").touch()
    shutil.copy(deepcloze.__file__, site)
    code = f"""import os, site, sys
site.getsitepackages = lambda: [{str(site)!r}]
sys.path.append({str(site)!r})
before = os.environ.get("PYTHONPATH")
import deepcloze
print(os.path.relpath(deepcloze.pretrain, {str(tmp_path)!r}))
import wave
print(hasattr(wave, "Wave_read"), os.environ.get("PYTHONPATH") == before)"""
    (tmp_path / "pretrain.py").write_text(code)
    command = [sys.executable, "-S", "pretrain.py"]  # without the deepcloze that is installed here
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.stdout == "site/pretrain/__init__.py\nTrue True\n", done.stderr


def test_a_module_that_hides_a_package_is_named(tmp_path: Path) -> None:
    """Catches an error about a module in our packages that does not exist."""
    (tmp_path / "finetune.py").touch()
    done = run_script(tmp_path / "script.py", "import finetune, deepcloze; deepcloze.pretrain('demo')")
    message = f"ImportError: {tmp_path}/finetune.py hides the package 'finetune' of deepcloze; rename it"
    assert done.stderr.splitlines()[-1] == message
