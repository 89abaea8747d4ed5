"""Attention with query, key and value in one tensor computes what the model's own does, in Triton's interpreter."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from pretrain.modeling.attention import PACKED, Packing, VarlenKernels, register_packed_attention
from pretrain.modeling.fused_modules import use_fused_modules
from pretrain.world import World
from rank_pool import RankPool
from runs import sampled

pytest.importorskip("triton")

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "pad_token_id": 0,
}
TYPES = (
    "bert",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "modernbert",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
)
LENGTHS = (70, 30)


def compare(_: World, model_type: str) -> tuple[list[str], int]:
    """The gradients that differ with and without joint projections, and how often these were used."""
    from pretrain.modeling.varlen_attention import joint_attention, varlen_attention

    register_packed_attention()
    changes: dict[str, Any] = {"local_attention": 16, "global_attn_every_n_layers": 2, "layer_types": None}
    config = AutoConfig.for_model(model_type, **SHAPE, **(changes if model_type == "modernbert" else {}))
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config).half().eval()
    model.set_attn_implementation(PACKED)
    used = []

    def attend_jointly(*inputs: Any) -> torch.Tensor:
        used.append(inputs)
        return joint_attention(*inputs)

    slots = sum(LENGTHS)
    ids = torch.randint(1, 50, (1, slots))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None] + 2
    segments = torch.repeat_interleave(torch.tensor([1, 2]), torch.tensor(LENGTHS))[None]
    bounds = torch.tensor([0, LENGTHS[0], slots], dtype=torch.int32)
    kernels = VarlenKernels(varlen_attention, attend_jointly)
    results = []
    for jointly in (False, True):
        if jointly:
            use_fused_modules(model)
        packing = Packing(segments, bounds, max(LENGTHS), varlen=kernels)
        packing.capability = (9, 0)
        logits = model(input_ids=ids, position_ids=positions, packing=packing).logits
        model.zero_grad()
        logits.float().square().sum().backward()
        results.append(
            {"logits": logits.detach()}
            | {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        )
    expected, found = results
    assert expected.keys() == found.keys()
    # Softmax does not depend on a bias of keys, so its gradient is noise.
    names = [name for name in expected if not name.endswith("key.bias")]
    return [name for name in names if (found[name] - expected[name]).norm() > 0.02 * expected[name].norm()], len(used)


@pytest.mark.parametrize("model_type", sampled(TYPES, ["bert", "modernbert", "roberta"]))
def test_attention_is_that_of_the_model(interpreting_pools: dict[int, RankPool], model_type: str) -> None:
    """Catches a type of model whose attention does something else, and one that is not recognized."""
    ((different, used),) = interpreting_pools[1].run(compare, model_type)
    assert not different
    assert used == SHAPE["num_hidden_layers"]
