import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_examples import PACKED, PADDED, Example, make_example
from torch import Tensor, nn

from pretrain.batching.batch import Microbatch
from pretrain.modeling import head
from pretrain.modeling.head import (
    Losses,
    choose_fused_head,
    choose_head,
    find_linear_decoder,
    fused_head,
    gpu_losses,
    logits_head,
)
from pretrain.modeling.masked_lm import MaskedLanguageModel
from pretrain.world import World
from rank_pool import RankPool

TYPES = (*PACKED, *PADDED)


@pytest.mark.parametrize("model_type", TYPES)
def test_logits_of_these_models_are_the_output_of_a_linear_layer(
    example: Callable[[str], Example], model_type: str
) -> None:
    """Catches a probe that fails, so that a model would keep its logits for no reason."""
    built = example(model_type).built
    assert find_linear_decoder(built.model) is built.model.get_output_embeddings()
    assert not any(module._forward_hooks for module in [built.model.get_output_embeddings()])


class Scaled(nn.Linear):
    pass


class Model(nn.Module):
    """A masked-LM model that may change what its last layer returns."""

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=5), _attn_implementation="eager")

    def __init__(self, change: Callable[[Tensor], Tensor], decoder: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.embeddings, self.decoder, self.change = nn.Embedding(5, 3), decoder(3, 5), change

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.change(self.decoder(self.embeddings(input_ids))))


def twice(model: Model) -> Model:
    forward = model.forward
    model.forward = lambda **inputs: (forward(**inputs), forward(**inputs))[1]  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (Model(lambda logits: logits), True),
        (Model(lambda logits: 2 * logits), False),
        (Model(lambda logits: logits.mul_(2)), False),
        (Model(lambda logits: logits[:, :, :4]), False),
        (Model(lambda logits: logits, Scaled), False),
        (twice(Model(lambda logits: logits)), False),
        (Model(lambda _: torch.zeros(1, 8, 5)), False),
    ],
)
def test_logits_that_are_changed_are_not_fused(model: Any, found: bool) -> None:
    """Catches a head whose loss would miss what comes after the linear layer."""
    assert (find_linear_decoder(model) is not None) == found


@pytest.mark.parametrize(("works", "kind"), [(True, fused_head), (False, logits_head)])
def test_choice_of_the_head(
    example: Callable[[str], Example], works: bool, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the fused loss where Triton is missing or broken, and logits that are kept on a CPU."""
    built = example("bert").built
    monkeypatch.setattr(head, "_is_fused_loss_usable", lambda: works)
    model = copy.deepcopy(built.model)
    assert getattr(choose_head(model), "func", None) is fused_head, "without a CUDA device"
    monkeypatch.setattr(head.torch.cuda, "is_available", lambda: True)
    chosen = choose_head(copy.deepcopy(built.model))
    assert getattr(chosen, "func", chosen) is kind


def test_a_kernel_that_does_not_work_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that ends, or is silently slow, on a device for which the kernel does not compile: there is none
    here, which fails as well."""
    head._is_fused_loss_usable.cache_clear()
    assert not head._is_fused_loss_usable()
    assert not head._is_fused_loss_usable()
    assert caplog.text.count("the fused cross-entropy does not work here") == 1
    head._is_fused_loss_usable.cache_clear()


def results(module: MaskedLanguageModel, microbatch: Microbatch) -> tuple[float, int, dict[str, Tensor]]:
    """Loss and correct predictions in evaluation, and gradients of training."""
    with torch.no_grad():
        predictions = module.eval()(*microbatch)
    loss_sum, correct = module.train()(*microbatch)
    assert correct is None
    assert loss_sum.item() == pytest.approx(predictions.loss_sum.item(), rel=1e-6)
    loss_sum.backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return loss_sum.item(), int(predictions.correct), gradients  # type: ignore[arg-type]


def compare_heads(model_type: str, corpus: Path, losses: Losses | None = None) -> None:
    """Fails unless a model computes the same with the fused head as without."""
    case = make_example(model_type, corpus)
    models = (case.built.model, copy.deepcopy(case.built.model))
    heads = (logits_head, choose_fused_head(models[1], losses))
    modules = [MaskedLanguageModel(model, head=head) for model, head in zip(models, heads, strict=True)]
    (loss, correct, gradients), (fused_loss, fused_correct, fused_gradients) = (
        results(module, case.microbatches[0]) for module in modules
    )
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert fused_correct == correct
    assert list(fused_gradients) == list(gradients), "parameters keep their names"
    for name, gradient in gradients.items():
        assert (fused_gradients[name] is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-4, atol=1e-5)


def compare_heads_case(_: World, model_type: str, corpus: Path) -> None:
    compare_heads(model_type, corpus, gpu_losses)


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "mpnet"])
def test_the_fused_head_computes_the_same(
    interpreting_pools: dict[int, RankPool], wordpiece_corpus: Path, model_type: str
) -> None:
    """Catches gradients of tied embeddings that are lost, a head on other rows than the masked ones, and labels that
    stay set after a forward pass."""
    pytest.importorskip("triton")
    interpreting_pools[1].run(compare_heads_case, model_type, wordpiece_corpus)


def test_a_cpu_without_triton_trains(example: Callable[[str], Example], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an import of Triton on a machine without a GPU, where it need not be installed."""
    monkeypatch.setitem(sys.modules, "triton", None)
    case = example("bert")
    module = MaskedLanguageModel(copy.deepcopy(case.built.model))
    module.train()(*case.microbatches[0]).loss_sum.backward()
    assert module.eval()(*case.microbatches[0]).correct is not None


def test_predictions_are_counted_in_evaluation_with_gradients(example: Callable[[str], Example]) -> None:
    """Catches a fused head that is chosen by another rule than the count of correct predictions."""
    case = example("bert")
    module = MaskedLanguageModel(copy.deepcopy(case.built.model)).eval()
    predictions = module(*case.microbatches[0])
    assert predictions.correct is not None
    assert predictions.loss_sum.requires_grad


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "mpnet"])
def test_the_fused_head_of_a_cpu_computes_the_same(wordpiece_corpus: Path, model_type: str) -> None:
    """Catches the same on a CPU, and a count of correct predictions that is missing there."""
    compare_heads(model_type, wordpiece_corpus)
