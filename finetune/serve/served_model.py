"""The model of a server: loaded, described and tried once."""

from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

from torch import nn

from finetune.embedder import Embedder
from finetune.loaded_model import LoadedModel
from finetune.mask_filler import MaskFiller
from finetune.predictor import Predictor
from finetune.results.best_seed import find_model
from finetune.saved_task import SavedTask, is_masked_lm, read_saved_task
from finetune.serve.packed_linear import pack_linear_layers
from finetune.serve.schemas import ModelInfo

_SEQUENCES = 128  # that are computed at once, at most


@dataclass(frozen=True)
class ServedModel:
    """What answers requests: a predictor or a mask filler, and an embedder of the same model."""

    info: ModelInfo
    embedder: Embedder
    predictor: Predictor | None = None
    filler: MaskFiller | None = None

    @property
    def loaded(self) -> LoadedModel:
        return self.embedder.loaded


def load_served_model(path: Path, precision: str) -> ServedModel:
    """Load a model folder, or the best model of a run. Raises UserError."""
    folder, _ = find_model(path)
    if is_masked_lm(folder):
        filler = MaskFiller.load(folder, precision, _SEQUENCES)
        served = ServedModel(_describe_filler(filler), Embedder(filler.loaded), filler=filler)
        filler.fill([filler.mask])
    else:
        task = read_saved_task(folder)
        predictor = Predictor.load(folder, precision, _SEQUENCES, task)
        served = ServedModel(_describe_predictor(predictor, task), Embedder(predictor.loaded), predictor)
    _own_weights(served.loaded.model)
    pack_linear_layers(served.loaded.model, served.loaded.device)
    embedder = served.embedder
    embedder.compute(embedder.encode(["a"], "mean"))  # the first batch takes longer
    return served


def _own_weights(model: nn.Module) -> None:
    """Copy the weights: those on a CPU may be mapped from their file. If that is overwritten, for a reload, the old
    model would change, and reading what is missing ends the process."""
    for weights in chain(model.parameters(), model.buffers()):
        if weights.device.type == "cpu":
            weights.data = weights.data.clone()


def _describe_predictor(predictor: Predictor, task: SavedTask) -> ModelInfo:
    roles = task.kind.config.columns.without_targets().cell_types()
    pairs_too = task.foreign and set(roles) == {"text"}
    accepts = [
        *(["texts"] if set(roles) == {"text"} else []),
        *(["pairs"] if pairs_too or set(roles) == {"text", "text_pair"} else []),
        "records",
    ]
    fields = {role: cell_type.description for role, cell_type in roles.items()}
    return _describe(predictor.loaded, task.kind.config.kind).model_copy(
        update={
            "labels": list(task.kind.labels),
            "accepts": accepts,
            "fields": fields,
            "calibrated": predictor.temperature is not None,
        }
    )


def _describe_filler(filler: MaskFiller) -> ModelInfo:
    return _describe(filler.loaded, "masked_lm").model_copy(update={"mask": filler.mask})


def _describe(loaded: LoadedModel, kind: str) -> ModelInfo:
    return ModelInfo(
        model=str(loaded.folder),
        kind=kind,
        labels=[],
        accepts=[],
        fields={},
        mask=None,
        max_seq_length=loaded.encoder.max_length,
        precision=loaded.precision,
        calibrated=False,
        loaded=datetime.now(UTC).isoformat(timespec="seconds"),
    )
