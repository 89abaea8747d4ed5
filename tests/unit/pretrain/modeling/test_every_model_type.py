"""Every type that transformers' AutoModelForMaskedLM knows trains."""

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from experiment.errors import UserError
from pretrain.batching.batch import Microbatch
from pretrain.config import ModelConfig
from pretrain.modeling import masked_lm
from pretrain.modeling.build import build_model
from pretrain.modeling.masked_lm import MaskedLanguageModel
from pretrain.modeling.model_config import resolve_model_config
from pretrain.modeling.packability import is_packed
from pretrain.modeling.structure import hidden_matrices
from pretrain.resolve import ONLY_IN_FP32
from runs import sampled
from tiny_models import tiny_fields

UNTRAINABLE = ["mra", "reformer"]
TYPES = [name for name in MODEL_FOR_MASKED_LM_MAPPING_NAMES if name not in UNTRAINABLE]
WHOLE = ("albert", "xmod")  # packed, but the last layer computes all positions: one for all, and inputs per row


def tiny(model_type: str) -> ModelConfig:
    return ModelConfig(config={"model_type": model_type, **tiny_fields(model_type)})


def microbatch(packed: bool, first_position: int) -> Microbatch:
    """Two rows; with two sequences in the first one, if `packed`."""
    ids = torch.arange(10, 34).view(2, 12)
    segments = torch.tensor([[1] * 5 + [3 if packed else 1] * 4 + [0] * 3, [2] * 12], dtype=torch.int32)
    lengths = [5, 4, 3, 12] if packed else [9, 3, 12]
    positions = torch.cat([torch.arange(length) for length in lengths]).view(2, 12) + first_position
    boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Microbatch(ids, positions, segments, boundaries, torch.tensor([2, 7, 14]), torch.tensor([11, 12, 13]))


@pytest.mark.soak
@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_trains(tokenizer: PreTrainedTokenizerFast, model_type: str) -> None:
    """Catches a type that is accepted and fails in its first step, or learns nothing, also one that a new release of
    transformers brings. What cannot be trained has to be refused by `resolve_model_config`."""
    settings = tiny(model_type)
    config = resolve_model_config(settings, tokenizer)
    built = build_model(settings, config, seed=1)
    assert is_packed(config) == built.packed, "a plan would have other rows"
    assert sum(parameter.numel() for parameter in built.model.parameters()) < 2e7, "not tiny: add its sizes to SMALL"
    module = MaskedLanguageModel(built.model)  # in evaluation mode: without dropout
    batch = microbatch(built.packed, built.first_position)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    module.train()
    module(*batch).loss_sum.backward()
    module.eval()
    with torch.no_grad():
        before = module(*batch).loss_sum
        optimizer.step()
        after = module(*batch).loss_sum
    assert torch.isfinite(before)
    assert after < before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", sampled(TYPES, ["fnet", "bert"]))
def test_which_types_compute_in_16_bit(tokenizer: PreTrainedTokenizerFast, model_type: str, dtype: torch.dtype) -> None:
    """Catches a type that is accepted in 16 bit and fails in its first step, or one that is refused without need."""
    settings = tiny(model_type)
    built = build_model(settings, resolve_model_config(settings, tokenizer), seed=1)
    module = MaskedLanguageModel(built.model).train().to(dtype)
    refused = pytest.raises(RuntimeError) if model_type in ONLY_IN_FP32 else nullcontext()
    with refused:
        module(*microbatch(built.packed, built.first_position)).loss_sum.backward()


@pytest.mark.soak
@pytest.mark.parametrize("model_type", TYPES)
def test_hidden_matrices_of_every_type(tokenizer: PreTrainedTokenizerFast, model_type: str) -> None:
    """Catches a decoder or embeddings that Muon orthogonalizes, and layers that it leaves to AdamW."""
    settings = tiny(model_type)
    model = build_model(settings, resolve_model_config(settings, tokenizer), seed=1).model
    found = [model.get_parameter(name) for name in hidden_matrices(model)]
    assert len(found) >= (2 if model_type == "squeezebert" else 4), "SqueezeBERT's layers are convolutions"
    assert {matrix.dim() for matrix in found} == {2}
    assert not any(len(tokenizer) in matrix.shape for matrix in found)


@pytest.mark.soak
@pytest.mark.parametrize("model_type", TYPES)
def test_the_last_layer_of_every_type(
    tokenizer: PreTrainedTokenizerFast, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches another loss, or other gradients, where the last layer computes predicted positions only."""
    settings = tiny(model_type)
    built = build_model(settings, resolve_model_config(settings, tokenizer), seed=1)
    if not built.packed:
        pytest.skip("trains padded, so its last layer computes all positions")
    whole = copy.deepcopy(built.model)
    short = MaskedLanguageModel(built.model).eval()  # without dropout
    assert (short.short_layer is None) == (model_type in WHOLE)
    monkeypatch.setattr(masked_lm, "shorten_last_layer", lambda _model: None)
    by_slot = microbatch(True, built.first_position)
    columns, entries = torch.tensor([[2, 7], [2, 0]]), torch.tensor([0, 1, 2])
    by_row = by_slot._replace(predicted_columns=columns, predicted_entries=entries)
    expected = loss_and_gradients(MaskedLanguageModel(whole).eval(), by_slot)
    for batch in (by_slot, by_row):
        torch.testing.assert_close(loss_and_gradients(short, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", sampled(TYPES, ["esm"]))
def test_rows_without_a_sequence_change_nothing(tokenizer: PreTrainedTokenizerFast, model_type: str) -> None:
    """Catches gradients that are not finite, and failures: ESM divides by the number of tokens in each row, and mBART
    looks for the last one."""
    fields = tiny_fields(model_type)
    if model_type == "esm":
        fields |= {"token_dropout": True, "mask_token_id": tokenizer.mask_token_id}
    settings = ModelConfig(config={"model_type": model_type, **fields})
    built = build_model(settings, resolve_model_config(settings, tokenizer), seed=1)
    if built.packed:
        pytest.skip("trains packed, so every row has a sequence")
    built.model.requires_grad_(True)
    module = MaskedLanguageModel(built.model).eval()  # without dropout
    batch = microbatch(False, built.first_position)
    padding = torch.zeros(1, 12, dtype=torch.int32)
    ids = torch.cat([batch.input_ids, padding.long() + (built.model.config.pad_token_id or 0)])
    surplus = batch._replace(input_ids=ids, segments=torch.cat([batch.segments, padding]))
    expected = loss_and_gradients(module, batch)
    torch.testing.assert_close(loss_and_gradients(module, surplus), expected, rtol=1e-4, atol=1e-5)


def loss_and_gradients(module: MaskedLanguageModel, batch: Microbatch) -> list[torch.Tensor]:
    loss = module(*batch).loss_sum
    return [loss, *torch.autograd.grad(loss, list(module.parameters()), materialize_grads=True)]


@pytest.mark.parametrize("model_type", sampled(TYPES, ["perceiver"]))
def test_predictions_are_of_the_masked_positions(tokenizer: PreTrainedTokenizerFast, model_type: str) -> None:
    """Catches a type whose output has another width than its input, and that learns other positions."""
    settings = tiny(model_type)
    built = build_model(settings, resolve_model_config(settings, tokenizer), seed=1)
    if built.packed:
        pytest.skip("trains packed, which is compared with single sequences")
    module = MaskedLanguageModel(built.model).eval()
    batch = microbatch(False, built.first_position)
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)  # or all positions have much the same prediction
        logits = built.model(input_ids=batch.input_ids, attention_mask=(batch.segments > 0).long()).logits
        predicted = logits[[0, 0, 1], [2, 7, 2]].float()
        expected = torch.nn.functional.cross_entropy(predicted, batch.labels, reduction="sum")
        torch.testing.assert_close(module(*batch).loss_sum, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", UNTRAINABLE)
def test_types_that_cannot_be_trained_are_refused(tokenizer: PreTrainedTokenizerFast, model_type: str) -> None:
    """Catches MRA, whose attention is zero on a CPU, and Reformer, which fails at a row that is 96 tokens wide."""
    with pytest.raises(UserError, match=f"'{model_type}' cannot be trained: "):
        resolve_model_config(tiny(model_type), tokenizer)


def test_a_default_that_cannot_be_trained_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches a type whose defaults fail in the first step, with a traceback."""
    with pytest.raises(UserError, match=r"model\.config\.default_language: .*'xmod'.*expected"):
        resolve_model_config(ModelConfig(config={"model_type": "xmod"}), tokenizer)
