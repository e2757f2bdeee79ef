"""ONNX files whose weights are stored without their zeros."""

import math
from collections.abc import Iterator
from typing import Any

from parasparse.files.headers import FilePath
from parasparse.files.replacing import replacing
from parasparse.text import needs

try:
    import onnx
    from google.protobuf.message import EncodeError  # type: ignore[import-untyped]
    from onnx import numpy_helper
except ImportError as error:
    error.add_note(needs("parasparse.integrations.onnx", "onnx", "onnx"))
    raise

_LONGEST = 2**31 - 1  # bytes of an ONNX file
_FIRST_IR_VERSION = 6  # of ONNX, with sparse initializers
_NAMES = [
    "FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "BOOL",
    "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64",
    "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ",
]  # fmt: skip
_DTYPES = {getattr(onnx.TensorProto, name) for name in _NAMES}


def pack_initializers(source: FilePath, target: FilePath) -> list[str]:
    """Write an ONNX file with sparse initializers where they are smaller; return their names.

    A sparse initializer holds the nonzero values of a weight and their places: for float32 at 90%,
    about a sixth of the bytes. onnxruntime makes it dense when it loads the file, so outputs are
    the same bit for bit, and time and memory are those of the dense file. An entry is zero if all
    its bits are, so -0.0 and nan payloads are kept. Subgraphs are packed too. Tensors that are also
    inputs or outputs of their graph stay dense.

    Most other tools do not know sparse initializers: `onnx.checker.check_model` raises with
    `full_check=True`, `onnx.reference.ReferenceEvaluator` raises, and onnx_ir takes the weights for
    inputs. Optimize and quantize first, and pack last.

    Args:
        source: an ONNX file, with its external data beside it if it has any; is not changed.
        target: the file to write, a single one. It may be `source`.

    Raises:
        FileNotFoundError: `source` or its external data does not exist.
        ValueError: `target` would take 2 GiB or more, which a single ONNX file cannot.

    Examples:
        >>> import tempfile
        >>> from onnx import helper, numpy_helper
        >>> eye = numpy_helper.from_array(torch.eye(64).numpy(), "eye")
        >>> y = helper.make_tensor_value_info("y", eye.data_type, [64, 64])
        >>> node = helper.make_node("Neg", ["eye"], ["y"])
        >>> model = helper.make_model(helper.make_graph([node], "g", [], [y], [eye]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     onnx.save(model, f"{folder}/eye.onnx")
        ...     pack_initializers(f"{folder}/eye.onnx", f"{folder}/packed.onnx")
        ['eye']
    """
    model = onnx.load(source)
    names = [name for graph in _graphs(model.graph) for name in _pack(graph)]
    if names:
        model.ir_version = max(model.ir_version, _FIRST_IR_VERSION)
    if _bytes(model) > _LONGEST:
        raise ValueError(
            f'`target` must take less than 2 GiB; "{source}" would take more, with {len(names)} '
            "sparse initializers. Leave the file as it is, with external data."
        )
    with replacing(target) as file:
        file.write(model.SerializeToString())
    return names


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield `graph` and the graphs inside its nodes, such as the branches of If."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else []
            for each in (*inner, *attribute.graphs):
                yield from _graphs(each)


def _pack(graph: Any) -> list[str]:
    """Move initializers of `graph` to the sparse ones; return their names."""
    fixed = {value.name for value in (*graph.input, *graph.output)}
    packed = {}
    for place, tensor in enumerate(graph.initializer):
        sparse = None if tensor.name in fixed else _sparse(tensor)
        if sparse is not None:
            packed[place] = sparse
    for place in reversed(packed):
        del graph.initializer[place]
    graph.sparse_initializer.extend(packed.values())
    return [sparse.values.name for sparse in packed.values()]


def _sparse(tensor: Any) -> Any:
    """Return `tensor` as a SparseTensorProto, or None if that is not smaller."""
    if tensor.data_type not in _DTYPES:
        return None
    flat = numpy_helper.to_array(tensor).reshape(-1)
    bits = flat.view(f"u{flat.itemsize}")
    (places,) = bits.nonzero()
    if len(places) * (flat.itemsize + 1) >= flat.nbytes:  # a place takes a byte or more
        return None
    values = onnx.TensorProto(
        name=tensor.name, data_type=tensor.data_type, dims=[len(places)],
        raw_data=bits[places].tobytes(),
    )  # fmt: skip
    # The format wants int64. As `int64_data`, numbers below 2**21 take three bytes or fewer, and in
    # `raw_data` eight.
    indices = onnx.TensorProto(
        name=f"{tensor.name}_indices", data_type=onnx.TensorProto.INT64, dims=[len(places)],
        int64_data=places.tolist(),
    )  # fmt: skip
    sparse = onnx.SparseTensorProto(values=values, indices=indices, dims=tensor.dims)
    return sparse if _bytes(sparse) < _bytes(tensor) else None


def _bytes(message: Any) -> float:
    """Return the bytes of a message; infinity for 2 GiB or more, which protobuf cannot encode."""
    try:
        return int(message.ByteSize())
    except EncodeError:
        return math.inf
