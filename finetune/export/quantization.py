"""Quantize an ONNX model to int8: weights when it is written, activations while it computes ("dynamic").

Matrices have a scale for each column, embeddings one for each row.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from experiment.errors import UserError
from finetune.export.graph import quiet
from finetune.onnx_model import PRECISION

_LARGEST = 127  # int8


def quantize(path: Path) -> None:
    """Replace a model in fp32. Raises UserError for one of more than 2 GB."""
    if path.stat().st_size < sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")):
        raise UserError("--int8: the model has more than 2 GB of weights, which onnxruntime cannot quantize")
    model = onnx.load(path)
    del model.graph.value_info[:]  # it has the shapes of weights before quantize_dynamic transposes them
    _transpose_weights(model.graph)
    _quantize_embeddings(model.graph)
    helper.set_model_props(model, {PRECISION: "int8"})
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
    """The nodes that take the place of a lookup."""
    (table, ids), (found,) = node.input, node.output
    yield helper.make_node("Gather", [f"{table}_int8", ids], [f"{found}_int8"])
    yield helper.make_node("Gather", [f"{table}_scale", ids], [f"{found}_scale"])
    yield helper.make_node("Cast", [f"{found}_int8"], [f"{found}_cast"], to=TensorProto.FLOAT)
    yield helper.make_node("Mul", [f"{found}_cast", f"{found}_scale"], [found])
