"""Modules that compute parts together compute what the model's own do, in Triton's interpreter."""

import itertools
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from pretrain.modeling import fused_modules
from pretrain.modeling.attention import Packing, Predicted, VarlenKernels, use_packed_attention
from pretrain.modeling.fused_modules import use_fused_modules
from pretrain.modeling.last_layer import shorten_last_layer
from pretrain.world import World
from rank_pool import RankPool
from runs import sampled

pytest.importorskip("triton")

LAYERS = 2
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "pad_token_id": 0,
}
ATTENTION_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.2}
MODERNBERT = {"attention_dropout": 0.2, "local_attention": 8, "global_attn_every_n_layers": 2, "layer_types": None}
LIKE_BERT = ("bert", "camembert", "data2vec-text", "electra", "ernie", "roberta", "xlm-roberta")
# The last layer runs the model's own `forward`, twice.
MODERNBERT_NORMS = {"norm_beside_residual": 2 * (LAYERS - 1) - 1}  # none before attention in the first layer
BERT_NORMS = {"dropout_add_norm": 2 * LAYERS}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    # type of model, changes of its config, uses of kernels but those of attention
    **{name: (name, ATTENTION_DROPOUT, {"bias_gelu": LAYERS} | BERT_NORMS) for name in LIKE_BERT},
    "xlm-roberta-xl": ("xlm-roberta-xl", ATTENTION_DROPOUT, {"bias_gelu": LAYERS}),
    "roberta-prelayernorm": ("roberta-prelayernorm", ATTENTION_DROPOUT, {}),
    "modernbert": ("modernbert", MODERNBERT, MODERNBERT_NORMS),
    "modernbert with biases": (
        "modernbert",
        MODERNBERT | {"attention_bias": True, "norm_bias": True},
        MODERNBERT_NORMS,
    ),
    "chunks": ("bert", ATTENTION_DROPOUT | {"chunk_size_feed_forward": 4}, {"bias_gelu": LAYERS} | BERT_NORMS),
    "another activation": ("bert", ATTENTION_DROPOUT | {"hidden_act": "gelu_new"}, BERT_NORMS),
}
LENGTHS = (20, 8)  # a multiple of the chunks


def build(model_type: str, changes: dict[str, Any]) -> Any:
    """With a last layer that computes predicted positions only."""
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **SHAPE, **changes))
    use_packed_attention(model)
    assert shorten_last_layer(model) is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms that do something
    return model.half()


def is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found.double() - expected.double()).norm()) <= 0.02 * float(expected.double().norm())


def run(model: Any) -> torch.Tensor:
    """Logits by kernels of our own."""
    from pretrain.modeling import varlen_attention

    slots = sum(LENGTHS)
    ids = torch.randint(1, 50, (1, slots), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None] + 2
    segments = torch.repeat_interleave(torch.tensor([1, 2]), torch.tensor(LENGTHS))[None]
    bounds = torch.tensor([0, LENGTHS[0], slots], dtype=torch.int32)
    predicted = Predicted(torch.tensor([3, 18, 21, 27]), torch.empty(1, 0, dtype=torch.long), torch.arange(4))
    kernels = VarlenKernels(varlen_attention.varlen_attention, varlen_attention.varlen_qkv_attention)
    packing = Packing(segments, bounds, max(LENGTHS), predicted, kernels)
    packing.capability = (9, 0)
    logits: torch.Tensor = model(input_ids=ids, position_ids=positions, packing=packing).logits
    return logits


def compare(_: World, model_type: str, changes: dict[str, Any], training: bool) -> tuple[list[str], dict[str, int]]:
    """The logits, and in training the gradients, that differ with and without fused modules, and how often qkv
    attention, the kernel for bias and GELU, and the one for norms were used."""
    from pretrain.modeling import bias_gelu, fused_norm, varlen_attention

    model = build(model_type, changes).train(training)
    used = {"varlen_qkv_attention": 0, "bias_gelu": 0, "dropout_add_norm": 0, "norm_beside_residual": 0}

    def counted(module: Any, name: str) -> Any:
        function = getattr(module, name)

        def call(*inputs: Any) -> Any:
            used[name] += 1
            return function(*inputs)

        return call

    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_modules, "is_compiled_in_16_bit", lambda _: True)
        patch.setattr(fused_norm, "_PROGRAMS", 3)  # the interpreter takes milliseconds for each
        for module, name in (
            (varlen_attention, "varlen_qkv_attention"),
            (bias_gelu, "bias_gelu"),
            (fused_norm, "dropout_add_norm"),
            (fused_norm, "norm_beside_residual"),
        ):
            patch.setattr(module, name, counted(module, name))
        for fused in (False, True):
            if fused:
                use_fused_modules(model)
            torch.manual_seed(1)  # the same masks of dropout
            logits = run(model)
            model.zero_grad()
            if training:
                logits.float().square().sum().backward()
            gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
            results.append({"logits": logits.detach()} | gradients)
    expected, found = results
    assert expected.keys() == found.keys()
    # Softmax does not depend on a bias of keys, so its gradient is noise.
    names = [name for name in expected if not name.endswith("key.bias")]
    different = [name for name in names if not is_close(found[name], expected[name])]
    return different, used


@pytest.mark.parametrize(
    ("case", "training"),
    sampled(
        itertools.product(CASES, (False, True)),
        [
            *(("bert", False), ("bert", True), ("modernbert", False), ("modernbert", True)),
            *(("roberta-prelayernorm", True), ("another activation", True)),
        ],
    ),
)
def test_modules_compute_what_those_of_the_model_do(
    interpreting_pools: dict[int, RankPool], case: str, training: bool
) -> None:
    """Catches a type of model whose modules do something else, one that is not recognized, and attention dropout in
    evaluation or none in training."""
    model_type, changes, kernels = CASES[case]
    used = {"varlen_qkv_attention": LAYERS, "bias_gelu": 0, "dropout_add_norm": 0, "norm_beside_residual": 0} | kernels
    assert interpreting_pools[1].run(compare, model_type, changes, training) == [([], used)]


def used_dropout(_: World, training: bool) -> set[float]:
    """The dropout before norms, of a model with 0.25."""
    from pretrain.modeling import fused_norm

    model = build("bert", {"hidden_dropout_prob": 0.25, "attention_probs_dropout_prob": 0.0}).train(training)
    use_fused_modules(model)
    used = set()
    function = fused_norm.dropout_add_norm

    def recorded(values: torch.Tensor, bias: torch.Tensor, dropout: float, *others: Any) -> tuple[torch.Tensor, ...]:
        used.add(dropout)
        return function(values, bias, dropout, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_modules, "is_compiled_in_16_bit", lambda _: True)
        patch.setattr(fused_norm, "dropout_add_norm", recorded)
        run(model)
    return used


@pytest.mark.parametrize(("training", "dropout"), [(False, 0.0), (True, 0.25)])
def test_dropout_before_norms(interpreting_pools: dict[int, RankPool], training: bool, dropout: float) -> None:
    """Catches dropout in evaluation, and none in training."""
    assert interpreting_pools[1].run(used_dropout, training) == [{dropout}]
