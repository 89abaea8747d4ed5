"""A model of transformers as an ONNX graph."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiment.errors import UserError
from experiment.transformers_logging import quiet_transformers
from finetune.loaded_model import LoadedModel
from finetune.onnx_model import HIDDEN, PRECISION

_HEADS = ("logits", "start_logits", "end_logits")
"""What transformers calls the outputs of heads."""

# Sizes of the example. torch.export takes sizes of 0 and 1, and equal ones, for constants.
_BATCH, _CHOICES, _TOKENS = 2, 3, 5


class ModelGraph(nn.Module):
    """A model as a function of tensors. Its outputs are those of the head, and the hidden states of the encoder."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Inputs are ST, or for multiple choice BST: of B questions with S choices each."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        hidden: list[Tensor] = []
        encoder = self.model.base_model
        hook = encoder.register_forward_hook(lambda _module, _inputs, found: hidden.append(found.last_hidden_state))
        try:
            outputs = self.model(**inputs)
        finally:
            hook.remove()
        return {**{name: outputs[name] for name in _HEADS if name in outputs}, HIDDEN: hidden[0]}


def takes_choices(model: PreTrainedModel) -> bool:
    """Whether inputs are BST, not ST."""
    return type(model).__name__.endswith("ForMultipleChoice")


def write_graph(loaded: LoadedModel, path: Path) -> None:
    """Write a model, on the CPU in fp32, with its weights; those of more than 2 GB to a file beside.

    Raises UserError for a model that torch.onnx cannot export.
    """
    model = ModelGraph(loaded.model).eval()
    inputs, sizes = _example_inputs(loaded)
    with quiet():
        with torch.inference_mode():
            outputs = list(model(**inputs))
        try:
            program = torch.onnx.export(
                model,
                kwargs=inputs,
                input_names=list(inputs),
                output_names=outputs,
                dynamic_shapes=dict.fromkeys(inputs, sizes),
                dynamo=True,
                verbose=False,
            )
            assert program is not None
        except Exception as error:  # of torch.export, of the conversion, or of the model
            reason = str(error.__cause__ or error).strip().partition("\n")[0]
            name = loaded.model.config.model_type
            raise UserError(f"{loaded.folder}: torch.onnx cannot export this {name} model: {reason}") from error
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # stack traces, with paths of this machine
        program.model.metadata_props[PRECISION] = "fp32"
        program.save(path)


def _example_inputs(loaded: LoadedModel) -> tuple[dict[str, Tensor], dict[int, str]]:
    """Inputs of a model, and the names of their dimensions, which may have any size."""
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * loaded.encoder.token_types
    tokens = loaded.padding.length or _TOKENS
    choices = takes_choices(loaded.model)
    shape = (_BATCH, _CHOICES, tokens) if choices else (_BATCH, tokens)
    sizes = ("questions", "choices", "tokens") if choices else ("sequences", "tokens")
    return {name: torch.ones(shape, dtype=torch.long) for name in names}, dict(enumerate(sizes))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch.onnx and onnxruntime.quantization log and print, such as the graph of a failed export."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    nowhere = io.StringIO()
    try:
        with (
            quiet_transformers(),
            warnings.catch_warnings(action="ignore"),
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            yield
    finally:
        logging.disable(level)
