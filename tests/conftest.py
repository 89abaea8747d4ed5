"""Shared by all tests: `--record`, soak tests on request only, a cache folder of their own, a disk that can be filled,
and tiny corpora that are built once per session. With `--durations`, also prints the seconds by folder."""

import gc
import logging
import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, settings

from empty_figures import leave_figures_empty
from fork_server import look_up_versions_once
from frozen_imports import freeze_imports
from hub_server import HubServer, hub_server, use_hub
from rank_pool import ForkServer, RankPool
from s3_server import Proxy, environment, moto_server, new_bucket, proxy
from small_disk import SmallDisk, mounted_small_disk
from triton_interpreter import interpret_kernels

_TESTS = Path(__file__).parent
_CPU_TIMES = psutil.cpu_times()
gc.disable()  # until tests are collected: their imports make a million objects that stay
_CACHE = tempfile.mkdtemp(prefix="deepcloze-tests-")
_PARENT = "FORK_SERVER_PARENT"  # a variable: the folder of a server from which test processes and theirs are forked
# Proxies, trackers, jobs and terminals of the user are not those of the tests.
_USERS = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "term", "columns", "lines", "no_color", "force_color")
_RANKS = ("master_addr", "master_port", "rank", "local_rank", "world_size")
for _name in list(os.environ):
    if _name.lower() in (*_USERS, *_RANKS) or _name.startswith(("WANDB_", "MLFLOW_", "SLURM_")):
        del os.environ[_name]
os.environ["XDG_CACHE_HOME"] = _CACHE  # also of the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that no folder has may be one on the Hub
# Threads that wait for another one spin for milliseconds otherwise: on busy cores, that one cannot run meanwhile.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each process of pytest starts one a core
# Drawing an example, or running a test with it, can be slow on a busy machine.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
# The commands that tests start would ignore them too, under `nohup` and in the background of a shell.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):  # with xdist; None in its test processes, which inherit the variable
        folder = Path(_CACHE, "fork-server")
        folder.mkdir()
        server = ForkServer(folder)
        config.add_cleanup(server.close)
        os.environ[_PARENT] = str(folder)
        if not any(Path("/dev", name).exists() for name in ("nvidiactl", "dxg", "nvmap")):  # a server chooses the CPU
            os.environ |= server.environment()
    elif _PARENT in os.environ:
        before = os.environ.pop("PYTHONPATH", "").removeprefix(os.environ[_PARENT]).removeprefix(":")
        os.environ |= {"PYTHONPATH": before} if before else {}


def pytest_collection_finish() -> None:
    freeze_imports()
    gc.enable()


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="record the golden runs instead of comparing with them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect soak tests unless `-m` names them. Order the files so that there are always some to compute with."""
    if "soak" not in config.option.markexpr:
        soak = [item for item in items if item.get_closest_marker("soak")]
        items[:] = [item for item in items if not item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=soak)
    _interleave(items)


def _interleave(items: list[pytest.Item]) -> None:
    """Spread the files of tests that wait for processes evenly among the unit tests, which compute: otherwise all test
    processes wait in the first half of the time, and all compete for the cores in the second."""
    computing: dict[Path, int] = {}
    waiting: dict[Path, int] = {}
    for item in items:
        files = computing if "unit" in item.path.relative_to(_TESTS).parts else waiting
        files.setdefault(item.path, len(files))
    places = {path: 0.9 * number / len(waiting) for path, number in waiting.items()}  # the last ones are short
    places |= {path: number / len(computing) for path, number in computing.items()}
    items.sort(key=lambda item: places[item.path])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the total by folder below the slowest tests, and whether tests compute or wait, so that growth is seen."""
    if config.option.durations is None:
        return
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                folders = Path(report.nodeid.partition("::")[0]).parent.parts
                seconds["/".join(folders[: 3 if "unit" in folders else 2])] += report.duration
    terminalreporter.section("seconds by folder")
    for folder, total in seconds.most_common():
        terminalreporter.write_line(f"{total:8.1f}s {folder}")
    times = psutil.cpu_times()
    idle = (times.idle - _CPU_TIMES.idle) / (sum(times) - sum(_CPU_TIMES))
    terminalreporter.write_line(f"the cores were idle for {idle:.0%} of the time")


@pytest.fixture(scope="session", autouse=True)
def _versions() -> None:
    look_up_versions_once()


@pytest.fixture(autouse=True)
def _same_signal_handlers() -> Iterator[None]:
    """A command that ends ignores further stop signals; processes that later tests fork would ignore them too."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _same_root_logger() -> Iterator[None]:
    """A rank, or a server, that runs in this process logs more, and to other handlers; later tests count the records
    that are logged."""
    root = logging.root
    level, handlers = root.level, {*root.handlers}
    yield
    for handler in {*root.handlers} - handlers:
        root.removeHandler(handler)
        handler.close()
    if root.level != level:
        root.setLevel(level)
    logging.captureWarnings(False)


_SYLLABLES = ["ba", "de", "fi", "go", "lu", "mar", "nes", "pol", "rin", "sta", "ter", "ud", "ven", "wil", "yon", "zed"]


def _english(seed: int, documents: int) -> str:
    """Random text like English: short words are frequent, long ones rare, and documents have 1 to 150 words.

    Each word depends on the previous one, so that a model can learn something.
    """
    draw = random.Random(seed)
    drawn = {"".join(draw.choices(_SYLLABLES, k=1 + draw.randrange(4))) for _ in range(300)}
    words = sorted(sorted(drawn), key=len)
    lines = []
    for _ in range(documents):
        at, line = 0, []
        for _ in range(min(150, 1 + int(draw.expovariate(1 / 18)))):
            at = (7 * at + 1) % len(words) if draw.random() < 0.6 else int(len(words) * draw.random() ** 3)
            line.append(words[at])
        lines.append(" ".join(line).capitalize() + draw.choice(".?!"))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """640 documents, one per line."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(_english(seed=1, documents=640), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def wordpiece(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A WordPiece tokenizer like BERT's, with 200 tokens."""
    from pretrain.corpus.options import TokenizerOptions
    from pretrain.corpus.train_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizers") / "wordpiece"
    train_tokenizer(TokenizerOptions(source=text_file, output=folder, vocab_size=200, lowercase=True))
    return folder


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A byte-level BPE tokenizer like RoBERTa's, with 330 tokens."""
    from pretrain.corpus.options import TokenizerOptions
    from pretrain.corpus.train_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizers") / "byte_level"
    train_tokenizer(TokenizerOptions(source=text_file, output=folder, vocab_size=330, kind="bpe"))
    return folder


@pytest.fixture(scope="session")
def wordpiece_corpus(tmp_path_factory: pytest.TempPathFactory, text_file: Path, wordpiece: Path) -> Path:
    """600 documents; the other 40 are `heldout_corpus`."""
    from pretrain.corpus.build import build_corpus
    from pretrain.corpus.options import CorpusOptions

    folder = tmp_path_factory.mktemp("corpora") / "text"
    build_corpus(CorpusOptions(source=text_file, tokenizer=wordpiece, output=folder, holdout=40, workers=1))
    return folder


@pytest.fixture(scope="session")
def heldout_corpus(wordpiece_corpus: Path) -> Path:
    return wordpiece_corpus.with_name(wordpiece_corpus.name + "-heldout")


@pytest.fixture(scope="session")
def byte_level_corpus(tmp_path_factory: pytest.TempPathFactory, text_file: Path, byte_level: Path) -> Path:
    from pretrain.corpus.build import build_corpus
    from pretrain.corpus.options import CorpusOptions

    folder = tmp_path_factory.mktemp("corpora") / "bytes"
    build_corpus(CorpusOptions(source=text_file, tokenizer=byte_level, output=folder, workers=1))
    return folder


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("ranks"), os.environ.get(_PARENT))
    yield server
    server.close()


@pytest.fixture(scope="session")
def pools(fork_server: ForkServer) -> Iterator[dict[int, RankPool]]:
    """Pools of rank processes, by world size."""
    pools = {size: RankPool(fork_server, size) for size in (1, 2, 3)}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def interpreting_pools(fork_server: ForkServer) -> Iterator[dict[int, RankPool]]:
    """Pools of rank processes in which Triton interprets its kernels, by world size."""
    pools = {size: RankPool(fork_server, size, prepare=interpret_kernels) for size in (1, 2)}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture
def handed_over(request: pytest.FixtureRequest) -> Mapping[str, str]:
    """Variables for commands, which then run in forked processes; none for tests marked `real_start`."""
    if request.node.get_closest_marker("real_start"):
        return {}
    return request.getfixturevalue("fork_server").environment()


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tuning in this process leaves empty figures."""
    leave_figures_empty(monkeypatch)


@pytest.fixture(scope="session")
def _measured_memory() -> dict[Any, Any]:
    return {}


@pytest.fixture
def memory_measured_once(monkeypatch: pytest.MonkeyPatch, _measured_memory: dict[Any, Any]) -> None:
    """Plans in this process measure the memory of a microbatch, which takes 0.4 s, once for all tests, and try once
    whether a model is packed. test_planned_activations.py and test_packed_models.py test the two."""
    from pretrain.plan import plan

    measure, is_packed = plan.microbatch_memory, plan.is_packed

    def measure_once(model: Any, shape: Any, computation: Any) -> Any:
        key = (type(model), model.config.to_json_string(), shape, computation)
        if key not in _measured_memory:
            _measured_memory[key] = measure(model, shape, computation)
        return _measured_memory[key]

    def try_once(config: Any) -> bool:
        key = config.to_json_string()
        if key not in _measured_memory:
            _measured_memory[key] = is_packed(config)
        return bool(_measured_memory[key])

    monkeypatch.setattr(plan, "microbatch_memory", measure_once)
    monkeypatch.setattr(plan, "is_packed", try_once)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk that a test can fill; skips where mounting is not permitted."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    with mounted_small_disk(folder) as disk:
        if isinstance(disk, str):
            pytest.skip(disk)
        yield disk


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """The port of an S3 server, in a process of its own."""
    with moto_server() as port:
        yield port


@pytest.fixture
def bucket(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a new bucket; this process and those that it starts find its server."""
    import s3fs

    for name, value in environment(s3_port).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # of another test's server
    yield new_bucket()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def faulty(bucket: str, s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that stands between this process and the bucket from now on."""
    import s3fs

    from experiment import storage

    monkeypatch.setattr(storage, "_WAITS", (0.01, 0.02))
    with proxy(s3_port) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{between.port}")
        s3fs.S3FileSystem.clear_instance_cache()
        yield between


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server in place of the Hugging Face Hub, with an empty cache, for this process."""
    from experiment import storage

    monkeypatch.setattr(storage, "_WAITS", (0.01, 0.02))
    with hub_server() as server:
        use_hub(monkeypatch, server.url, tmp_path / "hub-cache")
        yield server


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """Headless Chromium; skips without it."""
    from headless_chromium import start_browser

    driver = start_browser()
    yield driver
    driver.quit()
