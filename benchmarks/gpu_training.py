"""Training steps of one model with random weights and text on a GPU: a step of `benchmarks.gpu_session`.

    python -m benchmarks.gpu_training bert-base-512-bf16-zero1-compiled [--profile DIR]
    python -m benchmarks.gpu_training --compile CASE …

Prints a `TrainingResult` of each round: MFU as in `pretrain.modeling.structure`, where padding and recomputed
activations do not count, speed, and peak memory. It uses the engine, model and batches of `deepcloze pretrain`;
documents are about as long as in Wikipedia. `--compile` runs several cases at once, without figures: their compiled
layers and kernels are in the cache then. `--tiny` runs a tiny model, also on a CPU; its figures mean nothing.
"""

import argparse
import gzip
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import count, islice
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig

from benchmarks.gpu_kernels import DTYPES
from benchmarks.gpu_results import Figures, print_figures, read_figures
from experiment.errors import UserError
from experiment.files import cache_folder
from experiment.process.hardware import peak_flops, peak_memory
from launcher.hosts.machine import free_port
from pretrain.batching.batch import RankBatch
from pretrain.batching.batch_maker import BatchMaker, MaskedCorpus
from pretrain.batching.masking import Masker
from pretrain.batching.order import BatchSizes, CorpusStream, ShuffledOrder
from pretrain.batching.packing import MicrobatchLayout
from pretrain.batching.sequences import SequenceIndex, split_documents
from pretrain.batching.vocabulary import Vocabulary
from pretrain.config import MaskingConfig, ModelConfig
from pretrain.corpus.reader import Corpus
from pretrain.engine.deepspeed_settings import load_settings
from pretrain.engine.engine import Engine
from pretrain.engine.process_group import connect, disconnect
from pretrain.modeling.build import BuiltModel, build_model, choose_row_kind
from pretrain.modeling.compiled_layers import compile_layers
from pretrain.modeling.masked_lm import MaskedLanguageModel
from pretrain.optimizer_config import OptimizerConfig
from pretrain.training.profiler import PROFILED, SKIPPED, StepProfiler
from pretrain.world import World

_BERT = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 1024}
MODELS: dict[str, dict[str, Any]] = {
    "bert-base": _BERT,
    "bert-large": _BERT
    | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "modernbert-base": {"model_type": "modernbert"},  # the defaults of transformers, with 50,368 tokens
}
_TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 200,
    "pad_token_id": 0,
}
_MASKED = {"bert": 0.15, "modernbert": 0.3}
_DOCUMENTS, _MEDIAN_LENGTH, _LENGTH_SPREAD = 20_000, 250.0, 1.2  # log-normal, in tokens
_SPECIAL = 5  # ids 0 to 4: padding, unknown, and those around a text
_FILL = {"flat": 0.97, "packed": 0.9, "padded": 0.5}  # of the slots, about
_SHORTEST = 8  # length of the longest sequence; special tokens would be a large part of less
_BATCHES = 4
_WARMUP, _WARMUP_SECONDS = 5, 3.0  # the first steps, which compile, and about the seconds after them
_ROUNDS, _STEPS = 5, 20
_COMPILED_LAYERS = 7  # enough for all graphs: the first and last layers of ModernBERT, local and global attention
_TOKENS = 65_536  # slots of a microbatch; a step has one
_NAME = re.compile(rf"({'|'.join(MODELS)})-(\d+)-(bf16|fp16)-zero([123])-(compiled|eager)")


@dataclass(frozen=True)
class TrainingCase:
    """A training run to measure."""

    model: str  # of MODELS
    length: int  # of the longest sequence, in tokens
    precision: str
    zero_stage: int
    compile: bool
    tiny: bool = False  # a tiny model of the same type
    layers: int | None = None  # the first ones only, which have all kinds of layers

    @property
    def name(self) -> str:
        layers = "compiled" if self.compile else "eager"
        return f"{self.model}-{self.length}-{self.precision}-zero{self.zero_stage}-{layers}"


@dataclass(frozen=True)
class TrainingResult:
    """Measurements of a round of a training run, or an error."""

    case: str
    device: str = ""
    tokens_per_second: float | None = None
    mfu: float | None = None  # None: the device's peak is unknown
    step_ms: float | None = None
    memory: int | None = None  # peak, in bytes
    fill: float | None = None  # real tokens per slot
    error: str = ""
    warnings: tuple[str, ...] = ()  # of the run, such as that layers are not compiled


def parse_case(name: str, tiny: bool = False, layers: int | None = None) -> TrainingCase:
    """Raises UserError if there is no such case, or if it does not fit the model."""
    match = _NAME.fullmatch(name)
    if match is None:
        example = "bert-base-512-bf16-zero1-compiled"
        raise UserError(f"no case '{name}'; expected one like {example}, with a model of {', '.join(MODELS)}")
    model, length, precision, stage, compiled = match.groups()
    longest = AutoConfig.for_model(**MODELS[model]).max_position_embeddings
    if not _SHORTEST <= int(length) <= longest:
        raise UserError(f"case '{name}': expected a length from {_SHORTEST} to {longest:,} tokens")
    return TrainingCase(model, int(length), precision, int(stage), compiled == "compiled", tiny, layers)


class _RandomCorpus:
    """Stands for an open corpus."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._draw = np.random.default_rng(0)

    def read(self, _starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int32]:
        return self._draw.integers(_SPECIAL, self._vocabulary, int(lengths.sum()), dtype=np.int32)


class _Warnings(logging.StreamHandler[TextIO]):
    """Prints warnings, as logging does without a handler, and keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.setLevel(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        super().emit(record)


def run(case: TrainingCase, profile: Path | None = None) -> list[TrainingResult]:
    """Train and measure several rounds. `profile`: a folder for a profile of some further steps."""
    world = connect(timedelta(seconds=60), _give_up)
    logger, warnings = logging.getLogger("pretrain"), _Warnings()
    logger.addHandler(warnings)
    try:
        built, engine = _build(case, world)
        with closing(engine):
            results = _measure(case, built, engine, profile)
    except torch.cuda.OutOfMemoryError:
        results = [TrainingResult(case.name, error="out of memory")]
    finally:
        logger.removeHandler(warnings)
        disconnect()
    return [replace(result, warnings=tuple(warnings.lines)) for result in results]


def compile_cases(names: Sequence[str], tiny: bool = False) -> int:
    """Run the first layers of each case in a process of its own, all at once. Returns 1 if one failed, else 0."""
    command = [sys.executable, "-m", "benchmarks.gpu_training", "--layers", str(_COMPILED_LAYERS)]
    command += ["--tiny"] if tiny else []
    processes = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in names]
    failed = False
    for name, process in zip(names, processes, strict=True):
        output, _ = process.communicate()
        error = _compile_error(list(read_figures(output))[-1]) if process.returncode == 0 else "failed"
        print(f"{name}: {error or 'compiled'}", flush=True)
        print_figures({"case": name, "error": error})
        failed |= bool(error)
    return int(failed)


def _compile_error(figures: Figures) -> str:
    return str(figures["error"]) or next((line for line in figures["warnings"] if "without torch.compile" in line), "")


def _give_up(message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def _build(case: TrainingCase, world: World) -> tuple[BuiltModel, Engine]:
    fields = MODELS[case.model] | (_TINY if case.tiny else {})
    if case.layers is not None:
        fields |= {"num_hidden_layers": case.layers}
    settings = ModelConfig(config=fields)
    built = build_model(settings, AutoConfig.for_model(**fields), seed=1)
    module = MaskedLanguageModel(built.model, case.length)
    compiled = compile_layers(module, cache_folder() / "compiled") if case.compile else ()
    engine = Engine(
        module,
        load_settings(f"ds_configs/{case.precision}_zero{case.zero_stage}.json"),
        OptimizerConfig(),
        settings,
        seed=1,
        world=world,
        compiled=compiled,
    )
    return built, engine


def _measure(case: TrainingCase, built: BuiltModel, engine: Engine, profile: Path | None) -> list[TrainingResult]:
    batches = make_batches(case, built, pinned=engine.device.type == "cuda")
    steps, warmup = (2, 1) if case.tiny else (_STEPS, _WARMUP)
    rounds, left = (1, 0.0) if case.tiny or case.layers is not None else (_ROUNDS, _WARMUP_SECONDS)
    _train(engine, batches, 0, warmup)
    step = warmup
    while left > 0:
        left -= _train(engine, batches, step, warmup)
        step += warmup
    results = []
    for first in range(step, step + rounds * steps, steps):
        seconds = _train(engine, batches, first, steps)
        timed = [batches[number % len(batches)] for number in range(first, first + steps)]
        results.append(_result(case, built, timed, seconds, engine.device))
    if profile is not None:
        _profile(engine, batches, profile)
    return results


def _result(
    case: TrainingCase, built: BuiltModel, timed: Sequence[RankBatch], seconds: float, device: torch.device
) -> TrainingResult:
    tokens = sum(batch.tokens for batch in timed)
    slots = sum(microbatch.input_ids.numel() for batch in timed for microbatch in batch.microbatches)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    peak = peak_flops(name, case.precision) if on_gpu else None
    assert built.flops is not None
    flops = sum(built.flops.per_step(batch.tokens, batch.squared_lengths, batch.masked_tokens) for batch in timed)
    return TrainingResult(
        case.name,
        name,
        tokens_per_second=tokens / seconds,
        mfu=None if peak is None else flops / seconds / peak,
        step_ms=1000 * seconds / len(timed),
        memory=peak_memory(),
        fill=tokens / slots,
    )


def _profile(engine: Engine, batches: list[RankBatch], folder: Path) -> None:
    """Write profile.txt, profile.json and a compressed trace."""
    folder.mkdir(parents=True, exist_ok=True)
    profiler = StepProfiler(folder)
    _train(engine, batches, 0, SKIPPED + PROFILED, profiler.step)
    profiler.close()
    trace = folder / "trace.json"
    with trace.open("rb") as source, gzip.open(folder / "trace.json.gz", "wb") as target:
        shutil.copyfileobj(source, target)
    trace.unlink()


def make_batches(case: TrainingCase, built: BuiltModel, pinned: bool) -> list[RankBatch]:
    """Return a few batches of one microbatch each: a batch whose sequences do not fit into one is left out."""
    config = built.model.config
    special = np.zeros(config.vocab_size, dtype=np.bool_)
    special[:_SPECIAL] = True
    tokens = 4 * case.length if case.tiny else _TOKENS
    vocabulary = Vocabulary((2,), (3,), config.pad_token_id or 0, 4, special, np.arange(_SPECIAL, config.vocab_size))
    kind = choose_row_kind(built, DTYPES[case.precision])
    index = _draw_index(case.length - vocabulary.num_special_tokens)
    corpus = cast(Corpus, _RandomCorpus(config.vocab_size))
    masker = Masker(vocabulary, MaskingConfig(rate=_MASKED[config.model_type]), seed=1, corpus="random")
    mean = index.starts[-1] / len(index) + vocabulary.num_special_tokens
    maker = BatchMaker(
        (MaskedCorpus(corpus, index, masker),),
        ShuffledOrder((CorpusStream(len(index), seed=1),), BatchSizes(max(1, int(_FILL[kind] * tokens / mean)))),
        vocabulary,
        MicrobatchLayout(case.length, tokens, kind, built.first_position),
    )
    whole = (batch for batch in map(maker.__getitem__, count()) if len(batch.microbatches) == 1)
    batches = list(islice(whole, _BATCHES))
    return [_pin(batch) for batch in batches] if pinned else batches


def _draw_index(capacity: int) -> SequenceIndex:
    documents = np.random.default_rng(0).lognormal(np.log(_MEDIAN_LENGTH), _LENGTH_SPREAD, _DOCUMENTS).astype(np.int64)
    lengths = split_documents(documents + 1, capacity)
    return SequenceIndex(np.concatenate([[0], np.cumsum(lengths)]))


def _pin(batch: RankBatch) -> RankBatch:
    pinned = [type(one)(*(tensor.pin_memory() for tensor in one)) for one in batch.microbatches]
    return batch._replace(microbatches=pinned)


def _train(
    engine: Engine, batches: list[RankBatch], first: int, steps: int, after_step: Callable[[], object] = lambda: None
) -> float:
    """Return seconds that these steps of one microbatch take. As in `Trainer`, the host may read a norm one step
    later."""
    _wait(engine.device)
    start = time.perf_counter()
    before = None
    for step in range(first, first + steps):
        batch = batches[step % len(batches)]
        engine.begin_step(step, 1e-4)
        (microbatch,) = batch.microbatches
        engine.accumulate(microbatch, batch.masked_tokens, step, 0)
        if before is not None:
            before.wait()
        before = engine.step()
        after_step()
    assert before is not None
    before.wait()
    _wait(engine.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_training", description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="+", metavar="case", help="MODEL-LENGTH-PRECISION-zeroSTAGE-compiled, or -eager")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="folder for a profile of some further steps")
    parser.add_argument("--compile", action="store_true", help="fill the cache of compiled layers, all cases at once")
    parser.add_argument("--layers", type=int, metavar="N", help="the first ones only")
    parser.add_argument("--tiny", action="store_true", help="a tiny model of the same type")
    given = parser.parse_args(argv)
    try:
        cases = [parse_case(name, given.tiny, given.layers) for name in given.cases]
    except UserError as error:
        parser.error(str(error))
    if given.layers is not None and given.layers < 1:
        parser.error(f"--layers: expected at least 1, found {given.layers}")
    if given.compile:
        return compile_cases(given.cases, given.tiny)
    if len(cases) > 1:
        parser.error(f"expected one case without --compile, found {len(cases)}")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for result in run(cases[0], given.profile):
        print_figures(asdict(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
