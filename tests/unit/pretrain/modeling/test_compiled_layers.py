"""Layers compiled with torch.compile.

Each test compiles in a process of its own: compiled code, and what torch knows about it, cannot be unloaded.
"""

import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM

from pretrain.batching.batch import Microbatch
from pretrain.modeling import masked_lm
from pretrain.modeling.attention import Packing, use_packed_attention
from pretrain.modeling.compiled_layers import _Compiler, _open_cache, compile_layers
from pretrain.modeling.masked_lm import MaskedLanguageModel
from pretrain.world import World
from rank_pool import ForkServer, RankPool

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")

Run = Callable[..., dict[str, Any]]
DEFAULTS: dict[str, Any] = {
    "model_type": "bert",
    "config": {},
    "checkpointing": False,
    "compiler": "",
    "backend": "",
    "capability": None,
    "full_disk": False,
}


@pytest.fixture
def run(fork_server: ForkServer) -> Iterator[Run]:
    """Calls `compare_case` in new processes."""
    pools: list[RankPool] = []

    def call(cache: Path, **options: Any) -> dict[str, Any]:
        pools.append(RankPool(fork_server, 1))
        (found,) = pools[-1].run(compare_case, cache, DEFAULTS | options)
        return found  # type: ignore[no-any-return]

    yield call
    for pool in pools:
        pool.close()


def compare_case(_: World, cache: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Compare a model with compiled layers with one without. Changes settings of the process."""
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pretrain").addHandler(handler)
    break_compiling(options)
    expected = losses_and_gradients(MaskedLanguageModel(build(options)).train())
    wrapped = MaskedLanguageModel(build(options))
    compile_layers(wrapped, cache)
    found = losses_and_gradients(wrapped.train())
    for (loss, gradients), (other, others) in zip(expected, found, strict=True):
        torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients, others, rtol=1e-4, atol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"graphs": graphs, "losses": [loss.item() for loss, _ in found], "warnings": warnings}


def break_compiling(options: dict[str, Any]) -> None:
    """Change what compiles, or where, as the options say."""
    compile = torch.compile
    if options["backend"] == "broken":

        def broken(*_: Any) -> None:
            raise RuntimeError("does not compile")

        # Another function, which is traced at once.
        torch.compile = lambda _, **kwargs: compile(lambda hidden, *_, **__: 2 * hidden, **kwargs | {"backend": broken})
    elif options["backend"]:
        torch.compile = lambda *args, **kwargs: compile(*args, **kwargs | {"backend": options["backend"]})
    if options["compiler"]:
        from torch._inductor import config

        config.cpp.cxx = (options["compiler"],)
    if options["full_disk"]:

        def mkdtemp(**_: Any) -> None:
            raise OSError(28, "No space left on device")

        tempfile.mkdtemp = mkdtemp  # type: ignore[assignment]

    class PackingOfDevice(Packing):
        def __init__(self, *inputs: Any) -> None:
            super().__init__(*inputs)
            self.capability = options["capability"]

    masked_lm.Packing = PackingOfDevice  # type: ignore[misc]


def build(options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
    config = AutoConfig.for_model(options["model_type"], pad_token_id=0, vocab_size=101, **sizes, **options["config"])
    model = AutoModelForMaskedLM.from_config(config)
    use_packed_attention(model)
    if options["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def microbatch(rows: int, width: int) -> Microbatch:
    torch.manual_seed(rows)
    segments = (torch.arange(width) // 5 + 1).int().repeat(rows, 1)
    bounds = torch.arange(0, rows * width + 1, 5).int()
    ids, positions = torch.randint(1, 101, (rows, width)), (torch.arange(width) % 5).repeat(rows, 1)
    return Microbatch(ids, positions, segments, bounds, torch.tensor([1, 3, 8]), torch.tensor([4, 5, 6]))


def losses_and_gradients(wrapped: MaskedLanguageModel) -> list[tuple[Tensor, list[Tensor]]]:
    found = []
    for rows, width in [(4, 10), (3, 10), (6, 20)]:
        torch.manual_seed(7)
        loss = wrapped(*microbatch(rows, width)).loss_sum
        gradients = torch.autograd.grad(loss, list(wrapped.parameters()), allow_unused=True)
        found.append((loss, [gradient for gradient in gradients if gradient is not None]))
    return found


MODERNBERT = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "local_attention": 6}


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({"backend": "aot_eager"}, 2),  # traces graphs and gradients, without the minute that compiling them takes
        pytest.param({}, 2, marks=pytest.mark.soak),
        pytest.param({"checkpointing": True}, 2, marks=pytest.mark.soak),
        pytest.param(
            {"checkpointing": True, "capability": (7, 0), "config": {"attention_probs_dropout_prob": 0.0}},
            2,
            marks=pytest.mark.soak,
        ),
        pytest.param({"model_type": "modernbert", "config": MODERNBERT}, 3, marks=pytest.mark.soak),
    ],
)
def test_losses_gradients_and_graphs(run: Run, tmp_path: Path, options: dict[str, Any], graphs: int) -> None:
    """Catches other dropout masks than without compiling, other gradients, and a graph for each layer or shape.

    `capability`: of a GPU without flash attention, whose code runs here on the CPU."""
    found = run(tmp_path / "cache", **options)
    assert found["graphs"] == graphs
    assert found["warnings"] == []


@pytest.mark.soak
def test_a_damaged_cache_is_compiled_again(run: Run, tmp_path: Path) -> None:
    """Catches a run that ends, or has other losses, because an earlier one was killed while it wrote compiled code."""
    cache = tmp_path / "cache"
    first = run(cache)
    libraries = list(cache.rglob("*.so"))
    assert libraries
    for library in libraries:
        library.write_bytes(library.read_bytes()[:100])
    again = run(cache)
    assert again["losses"] == pytest.approx(first["losses"], rel=1e-6)
    assert again["warnings"] == []
    assert all(library.stat().st_size > 100 for library in cache.rglob("*.so")), "the next run would find them again"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def repair_case(_: World, cache: Path) -> list[str]:
    """Two ranks meet the same damaged cache, one after the other. Returns the files of the cache at the end."""
    ranks = [_Compiler(cache) for _ in range(2)]
    for number, rank in enumerate(ranks):
        rank._recover(RuntimeError("damaged"))
        (rank._trial / f"compiled by rank {number}").touch()
        rank._keep_trial()
    return [path.name for path in cache.iterdir()]


def test_a_damaged_cache_is_replaced_once(fork_server: ForkServer, tmp_path: Path) -> None:
    """Catches a rank that deletes the cache that another one has repaired and uses."""
    cache = tmp_path / "compiled"
    cache.mkdir()
    (cache / "damaged").touch()
    pool = RankPool(fork_server, 1)
    assert pool.run(repair_case, cache) == [["compiled by rank 0"]]
    pool.close()
    assert list(tmp_path.iterdir()) == [cache]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"backend": "broken"}, "RuntimeError: does not compile"),
        pytest.param({"compiler": "/bin/false"}, "", marks=pytest.mark.soak),
        pytest.param({"compiler": "/bin/false", "full_disk": True}, "", marks=pytest.mark.soak),
    ],
)
def test_without_a_working_compiler_the_layers_run_as_they_are(
    run: Run, tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    """Catches a run that ends where nothing can be compiled, and one that does not say so, or not why."""
    cache = tmp_path / "cache"
    (cache / "of another run").mkdir(parents=True)
    found = run(cache, **options)
    assert len(found["warnings"]) == 1
    assert "torch.compile" in found["warnings"][0]
    assert why in found["warnings"][0]
    assert (cache / "of another run").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("found", ["nothing", "ours", "of all", "of another user", "link", "file"])
def test_the_cache_among_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    """Catches code that is loaded from a folder in /tmp where another user may write."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    known = tmp_path / f"deepcloze-{os.getuid()}"
    if found == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        known.symlink_to(tmp_path / "elsewhere")
    elif found == "file":
        known.touch(mode=0o600)
    elif found != "nothing":
        known.mkdir(mode=0o700)
        known.chmod(0o777 if found == "of all" else 0o700)
    if found == "of another user":
        user = os.getuid() + 1
        known = known.rename(tmp_path / f"deepcloze-{user}")
        monkeypatch.setattr(os, "getuid", lambda: user)
    (tmp_path / "no folder").touch()
    folder = _open_cache(tmp_path / "no folder" / "cache").parent
    assert (folder == known) == (found in ("nothing", "ours"))
    assert folder.parent == tmp_path
    assert stat.S_IMODE(folder.lstat().st_mode) == 0o700
    assert not folder.is_symlink()


@pytest.mark.soak
def test_a_cache_that_cannot_be_written_is_not_needed(run: Run, tmp_path: Path) -> None:
    """Catches a run that ends because its user has no home."""
    (tmp_path / "file").touch()
    assert run(tmp_path / "file" / "cache")["graphs"] == 2
