"""The command lines and configs that README and docs show, and what runs them."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from launcher.cli import main
from rank_pool import free_port
from runs import SHALLOW
from waiting import LIMIT, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md") if path.name != "commands.md"),
    "ds_configs/README.md",
    "hostfiles/README.md",
    "CONTRIBUTING.md",
    "docs/commands.md",  # last: most of its examples are in the pages that explain them
]
TUTORIALS = [  # each runs in a folder of its own, in test_tutorials.py
    "docs/continue_a_model.md",
    "docs/from_run_mlm.md",
    "docs/chinese.md",
    "docs/compare_on_your_task.md",
    "docs/corpora_at_scale.md",
]
CHOOSING = "docs/choosing.md"  # test_choosing.py compares its figures
CLUSTER_TUTORIAL = "docs/pretrain_on_a_cluster.md"  # runs on two hosts, in test_cluster_tutorial.py
# In a block without a language, which may also show output, a line is a command if it starts with `$ ` or one of these.
_PROGRAMS = (
    r"deepcloze|deepspeed|(?:\.venv/bin/)?python3?|pip|make|git|hf|wandb|tensorboard|sudo|apt-get|ssh|ssh-\w+|scp|"
    r"rsync|for|export|echo|cd|source|\.|curl|wget|jq|mkdir|cp|mv|touch|kill|openssl|docker|podman|apptainer|mpirun|srun|"
    r"sbatch|ray|aws|kubectl|tmux|nvidia-smi"
)
_COMMAND = re.compile(rf"\$ (.+)|((?:[A-Z_]+=\S+ )*(?:{_PROGRAMS}) .+)")
# A flag shows a command, unless the line is output: `fix: ssh node-2 …`. Fails where a program is missing above.
_WITH_FLAG = re.compile(r"(?!\w+: ).+ --?\w.*")
# Of commands that a test cannot run as they are.
_MARK = re.compile(
    r"# ((?:needs (?:a GPU|two GPUs|a cluster|the network|Docker|a W&B account)|on (?:every host|node-\d))\b.*)"
)
_EXTRA = re.compile(r"pip install 'deepcloze\[(\w+)\]'")
_SERVER = re.compile(r"deepcloze serve |tensorboard |deepcloze report .*--follow")
# The numbers of long runs in commands and configs, and those of the runs here.
_SCALED = {
    "step-00050000": "step-00000003",
    "schedule.steps=55000": "schedule.steps=5",
    "schedule.decay_steps=5000": "schedule.decay_steps=2",
    "--holdout 1000": "--holdout 100",
    "holdout=1000": "holdout=100",
    "--holdout 500": "--holdout 50",
}


@dataclass(frozen=True)
class Command:
    page: str
    text: str  # in one line, without prompt and comment
    mark: str | None  # such as "needs a GPU": the comment at the end of the line, or the comment line above it
    message: str | None  # the error that the page shows below it: "deepcloze: …"


def read_page(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def commands(page: str) -> list[Command]:
    """The command lines in the code blocks of a page, in order."""
    text = read_page(page)
    if page == "docs/commands.md":  # each heading is followed by a synopsis: `deepcloze evaluate --checkpoint DIR …`
        text = re.sub(r"^(## deepcloze .+\n\n).+\n", r"\1", text, flags=re.MULTILINE)
    return find_commands(page, text)


def find_commands(page: str, text: str) -> list[Command]:
    return [command for language, block in _code_blocks(text) for command in _commands(page, language, block)]


def overlooked(text: str) -> list[str]:
    """The lines in code blocks that look like commands, of programs that are not in the list of programs."""
    blocks = [block for language, block in _code_blocks(text) if not language]
    lines = [line for block in blocks for line in block if not line.startswith("#")]
    return [line for line in lines if _WITH_FLAG.fullmatch(line) and not _COMMAND.fullmatch(line)]


def configs(page: str) -> dict[str, str]:
    """The YAML blocks that begin with `# NAME.yaml`, by name."""
    return dict(re.findall(r"```yaml\n# (\S+\.yaml)\n(.*?)```", read_page(page), re.DOTALL))


def write_configs(page: str, folder: Path, replace: Mapping[str, str] | None = None) -> None:
    """Write the configs of a page to a folder, scaled down. `replace`: names that are others here."""
    for name, text in configs(page).items():
        config = _scaled(yaml.safe_load(replaced(text, {**_SCALED, **(replace or {})})))
        (folder / name).write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")


def validate_configs(page: str, folder: Path) -> None:
    """Validate the configs of a page, not scaled down, with the files in a folder that they name."""
    with contextlib.chdir(folder):
        for name, text in configs(page).items():
            Path("as-written.yaml").write_text(replaced(text, _SCALED), encoding="utf-8")
            folder_of_run = [] if "steps:\n" in text else ["--run.dir=as-written"]  # not of a cleaning
            assert main(["validate", "as-written.yaml", *folder_of_run]) == 0, name


def replaced(text: str, replace: Mapping[str, str]) -> str:
    for old, new in replace.items():
        text = text.replace(old, new)
    return text


def _scaled(config: dict[str, Any]) -> dict[str, Any]:
    """The config with a few steps of small batches and a tiny model, and without bf16, which this machine may lack."""
    if "corpus" in config:
        changes = {"schedule": {"steps": 3, "warmup_steps": 1}, "engine": {"ds_config": "fp32_zero1"}}
        changes["batch"] = config.get("batch", {}) | {"sequences": 32}
        if "config" in config.get("model", {}):
            changes["model"] = {"config": SHALLOW | {"max_position_embeddings": 512}}
        return config | changes
    if "training" in config:
        return config | {"training": config["training"] | {"epochs": 1, "precision": "fp32"}}
    return config


class Terminal:
    """Runs commands in a folder as a user would, on the CPU. A server runs until the next one starts, or the end."""

    def __init__(
        self, folder: Path, replace: Mapping[str, str] | None = None, variables: Mapping[str, str] | None = None
    ) -> None:
        """`replace`: names in commands that are others here. `variables`: more of the environment."""
        self._folder = folder
        self._port = free_port()
        self._replace = _SCALED | {
            ":8000": f":{self._port}",
            " --port 8000": "",
            "pip install ": "pip install --dry-run --no-index ",
            "deepspeed ": f"deepspeed --master_port={free_port()} ",
            " pretrain/run.py": f" {REPOSITORY}/pretrain/run.py",
            **(replace or {}),
        }
        self._server: subprocess.Popen[bytes] | None = None
        # If the server answers with an error, curl fails.
        (folder / ".curlrc").write_text("silent\nshow-error\nfail-with-body\n", encoding="utf-8")
        self._environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "CURL_HOME": str(folder),
            **(variables or {}),
        }

    def run(self, command: Command) -> None:
        """Run a command. Raises AssertionError if it fails, or does not fail with the message that the page shows."""
        text = replaced(command.text, self._replace)
        with self._inside():
            if extra := _EXTRA.fullmatch(command.text):  # pip would take two seconds
                assert extra[1] in metadata("deepcloze").get_all("Provides-Extra", []), text
            elif _SERVER.match(text):
                self._serve(text)
            elif text.startswith("deepcloze "):
                self._deepcloze(text, command.message)
            else:
                self._shell(text)

    def execute(self, code: str, names: dict[str, Any]) -> None:
        """Execute Python code in this process. `names`: what it can use, and what it has defined."""
        with self._inside():
            exec(replaced(code, _SCALED), names)

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        few_resamples = mock.patch("launcher.run_sets.compare.RESAMPLES", 20)
        with contextlib.chdir(self._folder), mock.patch.dict(os.environ, self._environment), few_resamples:
            yield

    def close(self) -> None:
        """Stop the server, if one is running."""
        server, self._server = self._server, None
        if server is not None:
            server.terminate()
            assert server.wait(LIMIT) in (0, -signal.SIGTERM), (self._folder / "server.log").read_text(encoding="utf-8")

    def _deepcloze(self, text: str, message: str | None) -> None:
        """In this process, which has imported everything. The ranks of a pretraining run are processes of their own."""
        argv = subprocess.run(["bash", "-c", f"printf '%s\\0' {text}"], capture_output=True, text=True, check=True)
        with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
            with contextlib.redirect_stderr(errors):
                try:
                    code: object = main(argv.stdout.split("\0")[1:-1])
                except SystemExit as exit:
                    code = exit.code
            errors.seek(0)
            printed = errors.read()
        assert code == (0 if message is None else 2), f"{text}\n{code}\n{printed}"
        assert message is None or printed == f"{message}\n", text

    def _shell(self, text: str) -> None:
        if self._server is not None:
            text = text.replace(" PID", f" {self._server.pid}")
        done = subprocess.run(["bash", "-ec", text], capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"

    def _serve(self, text: str) -> None:
        self.close()
        command = ["bash", "-c", f"exec {text} --port={self._port}"]
        with open("server.log", "w", encoding="utf-8") as log:
            self._server = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(lambda: self._answers() or self._server_ended())

    def _server_ended(self) -> bool:
        assert self._server.poll() is None, (self._folder / "server.log").read_text(encoding="utf-8")
        return False

    def _answers(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self._port)) == 0


def is_server(command: Command) -> bool:
    return _SERVER.match(command.text) is not None


def is_installed(program: str) -> bool:
    """Whether this machine has a program, as Python or the shell do."""
    return shutil.which(program, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") is not None


def _code_blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """The language and the lines of each fenced or indented block, without indentation."""
    for block in re.finditer(r"^( *)```(\w*)\n((?:.*\n)*?)\1```|(?:^ {4,}\S.*\n)+", text, re.MULTILINE):
        body = (block[0] if block[2] is None else block[3]).replace("\\\n", " ")
        yield block[2] or "", [line.strip() for line in body.splitlines()]


def _commands(page: str, language: str, block: list[str]) -> Iterator[Command]:
    """In `sh` each line is a command."""
    if language not in ("", "sh"):
        return
    above = None
    for line, below in zip(block, [*block[1:], ""], strict=True):
        if line.startswith("#"):
            mark = _MARK.fullmatch(line)
            above = mark[1] if mark else None
        elif (found := _COMMAND.fullmatch(line)) or (language == "sh" and line):
            text = (found[1] or found[2]) if found else line
            text, _, comment = re.sub(r"\s+(?=# )", "\0", text, count=1).partition("\0")
            mark = _MARK.fullmatch(comment)
            message = below if below.startswith("deepcloze: ") else None
            yield Command(page, re.sub(" +", " ", text), mark[1] if mark else above, message)
