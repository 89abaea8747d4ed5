"""A model that `deepcloze export --format onnx` wrote, computed by ONNX Runtime on the CPU."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from experiment.errors import UserError
from experiment.models.model_folder import has_weights, load_model_config

if TYPE_CHECKING:
    import onnxruntime

ONNX_FILE = "model.onnx"
HIDDEN = "last_hidden_state"
"""The output with the hidden states of the encoder; the others belong to the head."""

PRECISION = "precision"
"""The key in the metadata of the file: fp32 or int8."""

PADDING = "padding"
"""A key that only models have whose outputs depend on padding, with the value `avoided`."""


def holds_onnx_model(folder: Path) -> bool:
    """Return whether a model folder has no weights but an ONNX model."""
    return (folder / ONNX_FILE).is_file() and not has_weights(folder)


def require_packages(*names: str) -> None:
    """Raise UserError if one of the packages of the extra `onnx` is missing."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise UserError(f"{', '.join(missing)} not installed; run: pip install 'deepcloze[onnx]'")


class OnnxModel(nn.Module):
    """Takes the place of a model of transformers in inference. Threads may share it.

    An output has the names that transformers gives its parts. Models for multiple choice take 1ST, others ST.
    """

    def __init__(self, folder: Path) -> None:
        """Raises UserError for a file that is damaged, or was written by something else."""
        super().__init__()
        require_packages("onnxruntime")
        self.config, file = load_model_config(folder), folder / ONNX_FILE
        self._session = _open_session(file)
        self._rank = len(self._session.get_inputs()[0].shape)
        names = [output.name for output in self._session.get_outputs()]
        metadata = self._session.get_modelmeta().custom_metadata_map
        if HIDDEN not in names or PRECISION not in metadata:
            raise UserError(f"{file} was not written by `deepcloze export`, which makes one from the weights")
        self._head = [name for name in names if name != HIDDEN]
        self.precision: str = metadata[PRECISION]
        self.avoids_padding = PADDING in metadata

    def forward(self, **inputs: Tensor) -> SimpleNamespace:
        """Return the outputs of the head."""
        return SimpleNamespace(**self.compute(self._head, inputs))

    def base_model(self, **inputs: Tensor) -> SimpleNamespace:
        """Return the hidden states STD of the encoder. The head is not computed."""
        return SimpleNamespace(**self.compute([HIDDEN], inputs))

    def get_output_embeddings(self) -> None:
        """Return None: there is no module for the output layer."""

    def compute(self, names: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the named outputs only."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.only_execute_path_to_fetches = True
        arrays = {name: (x if x.dim() == self._rank else x[None]).numpy() for name, x in inputs.items()}
        found = self._session.run(names, arrays, options)
        return dict(zip(names, map(torch.from_numpy, found), strict=True))


def _open_session(path: Path) -> "onnxruntime.InferenceSession":
    """Open a session with as many threads as torch uses. Raises UserError."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; they are raised, too
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's have no type of their own
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None
