"""What a rank must not import or do before its first step, each in a process of its own."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.version import Version

from launches import patched
from pretrain.corpus.shards import write_shard
from pretrain.world import World
from rank_pool import ForkServer, RankPool


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


@pytest.mark.soak
def test_an_engine_starts_with_another_muon() -> None:
    """Catches a run that cannot start because a release of DeepSpeed compiles its Muon with arguments."""
    code = (
        "import sys; from types import ModuleType; from deepspeed.runtime import compiler\n"
        "from pretrain.engine import initialization\n"
        "class Decorated(ModuleType):\n"
        "    def __getattr__(self, name): return compiler.compile(dynamic=True)(type(name, (), {}))\n"
        "sys.modules['deepspeed.runtime.zero.muon.original_muon'] = Decorated('original_muon')\n"
        "before = compiler.compile\n"
        "initialization._import_muon()\n"
        "print(compiler.compile is before)"
    )
    assert printed_by(code) == "True"


def test_a_rank_rejects_other_releases_of_deepspeed(tmp_path: Path, handed_over: Mapping[str, str]) -> None:
    """Catches the traceback of an import that another release lacks, in a rank that DeepSpeed's launcher starts."""
    code = (
        "import sys, deepspeed\n"
        "deepspeed.__version__ = '0.20.0'\n"
        "sys.modules['deepspeed.runtime.zero.stage_1_and_2'] = None\n"
        "for name in [name for name in sys.modules if name.startswith('pretrain')]:\n"
        "    del sys.modules[name]\n"  # they have been imported where the rank is forked
    )
    environ = os.environ | handed_over | patched(tmp_path, code)
    rank = [sys.executable, "-m", "pretrain.run"]
    done = subprocess.run(rank, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("deepcloze: DeepSpeed 0.20.0 is installed, but ")


@pytest.fixture(scope="module")
def started_rank() -> dict[str, Any]:
    """What a rank has done until it reads its config, on the CPU of a machine with GPUs; then what DeepSpeed's Muon,
    which each engine imports, has added."""
    code = (
        "import gc, json, os, runpy, sys\n"
        "collections = []\n"
        "gc.callbacks.append(lambda phase, info: collections.append(info['generation']))\n"
        "def show(_):\n"
        "    global found\n"
        "    found = {'collections': collections.count(2), 'enabled': gc.isenabled()}\n"
        "    found |= {'frozen': gc.get_freeze_count(), 'modules': list(sys.modules)}\n"
        "    found |= {'visible': os.environ['CUDA_VISIBLE_DEVICES']}\n"
        "os._exit = show\n"
        "gc.collect()\n"
        "collections.clear()\n"
        "sys.argv = ['run', '--config', 'missing.yaml']\n"
        "try: runpy.run_module('pretrain.run', run_name='__main__')\n"
        "except BaseException: pass\n"
        "from deepspeed.runtime import compiler; from pretrain.engine import initialization\n"
        "before = compiler.compile\n"
        "initialization._import_muon()\n"
        "muon = 'deepspeed.runtime.zero.muon.muon_optimizer' in sys.modules\n"
        "compiles = 'torch._inductor.compile_fx' in sys.modules or compiler.compile is not before\n"
        "print(json.dumps(found | {'muon': muon, 'compiles': compiles}))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        found: dict[str, Any] = json.loads(printed_by(code))
    return found


def test_a_rank_collects_no_garbage_while_it_imports(started_rank: dict[str, Any]) -> None:
    """Catches collections among the million objects that imports make, in the imports and in every later one."""
    assert (started_rank["collections"], started_rank["enabled"]) == (0, True)
    assert started_rank["frozen"] > 100_000


@pytest.mark.skipif(Version(version("deepspeed")) < Version("0.19.8"), reason="DeepSpeed before 0.19.8 imports scipy")
def test_a_rank_imports_no_scipy(started_rank: dict[str, Any]) -> None:
    """Catches an eighth of the time of a rank's imports that is spent on what only object detection uses."""
    imported = {name.partition(".")[0] for name in started_rank["modules"]}
    assert "torch" in imported
    assert "scipy" not in imported


@pytest.mark.skipif(Version(version("deepspeed")) < Version("0.19.8"), reason="DeepSpeed before 0.19.8 imports it")
def test_an_engine_takes_no_compiler(started_rank: dict[str, Any]) -> None:
    """Catches torch's inductor, which takes a second to import, for an optimizer of DeepSpeed that is not used."""
    assert (started_rank["muon"], started_rank["compiles"]) == (True, False)


def test_a_rank_on_the_cpu_sees_no_gpus(started_rank: dict[str, Any]) -> None:
    """Catches rows, kernels and compiled layers for CUDA in a run with DS_ACCELERATOR=cpu on a machine with GPUs."""
    assert started_rank["visible"] == "-1"


def visible_case(_: World) -> str:
    """The GPUs that are visible for a rank that has started without DS_ACCELERATOR."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DS_ACCELERATOR")
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        patch.setattr(sys, "argv", ["run", "--config", "missing.yaml"])
        patch.setattr(os, "_exit", lambda _: None)
        with suppress(BaseException):
            runpy.run_module("pretrain.run", run_name="__main__")
        return os.environ["CUDA_VISIBLE_DEVICES"]


def test_a_rank_sees_the_gpus_that_are_visible(fork_server: ForkServer) -> None:
    """Catches GPUs that are hidden from a rank that should use them."""
    pool = RankPool(fork_server, 1)
    assert pool.run(visible_case) == ["0,1"]
    pool.kill()  # it has other settings now
