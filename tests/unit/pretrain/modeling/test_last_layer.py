"""The last layer computes predicted positions only. That losses and gradients are the same is tested in
`test_packed_models.py`, and for compiled layers in `test_compiled_layers.py`."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_examples import PACKED, Example
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from pretrain.batching.batch import Microbatch
from pretrain.modeling.last_layer import shorten_last_layer
from pretrain.modeling.masked_lm import MaskedLanguageModel
from pretrain.modeling.packability import ignores_padding, packed_inputs, same_logits, why_not_packed
from pretrain.modeling.random_model import meta_model, random_model
from pretrain.modeling.structure import encoder_layers


def rows_of_linear_layers(model: PreTrainedModel) -> dict[str, set[int]]:
    """By name, how many rows each linear layer of the encoder is given from now on."""
    rows: dict[str, set[int]] = {}
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Linear):
            count = rows.setdefault(name, set())
            module.register_forward_hook(
                lambda _module, inputs, _output, count=count: count.add(inputs[0][..., 0].numel())
            )
    return rows


@pytest.mark.parametrize("model_type", PACKED)
def test_the_last_layer_computes_predicted_positions_after_attention(
    example: Callable[[str], Example], model_type: str
) -> None:
    """Catches a type of model for which the last layer computes all positions, and another layer that does not."""
    case = example(model_type)
    module = MaskedLanguageModel(copy.deepcopy(case.built.model)).train()
    rows = rows_of_linear_layers(module.model)
    microbatch = case.microbatches[0]
    module(*microbatch)
    slots, predicted = microbatch.input_ids.numel(), len(microbatch.labels)
    assert predicted < slots
    last = encoder_layers(module.model)[-1]
    inside = {name for name, part in module.model.base_model.named_modules() if part in set(last.modules())}
    assert {frozenset(found) for name, found in rows.items() if name not in inside} == {frozenset({slots})}
    counts = [frozenset(found) for name, found in rows.items() if name in inside]
    assert set(counts) == {frozenset({predicted}), frozenset({predicted, slots})}
    assert counts.count(frozenset({predicted})) >= 2, "the feed-forward part"


def tiny(model_type: str, **fields: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    defaults = {"vocab_size": 101, "pad_token_id": 0}
    model = random_model(AutoConfig.for_model(model_type, **defaults | sizes | fields)).float()
    assert why_not_packed(model) is None
    return model


@pytest.mark.parametrize("scale", [1e-4, 1e6])
def test_sequences_that_mix_are_found_in_logits_of_any_size(scale: float) -> None:
    """Catches large logits, whose rounding is large too, that train padded, and small ones whose sequences mix."""
    model = with_scaled_logits(tiny("bert", vocab_size=2000, tie_word_embeddings=False), scale)
    for mixes in (False, True):
        assert (why_not_packed(model) == "packed sequences would get other logits") == mixes
        model.set_attn_implementation("sdpa")
        assert ignores_padding(model) != mixes
        model.base_model.embeddings.register_forward_hook(
            lambda _module, _inputs, output: output + 0.1 * output.mean(dim=1, keepdim=True)
        )


@pytest.mark.parametrize("bias", [-math.inf, -1e4])
def test_rows_of_the_vocabulary_without_a_token_may_have_any_logits(bias: float) -> None:
    """Catches infinite logits taken for different ones, and low ones beside which sequences that mix are missed."""
    found = torch.randn(12, 2000, generator=torch.Generator().manual_seed(0))
    found[:, -8:] = bias
    assert same_logits(found, found.clone())
    mixed = found + 0.01 * torch.randn(12, 2000, generator=torch.Generator().manual_seed(1))
    assert not same_logits(mixed, found)
    assert not same_logits(found * math.nan, found)


def with_scaled_logits(model: PreTrainedModel, scale: float) -> PreTrainedModel:
    model.get_output_embeddings().weight.data *= scale
    return model


def test_a_mask_token_of_another_vocabulary() -> None:
    """Catches an IndexError for a folder whose config names a mask token that its vocabulary does not have."""
    tiny("bert", mask_token_id=128_002)


def test_models_whose_layers_share_weights_stay_as_they_are() -> None:
    """Catches ALBERT, whose one layer is every layer."""
    assert shorten_last_layer(tiny("albert", embedding_size=16)) is None


def test_layers_with_an_input_for_each_row_stay_as_they_are() -> None:
    """Catches XMOD, whose layers choose adapters by the language of a row: selected positions have no rows."""
    model = tiny("xmod", languages=["en_XX"], default_language="en_XX", max_position_embeddings=40)
    module = MaskedLanguageModel(model).train()
    assert module.short_layer is None
    ids = torch.arange(24).view(2, 12)
    segments = torch.ones(2, 12, dtype=torch.int32)
    bounds = torch.tensor([0, 12, 24], dtype=torch.int32)
    positions = torch.arange(1, 13).expand(2, 12)
    assert torch.isfinite(module(*Microbatch(ids, positions, segments, bounds, ids[0, :3], ids[1, :3])).loss_sum)


def test_a_small_vocabulary() -> None:
    """Catches a check with token ids that the model does not have."""
    assert shorten_last_layer(tiny("bert", vocab_size=12)) is not None


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_layers_that_mix_positions_after_attention_stay_as_they_are(scale: float) -> None:
    """Catches wrong losses of a model whose last layer needs other positions than the predicted ones, or one that
    computes all positions because its logits are large."""
    model = with_scaled_logits(tiny("bert", vocab_size=2000, tie_word_embeddings=False), scale)
    dense = encoder_layers(model)[-1].output.dense

    def mix(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output + output.mean(dim=1, keepdim=True)

    hook = dense.register_forward_hook(mix)
    assert shorten_last_layer(model) is None
    assert "forward" not in vars(encoder_layers(model)[-1])
    hook.remove()
    assert shorten_last_layer(model) is encoder_layers(model)[-1]


def test_all_positions_are_computed_where_none_are_named(example: Callable[[str], Example]) -> None:
    """Catches a checkpoint's model, or a probe of it, that returns less than it is asked for."""
    model = copy.deepcopy(example("bert").built.model)
    inputs = packed_inputs(torch.arange(6), (6,), 6, first_position=0)
    expected = model(**inputs).logits
    assert shorten_last_layer(model) is not None
    torch.testing.assert_close(model(**inputs).logits, expected)


@pytest.mark.parametrize(("model_type", "short"), [("bert", True), ("albert", False)])
def test_a_model_on_the_meta_device(model_type: str, short: bool) -> None:
    """Catches a plan for another computation than that of the run."""
    model = tiny(model_type, embedding_size=16)
    planned = meta_model(model.config)
    planned.set_attn_implementation(model.config._attn_implementation)
    assert [shorten_last_layer(each) is not None for each in (planned, model)] == [short, short]
