import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_examples import LOCAL_WINDOW, PACKED, PADDED, WIDTH, Example, make_example, sequences
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.bert import modeling_bert

from pretrain.batching.batch import IGNORED
from pretrain.batching.masking import MaskingSchedule
from pretrain.corpus.build import build_corpus
from pretrain.corpus.options import CorpusOptions
from pretrain.modeling import packability
from pretrain.modeling.attention import Packing
from pretrain.modeling.masked_lm import MaskedLanguageModel
from pretrain.modeling.random_model import meta_model, random_model
from tiny_models import tiny_fields

ALL = (*PACKED, *PADDED)


def one_by_one_loss(example: Example) -> Tensor:
    """Summed loss over a global batch, each sequence alone, with the full head and none of our code."""
    losses = []
    for microbatch in example.microbatches:
        for sequence in sequences(microbatch):
            logits = example.plain(input_ids=sequence.input_ids[None]).logits[0]
            losses.append(F.cross_entropy(logits, sequence.labels, ignore_index=IGNORED, reduction="sum"))
    return torch.stack(losses).sum()


@pytest.mark.parametrize("model_type", ALL)
def test_which_models_are_packed(example: Callable[[str], Example], model_type: str) -> None:
    """Catches a model that could be packed but trains padded, and the reverse."""
    assert example(model_type).built.packed == (model_type in PACKED)


@pytest.mark.parametrize(
    ("model_type", "fields", "packed"),
    [
        *[(model_type, {}, model_type in PACKED) for model_type in ("bert", "deberta-v2")],
        ("eurobert", {}, True),
        ("eurobert", {"num_key_value_heads": 4}, True),  # grouped-query attention
        ("neomme", {}, True),  # as well, and has fields for each layer
        ("modernvbert", {}, True),  # has a config for text
    ],
)
def test_a_plan_finds_out_which_models_are_packed(
    model_type: str, fields: dict[str, Any], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a model that is tested in full size, or with numbers of heads that do not fit each other."""

    def build(config: PreTrainedConfig) -> PreTrainedModel:
        assert sum(parameter.numel() for parameter in meta_model(config).parameters()) < 1e8
        return random_model(config)

    monkeypatch.setattr(packability, "random_model", build)
    assert packability.is_packed(AutoConfig.for_model(model_type, **fields)) == packed


def test_a_model_with_attention_of_its_own_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a type whose attention has an option that the packed attention does not know, and ignores."""
    attend = modeling_bert.eager_attention_forward

    def gated(*inputs: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output, weights = attend(*inputs, **options)
        return 2 * output, weights

    model = random_model(AutoConfig.for_model("bert", **tiny_fields("bert"))).float()
    monkeypatch.setattr(modeling_bert, "eager_attention_forward", gated)
    assert packability.why_not_packed(model) == "packed sequences would get other logits"


@pytest.mark.parametrize(
    ("model_type", "fields", "least"),
    [
        ("bert", {}, 0),
        ("longformer", {"attention_window": [64, 256, 64]}, 256),
        ("longformer", {"attention_window": 512}, 512),
        ("perceiver", {}, sys.maxsize),
    ],
)
def test_the_least_width_whose_memory_a_row_takes(model_type: str, fields: dict[str, Any], least: int) -> None:
    """Catches many short rows of models in which each takes the memory of a long one."""
    assert packability.least_row_width(AutoConfig.for_model(model_type, **fields)) == least


@pytest.mark.parametrize("model_type", PACKED)
def test_packed_logits_are_those_of_each_sequence_alone(example: Callable[[str], Example], model_type: str) -> None:
    """Catches attention across sequences, positions that do not restart or start at the wrong number, and local windows
    that are off by one or span sequences."""
    case = example(model_type)
    lengths = []
    with torch.inference_mode():
        for microbatch in case.microbatches:
            packed = case.built.model(
                input_ids=microbatch.input_ids,
                position_ids=microbatch.position_ids,
                packing=Packing(microbatch.segments, microbatch.cu_seqlens),
            ).logits
            for sequence in sequences(microbatch):
                alone = case.plain(input_ids=sequence.input_ids[None]).logits[0]
                torch.testing.assert_close(packed.flatten(0, 1)[sequence.slots], alone, atol=1e-5, rtol=1e-5)
                lengths.append(len(sequence.slots))
    assert len(lengths) == 23
    assert max(lengths) > 4 * LOCAL_WINDOW, "sequences shorter than ModernBERT's window would prove nothing"
    assert min(lengths) < 10


def relative(difference: list[Tensor], of: list[Tensor]) -> float:
    return float(torch.cat([t.flatten() for t in difference]).norm() / torch.cat([t.flatten() for t in of]).norm())


@pytest.mark.parametrize("model_type", [*ALL, "released deberta"])
def test_loss_and_gradients_are_those_of_each_sequence_alone_with_the_full_head(
    example: Callable[[str], Example], model_type: str
) -> None:
    """Catches a head on other positions than the predicted ones, shifted labels, and padding in the loss."""
    case = example(model_type)
    module = MaskedLanguageModel(case.built.model).train()
    loss = torch.stack([module(*microbatch).loss_sum for microbatch in case.microbatches]).sum()
    expected = one_by_one_loss(case)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    loss.backward()
    expected.backward()
    reference = dict(case.plain.named_parameters())
    ours = {name.removeprefix("model."): p.grad for name, p in module.named_parameters() if p.grad is not None}
    theirs = {name: p.grad for name, p in reference.items() if p.grad is not None}
    assert set(ours) == set(theirs)
    names = sorted(ours)
    assert relative([ours[n] - theirs[n] for n in names], [theirs[n] for n in names]) < 1e-5


def test_a_model_whose_tokenizer_has_neither_cls_nor_sep_trains(
    byte_level: Path, text_file: Path, tmp_path: Path
) -> None:
    """Catches a refusal of EuroBERT, whose tokenizer puts bos and eos around a text."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(byte_level, folder)
    for file in folder.iterdir():  # to names that are not RoBERTa's
        file.write_text(file.read_text().replace('"<s>"', '"<|begin|>"').replace('"</s>"', '"<|end|>"'))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    roles = {role: token for role, token in config.items() if role not in ("cls_token", "sep_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    build_corpus(CorpusOptions(source=text_file, tokenizer=folder, output=tmp_path / "corpus", workers=1))
    case = make_example("eurobert", tmp_path / "corpus")
    ids = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert (case.maker.vocabulary.prefix, case.maker.vocabulary.suffix) == ((ids["<|begin|>"],), (ids["<|end|>"],))
    module = MaskedLanguageModel(case.built.model).train()
    optimizer, microbatch = torch.optim.SGD(module.parameters(), lr=1e-3), case.microbatches[0]
    before = module(*microbatch).loss_sum
    before.backward()
    optimizer.step()
    assert module(*microbatch).loss_sum < before


@pytest.mark.parametrize("model_type", PACKED)
def test_flat_and_packed_rows_have_the_same_loss_and_gradients(
    example: Callable[[str], Example], model_type: str
) -> None:
    """Catches another order, other masks or other positions in flat rows, sequences that influence each other there,
    and a model that fails on rows with more slots than it has positions."""
    case = example(model_type)
    layout = dataclasses.replace(case.maker.layout, kind="flat", microbatch_tokens=8 * WIDTH)
    flat = dataclasses.replace(case.maker, layout=layout)[0]
    assert flat.masked_tokens == case.maker[0].masked_tokens
    assert min(microbatch.input_ids.shape[1] for microbatch in flat.microbatches) > 4 * 70, "of 70 positions"
    results = []
    for microbatches in (case.microbatches, flat.microbatches):
        module = MaskedLanguageModel(case.built.model, WIDTH).train()
        module.zero_grad()
        loss = torch.stack([module(*microbatch).loss_sum for microbatch in microbatches]).sum()
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in module.parameters() if p.grad is not None]))
    (packed_loss, expected), (flat_loss, found) = results
    assert flat_loss == pytest.approx(packed_loss, rel=1e-5)
    assert relative([ours - theirs for ours, theirs in zip(found, expected, strict=True)], expected) < 1e-5


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "mpnet"])
def test_a_microbatch_without_predicted_tokens_contributes_nothing(
    example: Callable[[str], Example], model_type: str
) -> None:
    """Catches 0/0 in the loss, which would make every weight NaN, and gradients from filler positions."""
    case = example(model_type)
    batch = dataclasses.replace(case.maker, masking_schedule=MaskingSchedule((1e-9,), "stepped", steps=1))[0]
    assert batch.masked_tokens == 0
    module = MaskedLanguageModel(case.built.model).train()
    for microbatch in batch.microbatches:
        loss = module(*microbatch).loss_sum
        assert loss.item() == 0.0
        loss.backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert gradients
    assert all(bool((gradient == 0).all()) for gradient in gradients)


def test_correct_counts_right_predictions(example: Callable[[str], Example]) -> None:
    """Catches fillers counted as correct, and comparison with the masked input instead of the original token."""
    case = example("bert")
    module = MaskedLanguageModel(case.built.model).eval()
    with torch.inference_mode():
        for microbatch in case.microbatches:
            expected = 0
            for sequence in sequences(microbatch):
                guesses = case.plain(input_ids=sequence.input_ids[None]).logits[0].argmax(dim=-1)
                expected += int(((guesses == sequence.labels) & (sequence.labels != IGNORED)).sum())
            assert int(module(*microbatch).correct) == expected


def test_parameters_keep_their_names(example: Callable[[str], Example]) -> None:
    """Catches a wrapper that renames parameters, so that transformers could not load the checkpoint."""
    case = example("bert")
    module = MaskedLanguageModel(case.built.model)
    assert [name for name, _ in module.named_parameters()] == [
        f"model.{name}" for name, _ in case.plain.named_parameters()
    ]
