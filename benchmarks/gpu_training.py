"""Training steps of one model at one length, precision and ZeRO stage: a case of `benchmarks.gpu`.

Runs in a process of its own, whose peak memory it reports, and prints one JSON object. It uses the engine, model and
batches of `deepcloze pretrain`; tokens are random, and documents are about as long as in Wikipedia.
"""

import json
import os
import sys
import time
from contextlib import closing
from dataclasses import asdict
from datetime import timedelta
from typing import NoReturn, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig

from benchmarks.gpu import MODELS, TrainingCase, TrainingResult
from benchmarks.gpu_kernels import DTYPES
from experiment.files import cache_folder
from experiment.hardware import peak_flops, peak_memory
from pretrain.batching.batch import RankBatch
from pretrain.batching.batch_maker import BatchMaker, MaskedCorpus
from pretrain.batching.batch_sizes import BatchSizes
from pretrain.batching.masking import Masker, MaskingPolicy
from pretrain.batching.order import CorpusStream, ShuffledOrder
from pretrain.batching.packing import MicrobatchLayout
from pretrain.batching.sequences import SequenceIndex, split_documents
from pretrain.batching.vocabulary import Vocabulary
from pretrain.config import ModelConfig, OptimizerConfig
from pretrain.corpus.reader import Corpus
from pretrain.engine.deepspeed_settings import load_settings
from pretrain.engine.engine import Engine
from pretrain.engine.process_group import connect, disconnect
from pretrain.modeling.build import BuiltModel, build_model, choose_rows
from pretrain.modeling.compiled_layers import compile_layers
from pretrain.modeling.masked_lm import MaskedLanguageModel
from pretrain.world import World

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
_FILL = {"flat": 0.97, "windows": 0.9, "padded": 0.5}  # of the slots, about, so that a step needs no second microbatch
_BATCHES = 4


class _RandomCorpus:
    """Stands for an open corpus."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._draw = np.random.default_rng(0)

    def read(self, _starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int32]:
        return self._draw.integers(_SPECIAL, self._vocabulary, int(lengths.sum()), dtype=np.int32)


def run(case: TrainingCase) -> TrainingResult:
    """Train and measure."""
    world = connect(timedelta(seconds=60), _give_up)
    try:
        built, engine = _build(case, world)
        with closing(engine):
            return _measure(case, built, engine)
    except torch.cuda.OutOfMemoryError:
        return TrainingResult(error="out of memory")
    finally:
        disconnect()


def _give_up(message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def _build(case: TrainingCase, world: World) -> tuple[BuiltModel, Engine]:
    fields = MODELS[case.model] | (_TINY if case.tiny else {})
    settings = ModelConfig(config=fields)
    built = build_model(settings, AutoConfig.for_model(**fields), seed=1)
    module = MaskedLanguageModel(built.model, built.packed, case.length)
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


def _measure(case: TrainingCase, built: BuiltModel, engine: Engine) -> TrainingResult:
    batches = make_batches(case, built, pinned=engine.device.type == "cuda")
    _train(engine, batches, 0, case.warmup)
    seconds = _train(engine, batches, case.warmup, case.steps)
    timed = [batches[step % len(batches)] for step in range(case.warmup, case.warmup + case.steps)]
    tokens = sum(batch.tokens for batch in timed)
    slots = sum(microbatch.input_ids.numel() for batch in timed for microbatch in batch.microbatches)
    on_gpu = engine.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    peak = peak_flops(device, case.precision) if on_gpu else None
    assert built.flops is not None
    flops = sum(built.flops.per_step(batch.tokens, batch.squared_lengths, batch.masked_tokens) for batch in timed)
    return TrainingResult(
        device=device,
        tokens_per_second=tokens / seconds,
        mfu=None if peak is None else flops / seconds / peak,
        step_ms=1000 * seconds / case.steps,
        memory=peak_memory(),
        fill=tokens / slots,
    )


def make_batches(case: TrainingCase, built: BuiltModel, pinned: bool) -> list[RankBatch]:
    """A few batches of one microbatch each."""
    config = built.model.config
    special = np.zeros(config.vocab_size, dtype=np.bool_)
    special[:_SPECIAL] = True
    vocabulary = Vocabulary((2,), (3,), config.pad_token_id or 0, 4, special, np.arange(_SPECIAL, config.vocab_size))
    rows = choose_rows(built, DTYPES[case.precision])
    index = _draw_index(case.length - vocabulary.num_special_tokens)
    corpus = cast(Corpus, _RandomCorpus(config.vocab_size))
    masker = Masker(vocabulary, MaskingPolicy(_MASKED[config.model_type], 0.8, 0.1), seed=1, corpus="random")
    mean = index.starts[-1] / len(index) + vocabulary.num_special_tokens
    maker = BatchMaker(
        (MaskedCorpus(corpus, index, masker),),
        ShuffledOrder(
            (CorpusStream(len(index), seed=1),), BatchSizes(max(1, int(_FILL[rows] * case.microbatch_tokens / mean)))
        ),
        vocabulary,
        MicrobatchLayout(case.length, case.microbatch_tokens, rows, built.first_position),
    )
    batches = [maker[step] for step in range(_BATCHES)]
    return [_pin(batch) for batch in batches] if pinned else batches


def _draw_index(capacity: int) -> SequenceIndex:
    documents = np.random.default_rng(0).lognormal(np.log(_MEDIAN_LENGTH), _LENGTH_SPREAD, _DOCUMENTS).astype(np.int64)
    lengths = split_documents(documents + 1, capacity)
    return SequenceIndex(np.concatenate([[0], np.cumsum(lengths)]))


def _pin(batch: RankBatch) -> RankBatch:
    pinned = [type(one)(*(tensor.pin_memory() for tensor in one)) for one in batch.microbatches]
    return batch._replace(microbatches=pinned)


def _train(engine: Engine, batches: list[RankBatch], first: int, steps: int) -> float:
    """Seconds that these steps take."""
    _wait(engine.device)
    start = time.perf_counter()
    for step in range(first, first + steps):
        batch = batches[step % len(batches)]
        engine.begin_step(step, 1e-4)
        for number, microbatch in enumerate(batch.microbatches):
            engine.accumulate(microbatch, batch.masked_tokens, step, number)
        engine.step()
    _wait(engine.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    print(json.dumps(asdict(run(TrainingCase(**json.loads(sys.argv[1]))))), flush=True)
