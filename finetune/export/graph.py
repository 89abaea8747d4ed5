"""Write a model as an ONNX graph, in fp32 or int8."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiment.errors import UserError
from experiment.models.transformers_models import quiet_transformers
from finetune.prediction.loaded_model import LoadedModel
from finetune.prediction.onnx_model import HIDDEN, PADDING, PRECISION

_HEADS = ("logits", "start_logits", "end_logits")
"""Names of the outputs of heads in transformers."""

# Sizes of the example. torch.export takes sizes of 0 and 1, and equal ones, for constants.
_BATCH, _CHOICES, _TOKENS = 2, 3, 5

_LARGEST = 127  # int8
_MOST_BYTES = 1536 * 2**20  # of weights in one file: torch.onnx writes more to a second one


class ModelGraph(nn.Module):
    """A model as a function of tensors. It returns the outputs of the head, and the hidden states of the encoder."""

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
    """Return whether inputs are BST, not ST."""
    return type(model).__name__.endswith("ForMultipleChoice")


def write_graph(loaded: LoadedModel, path: Path) -> None:
    """Write a model, on the CPU in fp32, with its weights, which go to a file beside it above 1.5 GiB.

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
        if loaded.padding.is_avoided:
            program.model.metadata_props[PADDING] = "avoided"
        program.save(path)


def _example_inputs(loaded: LoadedModel) -> tuple[dict[str, Tensor], dict[int, str]]:
    """Return the inputs of a model, and the names of their dimensions, which may have any size."""
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * loaded.encoder.token_types
    tokens = loaded.padding.length or _TOKENS
    choices = takes_choices(loaded.model)
    shape = (_BATCH, _CHOICES, tokens) if choices else (_BATCH, tokens)
    sizes = ("questions", "choices", "tokens") if choices else ("sequences", "tokens")
    return {name: torch.ones(shape, dtype=torch.long) for name in names}, dict(enumerate(sizes))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence torch.onnx and onnxruntime.quantization, which print the graph of a failed export, among others."""
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


def check_quantizable(model: nn.Module) -> None:
    """Raise UserError for a model with more weights than `quantize` takes."""
    if (size := sum(parameter.nbytes for parameter in model.parameters())) > _MOST_BYTES:
        raise _too_large(size)


def _too_large(size: int) -> UserError:
    most = f"at most {_MOST_BYTES / 2**30:g} GiB can be quantized"
    return UserError(f"--int8: the model has {size / 2**30:.2f} GiB of weights in fp32; {most}")


def quantize(path: Path) -> None:
    """Replace a model in fp32. Raises UserError if its weights are in a second file."""
    if path.stat().st_size < (size := sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))):
        raise _too_large(size)
    model = onnx.load(path)
    del model.graph.value_info[:]  # it has the shapes of weights before quantize_dynamic transposes them
    _transpose_weights(model.graph)
    _quantize_embeddings(model.graph)
    properties = {each.key: each.value for each in model.metadata_props}
    helper.set_model_props(model, properties | {PRECISION: "int8"})
    with quiet():
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,  # 7 bits: with 8, sums of products overflow on CPUs without VNNI
            weight_type=QuantType.QInt8,
        )


def _transpose_weights(graph: GraphProto) -> None:
    """Store weights as they are multiplied. An output layer tied to the embeddings is their transpose otherwise, which
    is not a constant that can be quantized."""
    weights = {each.name: each for each in graph.initializer}
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if node.op_type == "Transpose" and node.input[0] in weights and len(weights[node.input[0]].dims) == 2:
            transposed = np.ascontiguousarray(numpy_helper.to_array(weights[node.input[0]]).T)
            graph.initializer.append(numpy_helper.from_array(transposed, node.output[0]))
            del graph.node[index]


def _quantize_embeddings(graph: GraphProto) -> None:
    """Store embeddings in int8. The rows that are looked up are converted to fp32."""
    tables = {
        each.name: each for each in graph.initializer if each.data_type == TensorProto.FLOAT and len(each.dims) == 2
    }
    looked_up = {node.input[0] for node in graph.node if _is_lookup(node)} & tables.keys()
    for name in looked_up:
        table_VD = numpy_helper.to_array(tables[name])
        scale_V1 = np.abs(table_VD).max(axis=1, keepdims=True) / _LARGEST
        rounded_VD = np.rint(table_VD / np.where(scale_V1 == 0, 1, scale_V1)).astype(np.int8)
        graph.initializer.append(numpy_helper.from_array(rounded_VD, f"{name}_int8"))
        graph.initializer.append(numpy_helper.from_array(scale_V1, f"{name}_scale"))
    nodes = [
        new
        for node in graph.node
        for new in (_int8_lookup(node) if _is_lookup(node) and node.input[0] in looked_up else [node])
    ]
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in used:
            del graph.initializer[index]


def _is_lookup(node: NodeProto) -> bool:
    return node.op_type == "Gather" and all(attribute.i == 0 for attribute in node.attribute)  # axis


def _int8_lookup(node: NodeProto) -> Iterator[NodeProto]:
    """Yield the nodes that take the place of a lookup."""
    (table, ids), (found,) = node.input, node.output
    yield helper.make_node("Gather", [f"{table}_int8", ids], [f"{found}_int8"])
    yield helper.make_node("Gather", [f"{table}_scale", ids], [f"{found}_scale"])
    yield helper.make_node("Cast", [f"{found}_int8"], [f"{found}_cast"], to=TensorProto.FLOAT)
    yield helper.make_node("Mul", [f"{found}_cast", f"{found}_scale"], [found])
