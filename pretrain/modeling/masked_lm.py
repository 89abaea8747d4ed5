"""The module that the engine trains: microbatch in, summed loss out.

The head computes predicted positions only, without code per architecture: the encoder's last layer returns these
(`pretrain.modeling.last_layer`), or a hook on the encoder keeps their hidden states, so that the model's own head runs
on [1, M, D] instead of [B, W, D].

Shapes: B rows, W slots, D hidden, V vocabulary, M masked positions.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiment.models.dropout import use_fast_dropout
from experiment.models.fast_linear import use_fast_linear
from experiment.models.fp32_sums import use_fp32_sums
from pretrain.modeling.attention import Packing, Predicted, choose_varlen_kernels, uses_flash, uses_packed_attention
from pretrain.modeling.head import Head, choose_head, cross_entropy
from pretrain.modeling.last_layer import shorten_last_layer
from pretrain.modeling.small_embeddings import use_one_hot_products


class Predictions(NamedTuple):
    loss_sum: Tensor  # scalar, fp32: cross-entropy summed over the predicted positions, in nats
    correct: Tensor | None  # scalar: number of them that the model predicts correctly; None while training


class MaskedLanguageModel(nn.Module):
    """Wraps a model from `AutoModelForMaskedLM`."""

    def __init__(self, model: PreTrainedModel, max_length: int | None = None, head: Head | None = None) -> None:
        """`max_length`: of sequences; None: as wide as the rows. `head`: None: the fastest for this process's
        device."""
        super().__init__()
        self.model = model
        self.packed = uses_packed_attention(model)
        self._max_length = max_length
        self.trained_length: int | None = None  # in place of `max_length` while training; None: the same
        self._masked_positions: Tensor | None = None
        self._width = 0  # of the rows
        self.windows = {None} | {getattr(module, "sliding_window", None) for module in model.modules()}
        use_fast_dropout(model)
        use_fast_linear(model)
        use_one_hot_products(model)
        use_fp32_sums(model)
        self._head = head or choose_head(model)
        short_layer = shorten_last_layer(model) if self.packed else None
        self._short_layer = (short_layer,)  # a module of its own would be registered twice
        if short_layer is None:
            model.base_model.register_forward_hook(self._keep_masked_positions)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segments: Tensor,
        cu_seqlens: Tensor,
        masked_positions: Tensor,
        labels: Tensor,
        predicted_columns: Tensor,
        predicted_entries: Tensor,
    ) -> Predictions:
        """Predict the masked tokens. The arguments are the fields of a `pretrain.batching.batch.Microbatch`."""
        width = segments.shape[1]
        self._masked_positions, self._width = masked_positions, width
        try:
            with self._head(labels, not self.training):
                if self.packed:
                    predicted = Predicted(masked_positions, predicted_columns, predicted_entries)
                    max_length = (self.training and self.trained_length) or self._max_length or width
                    longest = min(width, max_length)
                    config, dtype = self.model.config, self.model.dtype
                    varlen = choose_varlen_kernels(config, segments.device, dtype, self.windows != {None})
                    packing = Packing(segments, cu_seqlens, longest, predicted, varlen)
                    if not uses_flash(config, packing.capability, dtype):
                        # Not in the first layer: if it is compiled, its graph would differ from the graph of the
                        # others.
                        for window in self.windows:
                            packing.bias(window, dtype)
                    output = self.model(input_ids=input_ids, position_ids=position_ids, packing=packing)
                else:
                    input_ids, visible = self._fill_empty_rows(input_ids, segments)
                    output = self.model(input_ids=input_ids, attention_mask=visible)
        finally:
            self._masked_positions = None
        return Predictions(*cross_entropy(output.logits, labels, count=not self.training))

    @property
    def short_layer(self) -> nn.Module | None:
        """The last layer, if it computes predicted positions only. Its first run ends with an exception, so that hooks
        after the forward pass of modules inside it do not run."""
        return self._short_layer[0]

    def _fill_empty_rows(self, input_ids: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids [B, W] and the attention mask of padded rows. A row without a sequence gets a token that
        predicts nothing: ESM divides by the number of tokens in a row, and mBART looks for the last one."""
        visible = (segments > 0).long()
        special = (self.model.config.pad_token_id, getattr(self.model.config, "mask_token_id", None))
        ordinary = next(number for number in range(3) if number not in special)
        first = input_ids[:, :1].masked_fill(visible[:, :1] == 0, ordinary)
        visible[:, 0] = 1
        return torch.cat([first, input_ids[:, 1:]], dim=1), visible

    def _keep_masked_positions(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        if self._masked_positions is None:
            return output
        hidden_BWD = output[0][:, : self._width]  # Perceiver computes all positions that it has
        kept = hidden_BWD.reshape(-1, hidden_BWD.shape[-1])[self._masked_positions][None]
        if isinstance(output, tuple):
            return (kept, *output[1:])
        output[next(iter(output))] = kept
        return output
