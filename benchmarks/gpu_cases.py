"""What `benchmarks.gpu` measures and finds. Imports neither torch nor DeepSpeed."""

from dataclasses import dataclass
from typing import Any

_BERT = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 1024}
MODELS: dict[str, dict[str, Any]] = {
    "bert-base": _BERT,
    "bert-large": _BERT
    | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "modernbert-base": {"model_type": "modernbert"},  # the defaults of transformers, with 50,368 tokens
}


@dataclass(frozen=True)
class TrainingCase:
    """What is measured."""

    model: str  # of MODELS
    length: int  # of the longest sequence, in tokens
    precision: str
    zero_stage: int
    compile: bool
    microbatch_tokens: int
    steps: int
    warmup: int  # steps before, not timed
    tiny: bool  # a tiny model of the same type


@dataclass(frozen=True)
class TrainingResult:
    """What was measured; or why nothing was."""

    device: str = ""
    tokens_per_second: float | None = None
    mfu: float | None = None  # None: the device's peak is unknown
    step_ms: float | None = None
    memory: int | None = None  # peak, in bytes
    fill: float | None = None  # real tokens per slot
    error: str = ""


@dataclass(frozen=True)
class KernelSettings:
    device: str  # cuda or cpu
    precision: str
    lengths: tuple[int, ...]  # of the sequences that attention is measured with
    tokens: int  # of a microbatch
    rounds: int


@dataclass(frozen=True)
class KernelTime:
    kernel: str
    shape: str
    ms: float | None = None  # forward and backward, median of the rounds
    tflops: float | None = None  # TFLOP/s; None: it is bound by memory
    error: str = ""  # why nothing was measured
