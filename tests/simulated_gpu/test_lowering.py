"""The code that torch's compiler writes for an H100, in a process that has fake tensors on one."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from simulated_gpu.lowering import Lowered

TESTS = Path(__file__).parents[1]
LAYER = Counter({"deepcloze.varlen_attention.default": 1})  # other calls: products
BACKWARD = Counter({"deepcloze.varlen_attention_backward.default": 1})

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA device of its own"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed"),
]


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`compiler_device.cpp`, compiled."""
    library, torch_folder = tmp_path_factory.mktemp("device") / "device.so", Path(torch.__file__).parent
    source = Path(__file__).with_name("compiler_device.cpp")
    options = (f"-I{torch_folder}/include", f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = ("g++", "-std=c++20", "-shared", "-fPIC", abi, str(source), "-o", str(library))
    subprocess.run([*command, *options, "-lc10", "-ltorch_cpu"], check=True)
    return library


def lower(device: Path, **config: Any) -> "list[tuple[Lowered, Lowered]]":
    """The forward and backward code of each graph."""
    from simulated_gpu.lowering import Lowered  # torch's compiler takes seconds, also where these tests are deselected

    environment = os.environ | {"LD_PRELOAD": str(device), "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    command = [sys.executable, "-m", "simulated_gpu.lowering", json.dumps(config)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes = [Lowered(**json.loads(line)) for line in done.stdout.splitlines()]
    return list(zip(codes[::2], codes[1::2], strict=True))


def others(code: "Lowered") -> Counter[str]:
    """Calls but of matrix products."""
    return Counter(name for name in code.calls if name not in ("mm", "addmm"))


def test_layers_of_bert(device: Path) -> None:
    """Catches a graph for each layer or stage, one that breaks, operators that the compiler cannot write, separate
    products for query, key and value, and more kernels than on the GPU for which they were counted."""
    layer, last = lower(device, model_type="bert", num_hidden_layers=4, vocab_size=512)
    assert others(layer[0]) == LAYER + Counter({"deepcloze.random_numbers.default": 2})
    fused = {"deepcloze.bias_gelu_backward.default": 1, "deepcloze.norm_backward.default": 2}
    assert others(layer[1]) == BACKWARD + Counter(fused)
    assert [len(code.calls) - others(code).total() for code in layer] == [4, 8]
    assert [0 < len(code.kernels) <= most for code, most in zip(layer, (5, 6), strict=True)] == [True, True]
    assert [0 < len(code.kernels) <= most for code, most in zip(last, (3, 4), strict=True)] == [True, True]
    assert [others(code) for code in last] == [LAYER, BACKWARD]
    assert [len(code.calls) - others(code).total() for code in last] == [1, 2]


def test_layers_of_modernbert(device: Path) -> None:
    """Catches, for windows, rotary positions and gated linear units, the same."""
    special = {"pad_token_id": 0, "cls_token_id": 1, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}
    graphs = lower(device, model_type="modernbert", num_hidden_layers=8, vocab_size=512, **special)
    assert (
        len(graphs) == 4
    )  # the first layer, without a norm before attention, layers with a window and without one, and the last
    for layer, norms in zip(graphs, (1, 2, 2, 0), strict=True):
        norm_gradients = Counter({"deepcloze.norm_backward.default": norms})
        assert [others(code) for code in layer] == [LAYER, BACKWARD + norm_gradients]
        assert [0 < len(code.kernels) <= 5 for code in layer] == [True, True]
    for layer in graphs[:-1]:
        assert [len(code.calls) - others(code).total() for code in layer] == [4, 8]
