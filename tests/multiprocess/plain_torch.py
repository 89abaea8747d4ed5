"""References that use only transformers and torch."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForMaskedLM, PreTrainedModel

from pretrain.batching.batch import IGNORED, Microbatch
from pretrain.modeling.build import build_model
from pretrain.resolve import ResolvedRun


def plain_model(run: ResolvedRun) -> PreTrainedModel:
    """The model of a run with its initial weights, as transformers builds it."""
    start = build_model(run.config.model, run.model_config, run.config.run.seed).model.state_dict()
    run.model_config._attn_implementation = "eager"
    model = AutoModelForMaskedLM.from_config(run.model_config)
    model.load_state_dict(start)
    return model


def all_labels(padded: Microbatch) -> Tensor:
    """Of each slot, flat; IGNORED where nothing is predicted."""
    labels = torch.full((padded.input_ids.numel(),), IGNORED)
    real = padded.labels != IGNORED
    labels[padded.masked_positions[real]] = padded.labels[real]
    return labels


def plain_loss(model: PreTrainedModel, padded: Microbatch) -> Tensor:
    """The mean over all predicted tokens."""
    logits = model(input_ids=padded.input_ids, attention_mask=(padded.segments > 0).long()).logits
    return F.cross_entropy(logits.flatten(0, 1), all_labels(padded), ignore_index=IGNORED)
