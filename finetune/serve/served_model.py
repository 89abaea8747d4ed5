"""The model of a server: loaded, described, tried once, and made fast on a CPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiment.errors import UserError
from experiment.models.fast_linear import ONEDNN_DTYPES, FastLinear
from experiment.models.hub_names import hub_name
from experiment.run_files.checkpoints import deleted_meanwhile
from finetune.data.records import Record
from finetune.device import Device
from finetune.kinds import embedding
from finetune.pooling import Pooling
from finetune.prediction.loaded_model import LoadedModel, load_model
from finetune.prediction.mask_filler import MaskFiller, ranking_task
from finetune.prediction.predictor import Predictor
from finetune.prediction.saved_task import SavedTask, find_model, is_masked_lm, read_saved_task
from finetune.serve.schemas import ModelInfo

_ROWS = 512  # oneDNN chooses a layout that is good for about as many; any number can be computed
_MULTIPLE = 32  # of rows


@dataclass(frozen=True)
class ServedModel:
    """The parts that answer requests: a predictor or a mask filler, and embedders of the same model."""

    info: ModelInfo
    loaded: LoadedModel
    pooling: Pooling  # of embeddings, if a request names none
    embedders: Mapping[Pooling, Predictor] = field(default_factory=dict)  # none without hidden states of tokens
    predictor: Predictor | None = None
    filler: MaskFiller | None = None


def load_served_model(path: Path, precision: str) -> ServedModel:
    """Load a model folder, or the best model of a run. Raises UserError."""
    folder, _ = find_model(path)
    with deleted_meanwhile(folder):
        if is_masked_lm(folder):
            filler = MaskFiller(load_model(folder, ranking_task(), precision))
            info = _describe(filler.loaded, kind="masked_lm", mask=filler.mask)
            pooling, normalize = filler.ranking.kind.embedding
            served = ServedModel(info, filler.loaded, pooling, filler=filler)
            filler.fill([filler.mask])
        else:
            task = read_saved_task(folder)
            predictor = Predictor.load(folder, precision, task=task)
            pooling, normalize = task.kind.embedding
            served = ServedModel(_describe_predictor(predictor, task), predictor.loaded, pooling, predictor=predictor)
    _own_weights(served.loaded.model)
    pack_linear_layers(served.loaded.model, served.loaded.device)
    return replace(served, embedders=_make_embedders(served.loaded, normalize))


def _make_embedders(loaded: LoadedModel, normalize: bool) -> dict[Pooling, Predictor]:
    """Return an embedder for each pooling; none if the model has no hidden state for each token."""
    kinds = [embedding.Kind(embedding.Config(pooling=each, normalize=normalize), ()) for each in get_args(Pooling)]
    embedders = {kind.embedding[0]: Predictor.of(loaded, SavedTask(kind, None)) for kind in kinds}
    try:
        for embedder in embedders.values():
            embedder.compute(embedder.encode([Record("", {"text": "a"})]).examples)  # the first batch takes longer
    except UserError:
        return {}
    return embedders


def _own_weights(model: nn.Module) -> None:
    """Copy the weights: on a CPU they may be mapped from their file. If that is overwritten, for a reload, the old
    model would change, and reading missing parts ends the process."""
    for weights in chain(model.parameters(), model.buffers()):
        if weights.device.type == "cpu":
            weights.data = weights.data.clone()


def _describe_predictor(predictor: Predictor, task: SavedTask) -> ModelInfo:
    roles = task.kind.config.columns.without_targets().cell_types()
    accepts = [
        *(["texts"] if set(roles) == {"text"} else []),
        *(["pairs"] if task.accepts_pairs or set(roles) == {"text", "text_pair"} else []),
        "records",
    ]
    fields = {role: cell_type.description for role, cell_type in roles.items()}
    if task.kind.config.dialogue is not None:
        separator = predictor.loaded.encoder.tokenizer.sep_token
        fields["text"] += f", after the previous turns of its dialogue, with {separator} after each of them"
    return _describe(
        predictor.loaded,
        kind=task.kind.config.kind,
        labels=list(task.kind.labels),
        accepts=accepts,
        fields=fields,
        calibrated=predictor.temperature is not None,
    )


def _describe(loaded: LoadedModel, **known: Any) -> ModelInfo:
    """Describe a model. known: the fields that depend on the kind of the model; the others stay empty."""
    return ModelInfo(
        model=_public_name(loaded.folder),
        max_seq_length=loaded.encoder.max_length,
        precision=loaded.precision,
        loaded=datetime.now(UTC).isoformat(timespec="seconds"),
        **{"labels": [], "accepts": [], "fields": {}, "mask": None, "calibrated": False, **known},
    )


def _public_name(folder: Path) -> str:
    """Return the name of a model for clients, who need not know the folders of this machine."""
    return hub_name(str(folder)) or (folder.name if folder.is_absolute() else str(folder))


def pack_linear_layers(model: nn.Module, device: Device) -> None:
    """Let the linear layers of a model compute with packed weights, for inference only. They give the same results up
    to rounding, in the precision of the device. Does nothing on a GPU, nor where oneDNN lacks the precision."""
    dtype = device.dtype or torch.float32
    if device.torch_device.type != "cpu" or dtype not in ONEDNN_DTYPES:
        return
    for module in model.modules():
        if type(module) in (nn.Linear, FastLinear):
            module.__class__ = _PackedLinear
            cast(_PackedLinear, module).pack(dtype)


def padded_rows(count: int) -> int:
    """Round `count` rows up to the rows to compute: a power of two, or a multiple of 32.

    oneDNN generates code for each number of rows, and keeps it for about a thousand shapes: with any number, a server
    grows by some hundred MiB, and is slower by a fifth.
    """
    return 1 << (count - 1).bit_length() if count < _MULTIPLE else count + -count % _MULTIPLE


class _PackedLinear(nn.Linear):
    packed_: Tensor
    bias_: Tensor | None
    dtype_: torch.dtype

    def pack(self, dtype: torch.dtype) -> None:
        self.packed_ = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach().to(dtype), _ROWS)
        self.bias_ = None if self.bias is None else self.bias.detach().to(dtype)
        self.dtype_ = dtype

    def forward(self, values: Tensor) -> Tensor:
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else values.dtype
        if autocast != self.dtype_ or values.numel() == 0:  # a model may switch autocast off for some layers
            return F.linear(values, self.weight, self.bias)
        rows = values.reshape(-1, self.in_features).to(self.dtype_)
        count = len(rows)
        rows = F.pad(rows, (0, 0, 0, padded_rows(count) - count))
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed_, self.bias_, "none", [], "")
        return product[:count].view(*values.shape[:-1], self.out_features)
