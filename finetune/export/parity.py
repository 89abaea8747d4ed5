"""Compare an ONNX model with the model that it was made from, on texts of random tokens."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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

# Shape suffixes: S sequences, T tokens.


@dataclass
class OutputDifference:
    """The difference of an output, over all batches."""

    largest: float = 0.0
    scale: float = 1.0  # the largest output of PyTorch, at least 1

    def add(self, expected: Tensor, found: Tensor) -> None:
        self.largest = max(self.largest, float((expected - found).abs().max().nan_to_num(float("inf"))))
        self.scale = max(self.scale, float(expected.abs().max()))


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


def compare(
    original: LoadedModel, exported: LoadedModel, batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, OutputDifference]:
    """Compute all batches with both models. Returns the differences by output of the graph."""
    assert isinstance(exported.model, OnnxModel)
    graph, differences = ModelGraph(original.model).eval(), defaultdict[str, OutputDifference](OutputDifference)
    for batch in batches:
        inputs = {name: x[None] for name, x in batch.items()} if takes_choices(original.model) else dict(batch)
        with torch.inference_mode():
            expected = graph(**inputs)
        found = exported.model.compute(list(expected), inputs)
        real_ST = batch["attention_mask"].bool()
        for name in expected:
            # Some encoders, such as Funnel's, have fewer hidden states than tokens. Scores of positions are ST.
            of_position = name not in ("logits", HIDDEN) or expected[name].dim() == 3
            is_per_token = of_position and expected[name].shape[:2] == real_ST.shape
            rows = [x[real_ST] if is_per_token else x for x in (expected[name], found[name])]
            differences[name].add(*rows)
    return dict(differences)
