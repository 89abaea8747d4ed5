"""What a rank must not import or do before its first step, each in a process of its own."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

from pretrain.corpus.shards import write_shard


def printed_by(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.skipif(Version(version("pyarrow")) < Version("26"), reason="pyarrow before 26 imports pandas")
def test_reading_a_shard_takes_no_pandas(tmp_path: Path) -> None:
    """Catches Arrow's conversions to NumPy, which import pandas in each rank and data worker."""
    write_shard(tmp_path / "shard", np.arange(5, dtype=np.uint16), np.array([2, 3]), np.ones(5, dtype=np.bool_))
    code = (
        "import sys; from pathlib import Path; from pretrain.corpus.shards import map_shard\n"
        f"shard = map_shard(Path({str(tmp_path / 'shard')!r}))\n"
        "print(shard.ids.tolist(), shard.offsets.tolist(), shard.word_starts[0], 'pandas' in sys.modules)"
    )
    assert printed_by(code) == "[0, 1, 2, 3, 4] [0, 2, 5] 31 False"


@pytest.mark.skipif(Version(version("deepspeed")) < Version("0.19.8"), reason="DeepSpeed before 0.19.8 imports it")
def test_an_engine_takes_no_compiler() -> None:
    """Catches torch's inductor, which takes a second to import, for an optimizer of DeepSpeed that is not used."""
    code = (
        "import sys; from deepspeed.runtime import compiler; from pretrain.engine import initialization\n"
        "before = compiler.compile\n"
        "initialization._import_muon()\n"
        "modules = ('deepspeed.runtime.zero.muon.muon_optimizer', 'torch._inductor.compile_fx')\n"
        "print([name in sys.modules for name in modules], compiler.compile is before)"
    )
    assert printed_by(code) == "[True, False] True"


@pytest.mark.parametrize(
    "change",
    [
        "sys.modules['deepspeed.runtime.zero.muon.muon_optimizer'] = None",
        "sys.modules['deepspeed.runtime.zero.muon.original_muon'] = Decorated('original_muon')",
    ],
)
def test_an_engine_starts_with_another_muon(change: str) -> None:
    """Catches a run that cannot start because a release of DeepSpeed has moved Muon, or compiles it with arguments."""
    code = (
        "import sys; from types import ModuleType; from deepspeed.runtime import compiler\n"
        "from pretrain.engine import initialization\n"
        "class Decorated(ModuleType):\n"
        "    def __getattr__(self, name): return compiler.compile(dynamic=True)(type(name, (), {}))\n"
        f"{change}\n"
        "before = compiler.compile\n"
        "initialization._import_muon()\n"
        "print(compiler.compile is before)"
    )
    assert printed_by(code) == "True"


def test_a_rank_collects_no_garbage_while_it_imports(tmp_path: Path) -> None:
    """Catches collections among the million objects that imports make, in the imports and in every later one."""
    code = (
        "import gc, os, runpy, sys\n"
        "collections = []\n"
        "gc.callbacks.append(lambda phase, info: collections.append(info['generation']))\n"
        "os._exit = lambda code: print(collections.count(2), gc.isenabled(), gc.get_freeze_count() > 100_000)\n"
        "gc.collect()\n"
        "collections.clear()\n"
        "sys.argv = ['run', '--config', 'missing.yaml']\n"
        "try: runpy.run_module('pretrain.run', run_name='__main__')\n"
        "except BaseException: pass\n"
    )
    assert printed_by(code).split() == ["0", "True", "True"]


@pytest.mark.parametrize(("accelerator", "visible"), [("cpu", ""), ("", "0,1")])
def test_a_rank_on_the_cpu_sees_no_gpus(monkeypatch: pytest.MonkeyPatch, accelerator: str, visible: str) -> None:
    """Catches rows, kernels and compiled layers for CUDA in a run with DS_ACCELERATOR=cpu on a machine with GPUs."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if accelerator:
        monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    code = (
        "import os, runpy, sys\n"
        "os._exit = lambda code: print([os.environ['CUDA_VISIBLE_DEVICES']])\n"
        "sys.argv = ['run', '--config', 'missing.yaml']\n"
        "try: runpy.run_module('pretrain.run', run_name='__main__')\n"
        "except BaseException: pass\n"
    )
    assert printed_by(code) == str([visible])
