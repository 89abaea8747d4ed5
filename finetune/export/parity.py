"""Compare an ONNX model with the model that it was made from, on texts of random tokens."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from experiment.models.transformers_models import max_positions
from finetune.encoding.encoder import Encoder, Tokens
from finetune.encoding.examples import pad_sequences
from finetune.export.graph import ModelGraph, takes_choices
from finetune.prediction.loaded_model import LoadedModel
from finetune.prediction.onnx_model import HIDDEN, OnnxModel

_TEXTS = 32
_SHORTEST = 4  # tokens, special ones included
_LONGEST = 2048  # of models without a limit, or with one that would take too much memory
_BATCH_TOKENS = 512  # with padding

# Shape suffixes: S sequences, T tokens, C labels.


@dataclass
class Difference:
    """The difference of an output, over all batches."""

    largest: float = 0.0
    scale: float = 1.0  # the largest output of PyTorch, at least 1

    def add(self, expected: Tensor, found: Tensor) -> None:
        self.largest = max(self.largest, float((expected - found).abs().max().nan_to_num(float("inf"))))
        self.scale = max(self.scale, float(expected.abs().max()))


@dataclass
class Comparison:
    """The differences between the outputs of an ONNX model and of PyTorch."""

    outputs: dict[str, Difference] = field(default_factory=dict)
    probability: float = 0.0  # largest difference of two
    decisions: int = 0  # the most probable label of a text or token, yes or no for each label, …
    same: int = 0  # of them


def sample_batches(loaded: LoadedModel) -> list[dict[str, Tensor]]:
    """Return inputs of a model, ST, in batches of similar length: texts and pairs of few tokens up to the longest
    possible."""
    longest = loaded.padding.length or min(max_positions(loaded.model) or loaded.encoder.max_length, _LONGEST)
    encoder = replace(loaded.encoder, max_length=longest)
    tokenizer, draw = encoder.tokenizer, random.Random(0)
    ordinary = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    lengths = [round(_SHORTEST * (longest / _SHORTEST) ** (index / (_TEXTS - 1))) for index in range(_TEXTS)]
    texts = [draw.choices(ordinary, k=length) for length in [*lengths[:-1], 2 * longest]]
    sequences = sorted((_sample(encoder, ids, draw) for ids in texts), key=len)
    batches: list[list[Tokens]] = [[]]
    for sequence in sequences:
        if (len(batches[-1]) + 1) * len(sequence) > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(sequence)
    return [pad_sequences(batch, loaded.padding, torch.device("cpu")) for batch in batches]


def _sample(encoder: Encoder, ids: list[int], draw: random.Random) -> Tokens:
    """Return a text of these tokens, or a pair of texts."""
    first = draw.randint(0, len(ids)) if draw.random() < 0.5 else len(ids)
    text, pair = encoder.tokenizer.decode(ids[:first]), encoder.tokenizer.decode(ids[first:])
    return encoder.encode(text, pair or None)


def compare(original: LoadedModel, exported: LoadedModel, batches: Sequence[Mapping[str, Tensor]]) -> Comparison:
    """Compute all batches with both models."""
    assert isinstance(exported.model, OnnxModel)
    graph, comparison = ModelGraph(original.model).eval(), Comparison()
    multi_label = original.model.config.problem_type == "multi_label_classification"
    for batch in batches:
        inputs = {name: x[None] for name, x in batch.items()} if takes_choices(original.model) else dict(batch)
        with torch.inference_mode():
            expected = graph(**inputs)
        found = exported.model.compute(list(expected), inputs)
        real_ST = batch["attention_mask"].bool()
        for name in expected:
            _add(comparison, name, expected[name], found[name], real_ST, multi_label)
    if takes_choices(original.model):
        comparison.decisions = 0  # the texts of a batch are not the choices of one question
    return comparison


def _add(
    comparison: Comparison, name: str, expected: Tensor, found: Tensor, real_ST: Tensor, multi_label: bool
) -> None:
    """Compare an output of a batch. real_ST: which tokens are not padding."""
    is_position = name not in ("logits", HIDDEN)  # scores ST of the start and the end of an answer
    # Some encoders, such as Funnel's, have fewer hidden states than tokens.
    is_per_token = expected.shape[:2] == real_ST.shape and (is_position or expected.dim() == 3)
    rows = [x[real_ST] if is_per_token else x for x in (expected, found)]
    comparison.outputs.setdefault(name, Difference()).add(*rows)
    if name == HIDDEN or rows[0].shape[-1:] == (1,):  # a value has no probabilities
        return
    if is_position:
        rows = [x.masked_fill(~real_ST, float("-inf")) for x in (expected, found)]
    probabilities = [x.sigmoid() if multi_label else x.softmax(-1) for x in rows]
    decisions = [x > 0.5 if multi_label else x.argmax(-1) for x in probabilities]
    comparison.probability = max(comparison.probability, float((probabilities[0] - probabilities[1]).abs().max()))
    comparison.decisions += decisions[0].numel()
    comparison.same += int((decisions[0] == decisions[1]).sum())
