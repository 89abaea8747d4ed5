"""Speed of commands beside other busy processes, with settings of their threads.

    python -m benchmarks.busy_machine [--beside 0,1,2,4] [--seconds 1.2] [--rounds 3] [--commands finetune,serve]

A small model is fine-tuned, pretrained by one rank and by as many as there are cores, evaluated, predicts, and serves
as many clients as there are cores. Each command runs once with each setting, or as several processes; all but one
setting are stopped. In windows of `seconds` that alternate between the settings, one of them continues beside so many
endless loops in Python, each in a session of its own, as if other users had started them. Start-up is not measured.
Prints the medians of units per second (updates, batches or requests), and the speed compared with torch's defaults on
the idle machine. Takes 15 minutes on two cores.
"""

import http.client
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import fire
import psutil
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import deepcloze, describe_machine, write_small_run
from experiment.process.own_process import module_command, own_environment
from launcher.hosts.probe import cpu_cores

CORES = cpu_cores()
TORCH = "torch's defaults"
PROCESSES = "a process of one thread on each core"
SETTINGS: dict[str, dict[str, str]] = {
    TORCH: {"GOMP_SPINCOUNT": "300000"},  # of GNU's OpenMP
    "deepcloze": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread less": {"OMP_NUM_THREADS": str(max(1, CORES - 1))},
    PROCESSES: {"OMP_NUM_THREADS": "1"},
}
_FOREVER = 1_000_000_000  # steps
_TEXTS = 8  # of a request
_WARM_UP = 5  # units
_SETTLE_SECONDS = 1.0  # deepcloze notices within a quarter of a second that cores are busy, or idle again
_PATIENCE_SECONDS = 2.0  # for a unit that takes longer than a window


Start = Callable[[Path, Mapping[str, str], int], "subprocess.Popen[bytes]"]
"""Starts a command, with a new folder, more environment variables, and the number of its clients if it serves."""


@dataclass(frozen=True)
class Command:
    """A command that runs forever, and appends a line to files for each unit of its work."""

    start: Start
    files: str  # a pattern in the folder


class Inputs:
    """The files that the commands read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pretraining, self.task, self.rows = (folder / name for name in ("endless.yaml", "task.yaml", "rows.csv"))
        self.pretrained, self.finetuned = folder / "pretrained", folder / "finetuned"


def busy_machine(
    beside: str = "0,1,2,4", seconds: float = 1.2, rounds: int = 3, commands: str = "", settings: str = ""
) -> None:
    """Measure and print a table for each command.

    Args:
        beside: numbers of busy processes.
        seconds: of a window.
        rounds: windows of each setting beside each number of busy processes.
        commands: of finetune, pretrain-1 (one rank), pretrain-2 (as many as cores), predict, evaluate, serve.
        settings: more of them, as VARIABLE=VALUE, separated by spaces within one and by semicolons.
    """
    numbers = [int(number) for number in str(beside).strip("()").split(",")]
    more = {text: dict(pair.split("=", 1) for pair in text.split()) for text in filter(None, settings.split(";"))}
    chosen = [name.strip() for name in str(commands).strip("()").replace("'", "").split(",") if name.strip()]
    print(describe_machine(), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # not to leave processes behind
    with tempfile.TemporaryDirectory(prefix="deepcloze-busy-") as folder, busy_processes(max(numbers)) as busy:
        inputs = write_inputs(Path(folder))
        for name, command in _commands(inputs).items():
            if not chosen or name in chosen:
                one_thread = name == f"pretrain-{CORES}"  # of each rank: they do not wait for threads
                tried = dict(itertools.islice(SETTINGS.items(), 2)) if one_thread else {**SETTINGS, **more}
                rates = _measure(command, Path(folder, name), tried, numbers, seconds, rounds, busy)
                _print_table(name, rates, list(tried), numbers)


def write_inputs(folder: Path) -> Inputs:
    """Return a corpus, a pretrained and a fine-tuned model, and configs of endless runs."""
    inputs = Inputs(folder)
    config = write_small_run(folder)
    deepcloze("pretrain", "--config", str(config), f"--run.dir={inputs.pretrained}")
    endless = {"schedule": {"steps": _FOREVER}, "checkpoint": {"every_steps": _FOREVER}}
    endless["health"] = {"hang_seconds": 1_000_000}
    inputs.pretraining.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **endless}))
    draw = random.Random(2)
    words = (folder / "text.txt").read_text().split()
    rows = [f"{draw.choice('ab')},{' '.join(draw.choices(words, k=draw.randint(5, 40)))}" for _ in range(2000)]
    inputs.rows.write_text("\n".join(["label,text", *rows]))
    task = {
        "run": {"keep": "none"},
        "task": {"train": str(inputs.rows), "columns": {"label": "label", "text": "text"}},
        "model": {"init_from": str(inputs.pretrained), "max_seq_length": 64},
        "training": {"batch_size": 16, "steps": _FOREVER, "evaluate_every": _FOREVER, "seeds": [1]},
    }
    inputs.task.write_text(yaml.safe_dump(task))
    short = ("--training.steps=2", f"--run.dir={inputs.finetuned}", "--run.keep=best")
    deepcloze("finetune", "--config", str(inputs.task), *short)
    return inputs


def _commands(inputs: Inputs) -> dict[str, Command]:
    pretrain = ("pretrain", "--config", str(inputs.pretraining), "--oversubscribe")
    model = ("--model", str(inputs.finetuned))
    evaluate = ("--checkpoint", str(inputs.pretrained), "--corpus", str(inputs.folder / "corpus"))
    return {
        "finetune": Command(_repeated("finetune", "--config", str(inputs.task)), "units"),
        "pretrain-1": Command(_in_folder(*pretrain, "--num_gpus=1"), "run/metrics.jsonl"),
        f"pretrain-{CORES}": Command(_in_folder(*pretrain, f"--num_gpus={CORES}"), "run/metrics.jsonl"),
        "predict": Command(_repeated("predict", *model, "--input", str(inputs.rows)), "units"),
        "evaluate": Command(_repeated("evaluate", *evaluate), "units"),
        "serve": Command(_served("serve", *model, "--port", "0"), "units"),
    }


def _in_folder(*arguments: str) -> Start:
    argv = (*_DEEPCLOZE, *arguments)
    return lambda folder, variables, _: _start((*argv, f"--run.dir={folder / 'run'}"), folder, variables)


def _repeated(*arguments: str) -> Start:
    """Run a command again and again, in one process."""
    work = (*module_command("benchmarks.busy_machine"), "--work")
    return lambda folder, variables, _: _start((*work, str(folder), *arguments), folder, variables)


def _served(*arguments: str) -> Start:
    """Start a server, and clients in this process that wait for each answer."""

    def start(folder: Path, variables: Mapping[str, str], clients: int) -> "subprocess.Popen[bytes]":
        process = _start((*_DEEPCLOZE, *arguments), folder, variables)
        output = folder / "output"
        while not (line := output.read_text().partition("\n")[0]).startswith("http"):
            assert process.poll() is None, output.read_text()
            time.sleep(0.05)
        port = int(line.split()[0].rpartition(":")[2])
        for _ in range(clients):
            threading.Thread(target=_ask, args=(port, folder / "units"), daemon=True).start()
        return process

    return start


def _ask(port: int, units: Path) -> None:
    draw = random.Random(3)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    with suppress(OSError, http.client.HTTPException), units.open("a", buffering=1) as file:  # until it is killed
        while True:
            texts = [" ".join(draw.choices("aeioulnrst", k=draw.randint(5, 40))) for _ in range(_TEXTS)]
            connection.request(
                "POST", "/v1/predict", json.dumps({"texts": texts}), {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            answer.read()
            if answer.status == 200:  # not 503, of a request that was stopped with the server
                file.write("\n")


_DEEPCLOZE = module_command("launcher")


def _start(argv: Sequence[str], folder: Path, variables: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    folder.mkdir(parents=True)
    environment = {**own_environment(), **variables}
    with (folder / "output").open("wb") as output:
        return subprocess.Popen(argv, env=environment, stdout=output, stderr=output, start_new_session=True)


def work(folder: str, *arguments: str) -> None:
    """Run a command forever, and append a line for each batch."""
    from finetune.prediction.inference import Inference
    from finetune.training.updater import Updater
    from launcher.cli import main
    from pretrain.modeling.masked_lm import MaskedLanguageModel

    output = {"predict": (f"--output={folder}/labels.csv",), "finetune": (f"--run.dir={folder}/run",)}
    with Path(folder, "units").open("a", buffering=1) as units:
        for owner, name in ((Updater, "step"), (Inference, "_compute_batch"), (MaskedLanguageModel, "forward")):
            setattr(owner, name, _counted(getattr(owner, name), units.write))
        while main([*arguments, *output.get(arguments[0], ())]) == 0:
            pass
    sys.exit("the command failed")


def _counted(function: Callable[..., object], write: Callable[[str], object]) -> Callable[..., object]:
    def counted(*args: object, **kwargs: object) -> object:
        result = function(*args, **kwargs)
        write("\n")
        return result

    return counted


@contextmanager
def busy_processes(number: int) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Endless loops, which are stopped at first."""
    with ExitStack() as started:
        processes = []
        for _ in range(number):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
            started.callback(process.wait)
            started.callback(process.kill)
            process.send_signal(signal.SIGSTOP)
            processes.append(process)
        yield processes


def _measure(
    command: Command,
    folder: Path,
    settings: Mapping[str, Mapping[str, str]],
    numbers: Sequence[int],
    seconds: float,
    rounds: int,
    busy: Sequence["subprocess.Popen[bytes]"],
) -> dict[tuple[str, int], list[float]]:
    """Units per second in each window, by setting and number of busy processes."""
    rates: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as started:
        processes: dict[str, list[tuple[subprocess.Popen[bytes], Path]]] = {}
        for place, (name, variables) in enumerate(settings.items()):
            of_setting = folder / str(place)
            copies = CORES if name == PROCESSES else 1
            processes[name] = []
            for copy in range(copies):
                of_copy = of_setting / str(copy)
                process = command.start(of_copy, variables, CORES // copies)
                started.callback(_kill, process)
                while sum(path.read_bytes().count(b"\n") for path in of_copy.glob(command.files)) < _WARM_UP:
                    assert process.poll() is None, (of_copy / "output").read_text()
                    time.sleep(0.05)
                processes[name].append((process, of_copy))
                _signal(process, signal.SIGSTOP)
        for number, round_number in itertools.product(numbers, range(rounds)):
            names = list(processes)[:: 1 if round_number % 2 else -1]
            for each in busy[:number]:
                each.send_signal(signal.SIGCONT)
            for name in names:
                for process, _ in processes[name]:
                    _signal(process, signal.SIGCONT)
                try:
                    files = [path for _, of_copy in processes[name] for path in of_copy.glob(command.files)]
                    rate = sum(_rate(path, seconds) for path in files)
                finally:
                    for process, _ in processes[name]:
                        _signal(process, signal.SIGSTOP)
                rates.setdefault((name, number), []).append(rate)
            for each in busy[:number]:
                each.send_signal(signal.SIGSTOP)
    return rates


def _rate(path: Path, seconds: float) -> float:
    """Return how many lines per second are appended to a file."""
    time.sleep(_SETTLE_SECONDS)
    end = time.time() + seconds
    first = _next_line(path, path.stat().st_size, end + _PATIENCE_SECONDS)
    time.sleep(max(0.0, end - time.time()))
    last = _next_line(path, first.st_size, end + _PATIENCE_SECONDS)
    with path.open("rb") as file:
        file.seek(first.st_size)
        lines = file.read(last.st_size - first.st_size).count(b"\n")
    return lines / ((last.st_mtime_ns - first.st_mtime_ns) / 1e9) if lines else 1 / _PATIENCE_SECONDS  # or less


def _next_line(path: Path, size: int, end: float) -> os.stat_result:
    """Return the state of a file when it is larger, or at the end."""
    while (found := path.stat()).st_size <= size and time.time() < end:
        time.sleep(0.002)
    return found


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    """To a process and all that it has started."""
    for each in [root := psutil.Process(process.pid), *root.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            each.send_signal(number)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with suppress(psutil.NoSuchProcess):
        _signal(process, signal.SIGKILL)
    process.wait()


def _print_table(
    name: str, rates: Mapping[tuple[str, int], Sequence[float]], settings: Sequence[str], numbers: Sequence[int]
) -> None:
    medians = {case: statistics.median(found) for case, found in rates.items()}
    title = f"{name} on {CORES} cores: units/s, and speed compared with {TORCH} beside {numbers[0]} busy processes"
    table = Table(title=title)
    table.add_column("setting")
    for number in numbers:
        table.add_column(f"beside {number}", justify="right")
    for setting in settings:
        found = [medians[setting, number] for number in numbers]
        table.add_row(setting, *(f"{rate:.1f}, {rate / medians[TORCH, numbers[0]]:.0%}" for rate in found))
    Console(width=140).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        fire.Fire(busy_machine)
