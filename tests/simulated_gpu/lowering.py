"""Lower compiled layers to the code that torch's compiler writes for an H100, on a machine without a GPU.

    LD_PRELOAD=compiler_device.so python -m simulated_gpu.lowering '{"model_type": "bert"}' [--code FOLDER]

Prints a `Lowered` as JSON for each graph, and writes its code to a file. Tensors are fake: they have shapes and a
device, but no values. Autograd asks `compiler_device.cpp` about the device, the compiler asks functions of torch and
Triton, which are replaced here.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
import torch._dynamo.device_interface
import torch._functorch.config
import torch._inductor.config
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx_inner, select_decomp_table
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from pretrain.modeling import attention
from pretrain.modeling.attention import VarlenKernels, use_packed_attention
from pretrain.modeling.compiled_layers import compile_layers
from pretrain.modeling.head import logits_head
from pretrain.modeling.masked_lm import MaskedLanguageModel
from pretrain.modeling.random_model import random_model
from pretrain.modeling.varlen_attention import varlen_attention, varlen_qkv_attention

_CAPABILITY = (9, 0)
_SLOTS, _SEQUENCES, _PREDICTED, _LENGTH = 4096, 40, 640, 512


@dataclass(frozen=True)
class Lowered:
    """The code of a graph."""

    kernels: tuple[str, ...]  # names of the Triton kernels that the compiler wrote
    calls: tuple[str, ...]  # other operators and matrix products that it calls, in order

    @classmethod
    def of(cls, code: str) -> Self:
        lines = [line for line in code.splitlines() if not line.lstrip().startswith("#")]
        kernels = re.findall(r"^(\w+) = async_compile\.triton\(", code, re.MULTILINE)
        calls = [name for line in lines for name in re.findall(r"(?:torch\.ops|extern_kernels)\.([\w.]+)\(", line)]
        return cls(tuple(kernels), tuple(calls))


class _CodeIsWritten(Exception):  # noqa: N818  # it is not an error
    """Ends the work of the compiler before it compiles the code, which would run it."""


def lower(config: dict[str, Any]) -> list[str]:
    """The code of a model's layers in bf16: forward and backward, in the order of their graphs."""
    codes: list[str] = []
    _replace_device_functions()
    _replace_compiler(codes)
    attention._tried_varlen_kernels = lambda *_: VarlenKernels(varlen_attention, varlen_qkv_attention)
    encoder = random_model(AutoConfig.for_model(**config))
    use_packed_attention(encoder)
    model = MaskedLanguageModel(encoder, max_length=_LENGTH, head=logits_head).to(torch.bfloat16)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"))
        compile_layers(model, Path(tempfile.mkdtemp()))
        for model.trained_length in (None, _LENGTH // 4, 32):  # stages with shorter sequences have the same graphs
            model.train()(**_microbatch())
    return codes


def _microbatch() -> dict[str, torch.Tensor]:
    def slots(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    return {
        "input_ids": slots(1, _SLOTS),
        "position_ids": slots(1, _SLOTS),
        "segments": slots(1, _SLOTS, dtype=torch.int32),
        "cu_seqlens": slots(_SEQUENCES, dtype=torch.int32),
        "masked_positions": slots(_PREDICTED),
        "labels": slots(_PREDICTED),
        "predicted_columns": slots(1, 0),
        "predicted_entries": slots(0),
    }


def _replace_device_functions() -> None:
    def constant(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=_CAPABILITY[0],
        minor=_CAPABILITY[1],
        multi_processor_count=132,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
        warp_size=32,
        total_memory=80 << 30,
        gcnArchName="",
    )
    functions: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "is_available": True,
            "is_initialized": True,
            "is_bf16_supported": True,
            "device_count": 1,
            "current_device": 0,
            "get_device_capability": _CAPABILITY,
            "get_device_properties": properties,
            "get_rng_state": torch.get_rng_state(),
            "set_rng_state": None,
            "synchronize": None,
            "_lazy_init": None,
            "_exchange_device": 0,
            "_maybe_exchange_device": 0,
        },
        torch._dynamo.device_interface.CudaInterface: {
            "is_available": True,
            "current_device": 0,
            "device_count": 1,
            "exchange_device": 0,
            "maybe_exchange_device": 0,
            "get_compute_capability": 90,
            "get_device_properties": properties,
            "get_raw_stream": 0,
        },
        torch._dynamo.device_interface.CudaInterface.Worker: {"current_device": 0, "get_device_properties": properties},
        torch._C: {"_cuda_getDevice": 0, "_cuda_exchangeDevice": 0, "_cuda_maybeExchangeDevice": 0},
    }
    for owner, values in functions.items():
        for name, value in values.items():
            function = constant(value)
            setattr(owner, name, staticmethod(function) if isinstance(owner, type) else function)
    _replace_triton_driver()


def _replace_triton_driver() -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 10 * _CAPABILITY[0] + _CAPABILITY[1], 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
            get_active_torch_device=lambda: torch.device("cuda", 0),
        )
    )


def _replace_compiler(codes: list[str]) -> None:
    """Let `torch.compile` append the code of each graph, and run the graph as it is."""

    def keep(graph: GraphLowering, code: Any) -> None:
        codes.append(code.value)
        raise _CodeIsWritten

    def write_code(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        written = len(codes)
        try:
            compile_fx_inner(graph, inputs)
        except InductorError:
            if len(codes) == written:
                raise
        return make_boxed_func(graph)

    GraphLowering._compile_to_module_lines = keep
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    backend = aot_autograd(fw_compiler=write_code, bw_compiler=write_code, decompositions=select_decomp_table)
    compile_function = torch.compile
    torch.compile = lambda function, **options: compile_function(function, backend=backend, **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=json.loads)
    parser.add_argument("--code", type=Path, help="folder for the code of the graphs")
    given = parser.parse_args()
    for number, written in enumerate(lower(given.config)):
        print(json.dumps(asdict(Lowered.of(written))))
        if given.code is not None:
            given.code.mkdir(parents=True, exist_ok=True)
            (given.code / f"{number}.py").write_text(written, encoding="utf-8")
