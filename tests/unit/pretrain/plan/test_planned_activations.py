"""The memory of a microbatch on the meta device."""

import itertools
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from pretrain.batching.packing import MicrobatchLayout
from pretrain.modeling import attention
from pretrain.modeling.random_model import meta_model
from pretrain.plan.activations import (
    Computation,
    MicrobatchMemory,
    MicrobatchShape,
    microbatch_memory,
)
from runs import sampled

SHAPE = MicrobatchShape(rows=4, width=32, predicted=64, sequences=9)
FP32 = Computation(torch.float32, "packed", on_gpu=False, checkpointed=False)
VOCABULARY = 300


def bert(layers: int = 2, model_type: str = "bert", dropout: float = 0.1) -> PreTrainedConfig:
    return AutoConfig.for_model(
        model_type,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        attention_probs_dropout_prob=dropout,
        hidden_dropout_prob=dropout,
    )


def memory(
    computation: Computation = FP32, shape: MicrobatchShape = SHAPE, config: PreTrainedConfig | None = None
) -> MicrobatchMemory:
    return microbatch_memory(meta_model(config or bert()), shape, computation)


def test_a_linear_model_is_counted_byte_by_byte() -> None:
    """Catches tensors that are missed or counted twice: a layer more is what the layer keeps for the backward pass.

    In fp32 without dropout a BERT layer keeps, per token and hidden unit: the inputs of query, key and value (one
    tensor) and their copies per head (3), the scaled query's, the attention's output twice (by head, and as a row), two
    sums and two normalised tensors less the one that is the input of the next layer; the MLP keeps two of 4 times the
    size (here twice); and scores, before and after the softmax.
    """
    more, fewer = (memory(config=bert(layers, dropout=0.0)).activations for layers in (2, 1))
    tokens, hidden = SHAPE.rows * SHAPE.width, 32
    scores = 4 * SHAPE.rows * SHAPE.width**2  # heads
    assert (more - fewer) / 4 / tokens == pytest.approx((9 * hidden + 2 * 64 + scores / tokens), rel=0.15)


@pytest.mark.parametrize(("on_gpu", "columns"), [(True, 320), (False, VOCABULARY)])
def test_logits_are_tensors_of_the_predicted_positions(on_gpu: bool, columns: int) -> None:
    """Catches logits of every position, and copies of them: at the highest use there is one tensor of logits, which
    become their gradients, on a GPU with aligned rows."""
    wide = replace(SHAPE, predicted=8192)
    assert memory(replace(FP32, on_gpu=on_gpu), wide, bert(1)).logits == 8192 * columns * 4


def test_a_gpu_computes_logits_in_chunks() -> None:
    """Catches a plan in which memory for logits grows with the microbatch, by gigabytes for large vocabularies."""
    gpu, large = replace(FP32, on_gpu=True), bert(1)
    large.vocab_size = 30_522
    logits = [memory(gpu, replace(SHAPE, predicted=count), large).logits for count in (8704, 20_000)]
    assert logits == [8704 * 30_528 * 4] * 2


@pytest.mark.parametrize("on_gpu", [False, True])
def test_memory_falls_with_what_saves_memory(on_gpu: bool) -> None:
    """Catches settings that have no effect or the wrong one."""
    computation = replace(FP32, on_gpu=on_gpu)
    full = memory(computation).activations
    assert memory(replace(computation, dtype=torch.bfloat16)).activations < 0.7 * full
    deep, checkpointed = (
        memory(each, config=bert(3)) for each in (computation, replace(computation, checkpointed=True))
    )
    assert checkpointed.activations < 0.6 * deep.activations
    more, twice = (memory(computation, replace(SHAPE, rows=rows)).activations for rows in (16, 32))
    assert twice == pytest.approx(2 * more, rel=0.1)
    assert memory(computation, config=bert(1)).activations < full


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_keeps_masks_of_a_byte(dtype: torch.dtype) -> None:
    """Catches masks that are missed, as wide as the tensor, as on a CPU, or of attention. A layer of BERT has two."""
    gpu = replace(FP32, on_gpu=True, dtype=dtype)
    with_masks, without = (
        memory(gpu, config=bert(2, dropout=dropout)).activations
        - memory(gpu, config=bert(1, dropout=dropout)).activations
        for dropout in (0.1, 0.0)
    )
    assert with_masks - without == 2 * SHAPE.rows * SHAPE.width * 32


def test_a_gpu_keeps_no_scores() -> None:
    """Catches a GPU that is planned with the attention of a CPU, and flat rows with masks for each pair of slots."""
    long = MicrobatchShape(rows=1, width=512, predicted=64, sequences=1)
    assert memory(replace(FP32, on_gpu=True), long).activations < 0.3 * memory(FP32, long).activations
    flat = replace(FP32, on_gpu=True, kind="flat")
    wide, twice = (memory(flat, replace(SHAPE, rows=1, width=width)).activations for width in (8192, 16384))
    assert twice == pytest.approx(2 * wide, rel=0.1)


def test_planning_uses_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches kernels that are tried on a GPU of this machine, which `deepcloze plan` must leave to other programs."""
    config = AutoConfig.for_model(
        "modernbert",
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=60_000,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(attention, "_tried_varlen_kernels", lambda *_: pytest.fail("a kernel is tried"))
    computation = Computation(torch.bfloat16, "flat", on_gpu=True, checkpointed=False)
    assert memory(computation, replace(SHAPE, rows=1), config).total > 0


def test_gradients_that_stay_are_counted_once() -> None:
    """Catches gradients that are missed, or counted as activations, when a step has several microbatches."""
    parameters = sum(parameter.numel() for parameter in meta_model(bert()).parameters())
    moved, stay = memory(), memory(replace(FP32, gradients_stay=True, accumulates=True))
    assert stay.gradients == 4 * parameters
    assert stay.activations == pytest.approx(moved.activations, rel=0.1)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("position_buckets", [256, -1])
def test_narrow_rows_take_no_more_memory_than_wide_ones(position_buckets: int, on_gpu: bool) -> None:
    """Catches microbatches of short sequences with so many rows that a run ends in the middle for lack of memory:
    DeBERTa repeats its relative positions for each row."""
    config = bert(1, "deberta-v2", dropout=0.0)
    config.relative_attention, config.pos_att_type = True, ["p2c", "c2p"]
    config.share_att_key, config.position_buckets = True, position_buckets
    layout = MicrobatchLayout(128, 4096, "padded")
    computation = Computation(torch.bfloat16, "padded", on_gpu, checkpointed=False)
    widest, *narrow = (
        memory(computation, replace(SHAPE, rows=layout.padded_rows(width), width=width), config).total
        for width in (128, 64, 16)
    )
    assert max(narrow) <= widest


def test_a_model_whose_text_has_a_config_of_its_own() -> None:
    """Catches a traceback, and logits that are not found, because the vocabulary is not in the model's own config."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text = sizes | {"model_type": "modernbert", "vocab_size": 60_000}
    vision = sizes | {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 16}
    config = AutoConfig.for_model("modernvbert", text_config=text, vision_config=vision)
    assert memory(config=config).logits == 4 * SHAPE.predicted * 60_000


PACKED = ["bert", "roberta", "electra", "modernbert"]
PADDED = ["deberta-v2", "layoutlm", "megatron-bert", "roformer"]
# One computation for each type, alternately. RoBERTa has the layers of BERT, with which the tests above compute.
SAMPLE = [
    (model_type, computation, computation)
    for model_type, computation in zip([*PACKED[2:], *PADDED], itertools.cycle([False, True]), strict=False)
]


@pytest.mark.parametrize(
    ("model_type", "on_gpu", "checkpointed"),
    sampled(itertools.product([*PACKED, *PADDED], [False, True], [False, True]), SAMPLE),
)
def test_several_architectures_run_on_the_meta_device(model_type: str, on_gpu: bool, checkpointed: bool) -> None:
    """Catches an architecture that the plan cannot compute, or whose head it does not fuse, as training does."""
    config = AutoConfig.for_model(
        model_type,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=60_000,
        pad_token_id=0,
    )
    found = memory(
        Computation(torch.bfloat16, "padded" if model_type in PADDED else "packed", on_gpu, checkpointed),
        config=config,
    )
    assert found.total > 0
    assert found.logits <= 64 * 60_032 * 2
