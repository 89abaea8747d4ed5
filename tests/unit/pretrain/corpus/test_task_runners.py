import json
import operator
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from experiment.errors import StoppedError, UserError
from experiment.process import cpu_cores
from launcher.cli import main
from pretrain.corpus import build, job_array, records, shards, splits, task_runners, tasks
from pretrain.corpus.build import build_corpus, complete_corpus
from pretrain.corpus.build_plan import ARGUMENTS, plan_build
from pretrain.corpus.job_array import array_share, build_share
from pretrain.corpus.options import CorpusOptions
from pretrain.corpus.reader import open_corpus
from rank_pool import free_port
from waiting import LIMIT, wait_until

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="the package ray is not installed")


@pytest.fixture(autouse=True)
def source(tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that become several splits."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 700)
    monkeypatch.setattr(splits, "MIN_SPLIT_BYTES", 1000)
    monkeypatch.setattr(job_array, "_PATIENCE", 0.0)  # tasks run one after another
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text("\n".join(lines[number::4]) + "\n", encoding="utf-8")
    return folder


def flags(folder: Path, source: Path, tokenizer: Path, *more: str) -> list[str]:
    return ["corpus", f"--source={source}", f"--tokenizer={tokenizer}", f"--output={folder}", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def whole(tmp_path: Path, source: Path, vocabulary_folder: Path) -> Path:
    """The corpus as one process builds it."""
    build_corpus(CorpusOptions(source=source, tokenizer=vocabulary_folder, output=tmp_path / "whole", workers=1))
    return tmp_path / "whole"


def array_task(patch: pytest.MonkeyPatch, number: int, count: int) -> None:
    """Set the variables of a task of --array=1-COUNT."""
    for name, value in {"ID": number, "MIN": 1, "MAX": count, "STEP": 1, "COUNT": count}.items():
        patch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))


def test_ctrl_c_does_not_reach_workers() -> None:
    """Catches tracebacks of workers, which are in the process group of the terminal, and of their fork server."""
    with task_runners.open_task_runner(2, signal.SIG_BLOCK) as run:
        for blocked in run(signal.pthread_sigmask, [(), ()]):
            assert signal.SIGINT in blocked


class Page(int):
    """A task with a place; in the worker, a number."""

    @property
    def place(self) -> str:
        return f"page {self:d}"

    def __reduce__(self) -> Any:
        return int, (int(self),)


@pytest.mark.parametrize(("pages", "named"), [(range(1, 9), "page 1, or page 2"), ([1, 1, 2, 2], "page 1")])
def test_a_killed_worker_names_its_part(pages: Sequence[int], named: str) -> None:
    """Catches a message that does not say which documents a killed worker had."""
    message = f"memory ran out, with {named}; use fewer --workers, and run the same"
    with pytest.raises(StoppedError, match=message), task_runners.open_task_runner(2, os._exit) as run:
        list(run(operator.call, map(Page, pages)))
    assert ", with a, or b, or c, or one of 2 others; " in str(task_runners._killed([*"abcde"]))
    assert "memory ran out; use fewer" in str(task_runners._killed([]))  # between two tasks


def test_a_container_quota_limits_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a process for each core of the host in a container that may use only a few."""
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    monkeypatch.setattr(cpu_cores, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(task_runners, "worker_pool", lambda *_: pytest.fail("starts workers"))
    with task_runners.open_task_runner(None, 1) as run:
        assert list(run(max, [2, 3])) == [2, 3]


def test_tasks_of_a_job_array(
    tmp_path: Path,
    source: Path,
    vocabulary_folder: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches splits that no task takes, and a corpus with other bytes, or written before all are finished."""
    command = flags(tmp_path / "c", source, vocabulary_folder, "--engine=slurm", "--workers=1")
    for number in (3, 1, 2):
        assert not (tmp_path / "c").exists()
        array_task(monkeypatch, number, 3)
        assert main(command) == 0
    assert contents(tmp_path / "c") == contents(whole)
    assert not (tmp_path / "c.partial").exists()
    assert main(command) == 0
    assert "already exists" in capsys.readouterr().out
    assert main([*command, "--limit=5"]) == 2
    assert "already holds another corpus (another limit: None)" in capsys.readouterr().err


def test_tasks_of_a_job_array_at_the_same_time(
    tmp_path: Path, source: Path, vocabulary_folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a task that joins all shards alone, or that fails or reads the whole source because another one has
    published the corpus."""
    monkeypatch.setattr(build, "scan_source", lambda *_: pytest.fail("the source is read again"))
    joined: list[tuple[int, str]] = []

    def write(job: tasks.BuildJob, task: records.ShardTask) -> Any:
        joined.append((threading.get_ident(), task.file))
        return tasks.write_shard_file(job, task)

    shares = iter([(0, 2), (1, 2)])
    monkeypatch.setattr(job_array, "array_share", lambda _: next(shares))
    monkeypatch.setattr(job_array, "write_shard_file", write)
    monkeypatch.setattr(job_array, "_PATIENCE", LIMIT)
    monkeypatch.setattr(job_array, "_POLL_SECONDS", 0.02)
    options = CorpusOptions(source=source, tokenizer=str(vocabulary_folder), output=tmp_path / "c", workers=1)
    with ThreadPoolExecutor(2) as array:
        for task in [array.submit(build_share, options) for _ in range(2)]:
            task.result()
    complete_corpus(plan_build(options))  # a task that is late
    assert contents(tmp_path / "c") == contents(whole)
    by_task = [{file for task, file in joined if task == found} for found in {task for task, _ in joined}]
    assert len(by_task) == 2
    assert by_task[0].isdisjoint(by_task[1])


@pytest.mark.parametrize("step", ["check_shared", "write_json", "checksum", "join_pieces"])
def test_a_task_whose_share_others_finish(
    tmp_path: Path, source: Path, vocabulary_folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Catches a traceback of a task whose pieces are gone, as of an array that was submitted twice, and one that leaves
    its splits beside the finished corpus."""
    command = flags(tmp_path / "c", source, vocabulary_folder, "--engine=slurm", "--workers=1")
    plan = plan_build(CorpusOptions(source=source, tokenizer=str(vocabulary_folder), output=tmp_path / "c", workers=1))
    real = getattr(tasks, step)

    def late(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(tasks, step, real)
        complete_corpus(plan)
        return real(*arguments, **options)

    monkeypatch.setattr(tasks, step, late)
    array_task(monkeypatch, 1, 1)
    assert main(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "source"]


def test_tasks_of_a_job_array_with_a_mistake_join_nothing(
    tmp_path: Path,
    source: Path,
    vocabulary_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches tasks that each tokenize the whole source again, because the one before has deleted the tokens."""
    monkeypatch.setattr(job_array, "write_shard_file", lambda *_: pytest.fail("joins pieces"))
    monkeypatch.setattr(job_array, "complete_corpus", lambda *_: pytest.fail("completes the corpus"))
    command = flags(tmp_path / "c", source, vocabulary_folder, "--engine=slurm", "--workers=1", "--document_start=^=")
    for number in (1, 2, 2):
        array_task(monkeypatch, number, 2)
        code = main(command)
    assert code == 2
    assert "--document_start '^=' matches no line" in capsys.readouterr().err


def test_a_job_array_samples_in_two_rounds(
    tmp_path: Path, source: Path, vocabulary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches documents that are drawn before all are counted."""
    sample = ["--holdout=20", "--limit=100", "--workers=1"]
    assert main(flags(tmp_path / "whole", source, vocabulary_folder, *sample)) == 0
    for _ in range(2):
        assert not (tmp_path / "c").exists()
        for number in (1, 2):
            array_task(monkeypatch, number, 2)
            assert main(flags(tmp_path / "c", source, vocabulary_folder, *sample, "--engine=slurm")) == 0
    for part in ("", "-heldout"):
        assert contents(tmp_path / f"c{part}") == contents(tmp_path / f"whole{part}")


@pytest.mark.parametrize("counts", [0, 200])
@pytest.mark.parametrize("changed", ["holdout", "tokenizer"])
def test_tasks_of_a_job_array_with_other_arguments(tmp_path: Path, changed: str, counts: int) -> None:
    """Catches a task that fails although the sample does not change the counts, counts with another tokenizer, and a
    mistake that cannot be corrected although nothing was read with it."""
    folder = tmp_path / "c.partial"
    arguments = {"tokenizer": "a", "holdout": 1, "limit": None}
    records.open_partial(folder, arguments, [])
    for number in range(counts):
        (folder / f"{number:032x}.count.json").touch()
    for attempt in range(5):
        arguments = {**arguments, changed: f"{attempt}"}
        with (
            pytest.raises(UserError, match=r"another tokenizer \(found a, expected .\); use the same")
            if counts and changed == "tokenizer"
            else nullcontext(),
            ThreadPoolExecutor(8) as array,
        ):
            list(array.map(lambda _: records.open_partial(folder, arguments, []), range(8)))  # noqa: B023
            assert records.read_record(folder / ARGUMENTS, dict[str, Any]) == arguments
        assert len(list(folder.glob("*.count.json"))) == counts


def test_a_column_without_text_is_corrected_between_tasks(
    tmp_path: Path, lines: list[str], vocabulary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches documents that are lost because a task has read nothing but an empty column of theirs."""
    for part in range(2):
        rows = (json.dumps({"text": text, "title": ""}) for text in lines[part * 50 : part * 50 + 50])
        (tmp_path / f"{part}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    command = flags(tmp_path / "c", tmp_path / "*.jsonl", vocabulary_folder, "--engine=slurm", "--workers=1")
    array_task(monkeypatch, 1, 2)
    assert main([*command, "--column=title"]) == 0
    for number in (1, 2):
        array_task(monkeypatch, number, 2)
        assert main([*command, "--column=text"]) == 0
    assert open_corpus(tmp_path / "c").documents == 100


@pytest.mark.parametrize("variables", [{}, {"MAX": 9}], ids=["no array", "gaps"])
def test_environment_without_a_share(variables: dict[str, int]) -> None:
    """Catches splits that no task or two tasks would take."""
    found = {"ID": 1, "MIN": 1, "MAX": 4, "STEP": 1, "COUNT": 4} | variables if variables else {}
    with pytest.raises(UserError, match="--engine slurm: expected"):
        array_share({f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in found.items()})
    assert array_share(
        {f"SLURM_ARRAY_TASK_{name}": "2" for name in ("ID", "MIN", "MAX", "STEP")} | {"SLURM_ARRAY_TASK_COUNT": "1"}
    ) == (0, 1)


@pytest.mark.soak
@needs_ray
def test_ray(
    tmp_path: Path,
    source: Path,
    vocabulary_folder: Path,
    whole: Path,
    ray_head: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches corpora and clean documents of Ray's tasks with other bytes than of this machine, relative paths that are
    looked up in the folder in which Ray was started, and errors with Ray's traceback."""
    ray = ["--engine=ray", f"--ray_address={ray_head}"]
    monkeypatch.chdir(tmp_path)
    assert main(flags(tmp_path / "c", Path(source.name), vocabulary_folder, *ray)) == 0
    assert contents(tmp_path / "c") == contents(whole)
    config = {"source": str(source), "output": str(tmp_path / "cleaned"), "steps": [{"ftfy": {}}, {"minhash": {}}]}
    (tmp_path / "clean.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["clean", "--config", str(tmp_path / "clean.yaml"), "--workers=1"]) == 0
    assert main(["clean", "--config", str(tmp_path / "clean.yaml"), f"--output={tmp_path}/cleaned-by-ray", *ray]) == 0
    assert contents(tmp_path / "cleaned-by-ray") == contents(tmp_path / "cleaned")
    (source / "2.txt").write_bytes(b"good\nba\xff\n")
    options: dict[str, Any] = {"source": source, "tokenizer": vocabulary_folder, "output": tmp_path / "d"}
    with pytest.raises(UserError, match=r"2\.txt:2: not UTF-8 text \(byte 0xff at column 3\)"):
        build_corpus(CorpusOptions(**options, engine="ray", ray_address=ray_head))


@pytest.mark.soak
@needs_ray
def test_a_task_that_kills_its_process(ray_head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a page that is too much for the memory, and that Ray's tasks read again and again without a message."""
    monkeypatch.setattr(task_runners, "_RETRIES", 1)

    def die(job: None, task: object) -> None:
        os._exit(1)

    part = SimpleNamespace(place="documents from a.warc:7 on")
    with (
        task_runners.open_task_runner(None, None, "ray", ray_head) as run,
        pytest.raises(StoppedError, match=r"^documents from a\.warc:7 on: the task died 2 times, .*; run the same"),
    ):
        list(run(die, [part]))


@pytest.mark.soak
@needs_ray
def test_a_cluster_that_has_ended(
    tmp_path: Path, source: Path, vocabulary_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a command that tries to connect for 14 minutes, as Ray does by default."""
    address = f"--ray_address=127.0.0.1:{free_port()}"
    assert main(flags(tmp_path / "c", source, vocabulary_folder, "--engine=ray", address)) == 2
    assert f"{address.replace('=', ' ')}: no Ray cluster answers" in capsys.readouterr().err


@pytest.fixture
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Ray cluster of one node."""
    port, output = free_port(), tmp_path_factory.mktemp("ray") / "output"
    command = "ray start --head --block --include-dashboard=false --disable-usage-stats --object-store-memory=100000000"
    with output.open("w") as file:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *command.split()[1:], f"--port={port}", "--num-cpus=2"],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: "Ray runtime started" in output.read_text(), process)  # its port is open before
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def test_ray_is_not_installed(
    tmp_path: Path, source: Path, vocabulary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback instead of the name of the extra."""
    monkeypatch.setitem(sys.modules, "ray", None)
    options: dict[str, Any] = {"source": source, "tokenizer": vocabulary_folder, "output": tmp_path / "c"}
    with pytest.raises(UserError, match=r"--engine ray needs Ray; install it with: pip install 'deepcloze\[ray\]'"):
        build_corpus(CorpusOptions(**options, engine="ray"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_folder_that_machines_do_not_share(tmp_path: Path, source: Path, vocabulary_folder: Path) -> None:
    """Catches a build that waits for pieces on the disk of another machine forever."""
    plan = plan_build(CorpusOptions(source=source, tokenizer=str(vocabulary_folder), output=tmp_path / "c"))
    with pytest.raises(
        UserError, match=rf"{plan.partial} does not exist on .*; expected a disk that all machines share"
    ):
        tasks.tokenize_split(build.build_job(plan), records.SplitTask(plan.splits[0], b""))


class _Cluster:
    """Stands for Ray. Each task has a worker of its own, in another working directory; with `error`, it dies."""

    exceptions = SimpleNamespace(
        **{name: type(name, (Exception,), {}) for name in ("NodeDiedError", "OutOfMemoryError", "WorkerCrashedError")}
    )

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, error: str | None = None) -> None:
        self.folder, self.error, self.retries, self.initialized = folder, error, -1, False
        patch.setitem(sys.modules, "ray", self)
        patch.setitem(sys.modules, "ray.exceptions", self.exceptions)

    def is_initialized(self) -> bool:
        return self.initialized

    def init(self, **_: object) -> None:
        assert not self.initialized
        self.initialized = True

    def shutdown(self) -> None:
        self.initialized = False

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2}

    def put(self, value: object) -> Callable[[], object]:
        return lambda: value

    def get(self, reference: Callable[[], object]) -> object:
        return reference()

    def wait(self, running: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return running[:num_returns], running[num_returns:]

    def remote(self, max_retries: int) -> Any:
        self.retries = max_retries
        return lambda function: SimpleNamespace(remote=partial(self._run, function))

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        if self.error:
            return Mock(side_effect=getattr(self.exceptions, self.error))
        task_runners._fetched.cache_clear()
        with chdir(self.folder):
            return self.put(function(*arguments))


def test_ray_workers_in_another_folder(
    tmp_path: Path, vocabulary_folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a relative --source that workers look for in the working directory of `ray start`."""
    (tmp_path / "elsewhere").mkdir()
    _Cluster(monkeypatch, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    build_corpus(CorpusOptions(source="source", tokenizer=str(vocabulary_folder), output=Path("c"), engine="ray"))
    assert contents(tmp_path / "c") == contents(whole)


@pytest.mark.parametrize("error", vars(_Cluster.exceptions))
def test_a_task_that_dies_again_and_again(
    tmp_path: Path, source: Path, vocabulary_folder: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    """Catches a task that Ray repeats forever, or without the name of its file, because it needs more memory than there
    is."""
    cluster = _Cluster(monkeypatch, tmp_path, error)
    with (
        pytest.raises(StoppedError, match=r"died 6 times, .* run the same command again to resume"),
        task_runners.open_task_runner(None, None, "ray") as run,
    ):
        list(run(max, [1]))
    options = CorpusOptions(source=source, tokenizer=str(vocabulary_folder), output=tmp_path / "c", engine="ray")
    with pytest.raises(StoppedError, match=rf"documents from {source}/.* on: the task died 6 times"):
        build_corpus(options)
    assert cluster.retries == int(os.environ["RAY_task_oom_retries"]) == 5  # noqa: SIM112


@pytest.mark.parametrize("initialized", [True, False])
def test_a_process_that_uses_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, initialized: bool) -> None:
    """Catches a build that connects a caller's process again, which Ray refuses, or disconnects it."""
    cluster = _Cluster(monkeypatch, tmp_path)
    cluster.initialized = initialized
    with task_runners.open_task_runner(None, None, "ray") as run:
        assert list(run(max, [])) == []
    assert cluster.initialized == initialized


class _NoCluster:
    """Stands for Ray without a cluster."""

    @staticmethod
    def is_initialized() -> bool:
        return False

    @staticmethod
    def init(address: str | None = None, **_: object) -> None:
        raise ConnectionError(f"Could not find {address}.\nMore lines")


@pytest.mark.parametrize(("given", "address"), [("10.0.0.1:6379", "10.0.0.1:6379"), (None, "auto")])
def test_no_cluster_answers(monkeypatch: pytest.MonkeyPatch, given: str | None, address: str) -> None:
    """Catches a traceback instead of the address that does not answer, and a cluster that Ray starts for this run."""
    monkeypatch.setitem(sys.modules, "ray", _NoCluster)
    message = rf"--ray_address {address}: no Ray cluster answers \(Could not find {address}\.\)"
    with pytest.raises(UserError, match=message):
        task_runners.open_task_runner(1, None, "ray", given).__enter__()
