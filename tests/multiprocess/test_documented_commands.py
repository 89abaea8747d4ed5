"""Each command line that README and docs show runs as it is written, in a folder with the files that they name.

A command that cannot run here carries a mark for readers: `# needs a GPU`, `# needs a cluster`, `# on node-2`. The
tutorials run in test_tutorials.py and test_cluster_tutorial.py, each in a folder of its own, and test_choosing.py
compares the figures of docs/choosing.md.
"""

import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import deepcloze
from documented import (
    CHOOSING,
    CLUSTER_TUTORIAL,
    PAGES,
    REPOSITORY,
    TUTORIALS,
    Command,
    Terminal,
    commands,
    find_commands,
    is_installed,
    is_server,
    overlooked,
    read_page,
    validate_configs,
    write_configs,
)
from documented_files import CHINESE, write_lines, write_model, write_public_tasks, write_task, write_texts
from empty_figures import leave_figures_empty
from rank_pool import ForkServer

OTHER_PAGES = [page for page in PAGES if page not in (*TUTORIALS, CLUSTER_TUTORIAL, CHOOSING)]
# What takes long runs in `make soak` only.
SLOW = (
    "python_docs",
    "--autotune",
    "--on_result",
    "deepcloze sweep",
    "deepcloze compare",
    "onnx",
    "int8",
    "tensorboard --",
    "--tracking.tensorboard",
    "deepcloze preflight",
    "--segmenter",
    "my-embedding",
    "--token_file",
    "--model runs/sst2 --port",  # the same server with its default port is in docs/serving.md
    "deepspeed ",  # as test_launches.py starts it
    "--model.added_tokens",
    "--profile",
    "ds_config=bf16_zero2",
    "--training.seeds=1,2,3",
)
# Pages whose commands other tests run with other files: test_watched_runs.py, test_detached_runs.py, tests/cluster,
# tests of reports and logs.
SLOW_PAGES = ("docs/watching.md", "docs/cluster.md", "docs/tracking.md", "docs/launching.md")


def is_run_here(command: Command) -> bool:
    """`make` runs the tests; the demo, which `make soak` runs, is compared with the README in test_demo.py."""
    return command.mark is None and "runs/demo/" not in command.text and not command.text.startswith("make ")


def commands_to_run(page: str) -> list[Command]:
    """Most examples in docs/commands.md are in the page that explains them, after the commands that they need."""
    found = list(filter(is_run_here, commands(page)))
    if page != "docs/commands.md":
        return found
    explained = {command.text for other in OTHER_PAGES if other != page for command in commands(other)}
    return [command for command in found if command.text not in explained]


def slow_commands(page: str, found: list[Command]) -> set[str]:
    """The texts of those that take long, and of requests to a server that does."""
    if page in SLOW_PAGES:
        return {command.text for command in found}
    slow: set[str] = set()
    server = ""
    for command in found:
        if is_server(command):
            server = command.text
        if any(text in command.text for text in SLOW) or (command.text.startswith("curl ") and server in slow):
            slow.add(command.text)
    return slow


COMMANDS = {page: commands_to_run(page) for page in OTHER_PAGES}
SLOW_COMMANDS = {page: slow_commands(page, found) for page, found in COMMANDS.items()}
CASES = [
    pytest.param(page, slow, id=f"{page}-slow" if slow else page, marks=[pytest.mark.soak] if slow else [])
    for page in OTHER_PAGES
    for slow in (False, True)
    if any((command.text in SLOW_COMMANDS[page]) == slow for command in COMMANDS[page])
]


@dataclass
class Workplace:
    """A folder in which commands are run, each once."""

    folder: Path
    terminal: Terminal
    done: set[str] = field(default_factory=set)

    def run(self, command: Command) -> None:
        if command.text in self.done:
            return
        self.done.add(command.text)
        self._prepare(command.text)
        self.terminal.run(command)

    def _prepare(self, text: str) -> None:
        """Each pretraining of my-run.yaml starts at its beginning, and each watch has something to score."""
        run = self.folder / "runs/mine"
        trains = text.startswith(("deepcloze pretrain ", "deepspeed "))
        if trains and "my-run.yaml" in text and "--run.dir" not in text:
            shutil.rmtree(run, ignore_errors=True)
        if text.startswith("deepcloze watch "):
            shutil.rmtree(run / "downstream", ignore_errors=True)
        if "runs/mine/health/" in text:
            dump = run / "health/step-00000107/rank-00000.jsonl"
            write_lines(dump, ['{"microbatch_loss": null, "text": "a"}'])


@pytest.fixture(scope="module")
def workplace(
    tmp_path_factory: pytest.TempPathFactory,
    text_file: Path,
    wordpiece: Path,
    byte_level: Path,
    fork_server: ForkServer,
) -> Iterator[Workplace]:
    """A folder in which the commands of "Your own data" in the README have run."""
    folder = tmp_path_factory.mktemp("workplace")
    texts = text_file.read_text(encoding="utf-8").splitlines()
    write_texts(folder, texts)
    write_task(folder, texts, word="ba")
    write_public_tasks(folder / "data", texts, word="ba")
    write_lines(folder / "hosts", ["localhost slots=2"])
    write_model(folder / "bert-base-uncased", wordpiece)
    write_model(folder / "bert-base-chinese", sorted(set(CHINESE)))
    shutil.copytree(folder / "bert-base-uncased", folder / "bert-base-cased")
    shutil.copytree(byte_level, folder / "roberta-base")
    for page in OTHER_PAGES:
        write_configs(page, folder)
    monkeypatch = pytest.MonkeyPatch()
    leave_figures_empty(monkeypatch)
    place = Workplace(folder, Terminal(folder, variables=fork_server.environment()))
    readme = COMMANDS["README.md"]
    needs_server = [command for command in readme if is_server(command) or command.text.startswith("curl ")]
    own_data = [command for command in readme if command not in needs_server and command.message is None]
    for command in sorted(own_data, key=lambda command: "runs/bert-base" in command.text):
        if "runs/bert-base" in command.text:
            shutil.copytree(folder / "runs/mine", folder / "runs/bert-base")
        place.run(command)
    shutil.copytree(folder / "runs/mine", folder / "runs/stable")
    shutil.copytree(folder / "corpora/books-heldout", folder / "corpora/wiki-heldout")
    yield place
    place.terminal.close()
    monkeypatch.undo()


def test_own_data_in_the_readme_gives_labels(workplace: Workplace) -> None:
    """Catches configs that do not fit the commands around them, or are not valid as they are written."""
    labels = (workplace.folder / "labels.csv").read_text(encoding="utf-8")
    assert labels.startswith("row,text,predicted,")
    validate_configs("README.md", workplace.folder)


@pytest.mark.parametrize(("page", "slow"), CASES)
def test_commands_run(page: str, slow: bool, workplace: Workplace) -> None:
    """Catches a command that does not work, and one that needs something and does not say so."""
    missing = set()
    for command in COMMANDS[page]:
        program = command.text.split()[0].replace("export", "bash")  # a builtin
        if not is_installed(program):
            missing.add(program)
        elif slow or command.text not in SLOW_COMMANDS[page]:
            workplace.run(command)
    workplace.terminal.close()
    if missing:
        pytest.skip(f"not installed: {', '.join(sorted(missing))}")


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", read_page(page), re.DOTALL)


def docstring_examples() -> list[str]:
    """The examples in the docstrings of the functions."""
    docstrings = [inspect.getdoc(getattr(deepcloze, name)) or "" for name in deepcloze.__all__]
    docstrings.append(inspect.getdoc(deepcloze.Predictor.load) or "")
    return [textwrap.dedent(text.partition("Example:\n")[2]) for text in docstrings]


@pytest.mark.soak
def test_python_examples_run(workplace: Workplace) -> None:
    """Catches an example that does not work."""
    for command in COMMANDS["docs/comparing.md"]:  # which has the files of the comparison
        workplace.run(command)
    shutil.rmtree(workplace.folder / "runs/mine", ignore_errors=True)
    shutil.rmtree(workplace.folder / "runs/my-task", ignore_errors=True)
    names: dict[str, object] = {"deepcloze": deepcloze}
    for example in (*python_blocks("docs/python.md"), *docstring_examples()):
        workplace.terminal.execute(example, names)
    assert {"corpus", "run", "scores", "results", "predictor", "losses"} <= names.keys()


@pytest.mark.soak
@pytest.mark.parametrize("page", [page for page in OTHER_PAGES if python_blocks(page) and page != "docs/python.md"])
def test_python_beside_commands_runs(page: str, workplace: Workplace) -> None:
    """Catches an example for the result of a page's commands that does not work."""
    for command in COMMANDS[page]:
        if is_installed(command.text.split()[0]):
            workplace.run(command)
    for block in python_blocks(page):
        workplace.terminal.execute(block, {})


@pytest.mark.parametrize("page", PAGES)
def test_targets_of_make_exist(page: str) -> None:
    """Catches the name of a target that was renamed."""
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    named = [command.text for command in commands(page)] + re.findall(r"`(make [^`]*)`", read_page(page))
    for command in named:
        for target in re.findall(r"(?:^|&& )make (?:[A-Z]+=\S+ )*([a-z]+)\b", command):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), command


PAGE = """
Text with `deepcloze status RUN`.

    $ deepcloze evaluate --checkpoint a --json    # a comment
    step 1: loss 2
    deepcloze: no message of the last command

    deepcloze pretrain --config a \\
        --run.dir=b    # needs a GPU
    $ deepcloze plan --config b
    deepcloze: b is missing

1. A list:

       curl http://127.0.0.1:8000

```sh
true

# needs Docker: a reason
docker build .
# another comment
sort a | uniq
```

```yaml
make: no command
```
"""


def test_commands_are_found_with_their_marks_and_messages() -> None:
    """Catches commands that no test runs because they are not found, and marks that apply to others."""
    assert find_commands("a.md", PAGE) == [
        Command("a.md", "deepcloze evaluate --checkpoint a --json", None, None),
        Command("a.md", "deepcloze pretrain --config a --run.dir=b", "needs a GPU", None),
        Command("a.md", "deepcloze plan --config b", None, "deepcloze: b is missing"),
        Command("a.md", "curl http://127.0.0.1:8000", None, None),
        Command("a.md", "true", None, None),
        Command("a.md", "docker build .", "needs Docker: a reason", None),
        Command("a.md", "sort a | uniq", None, None),
    ]


@pytest.mark.parametrize("page", PAGES)
def test_no_command_is_overlooked(page: str) -> None:
    """Catches a command that no test runs because `documented` does not know its program."""
    assert overlooked(read_page(page)) == []


def test_overlooked_commands_are_those_with_flags_of_unknown_programs() -> None:
    """Catches a check that takes every line for output."""
    assert overlooked("    fix: ssh a -v\n    unheard-of --flag\n    deepcloze plan --config a\n") == [
        "unheard-of --flag"
    ]
