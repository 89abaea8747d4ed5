"""The module that the engine trains: microbatch in, summed loss out.

The head computes predicted positions only, without code per architecture: a hook on the encoder keeps the hidden states
of these positions, so that the model's own head runs on [1, M, D] instead of [B, W, D].

Shapes: B rows, W slots, D hidden, V vocabulary, M masked positions.
"""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiment.dropout import use_fast_dropout
from experiment.fast_linear import use_fast_linear
from pretrain.batching.batch import IGNORED
from pretrain.modeling.attention import Packing


class Predictions(NamedTuple):
    loss_sum: Tensor  # scalar, fp32: cross-entropy summed over the predicted positions, in nats
    correct: Tensor | None  # scalar: number of them that the model predicts correctly; None while training


class MaskedLanguageModel(nn.Module):
    """Wraps a model from `AutoModelForMaskedLM`. `packed`: it uses the packed attention."""

    def __init__(self, model: PreTrainedModel, packed: bool) -> None:
        super().__init__()
        self.model = model
        self.packed = packed
        self._masked_positions: Tensor | None = None
        use_fast_dropout(model)
        use_fast_linear(model)
        model.base_model.register_forward_hook(self._keep_masked_positions)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segments: Tensor,
        cu_seqlens: Tensor,
        masked_positions: Tensor,
        labels: Tensor,
    ) -> Predictions:
        """The arguments are the fields of a `pretrain.batching.batch.Microbatch`."""
        self._masked_positions = masked_positions
        try:
            if self.packed:
                packing = Packing(segments, cu_seqlens)
                logits = self.model(input_ids=input_ids, position_ids=position_ids, packing=packing).logits
            else:
                logits = self.model(input_ids=input_ids, attention_mask=(segments > 0).long()).logits
        finally:
            self._masked_positions = None
        logits_MV = logits.reshape(-1, logits.shape[-1]).float()
        loss_sum = F.cross_entropy(logits_MV, labels, ignore_index=IGNORED, reduction="sum")
        correct = None if self.training else (logits_MV.argmax(dim=-1) == labels).sum()
        return Predictions(loss_sum, correct)

    def _keep_masked_positions(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        if self._masked_positions is None:
            return output
        hidden_BWD = output[0]
        kept = hidden_BWD.reshape(-1, hidden_BWD.shape[-1])[self._masked_positions][None]
        if isinstance(output, tuple):
            return (kept, *output[1:])
        output[next(iter(output))] = kept
        return output
