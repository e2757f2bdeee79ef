"""ONNX files with sparse initializers, run by onnxruntime."""

import math

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf.message import EncodeError
from onnx import TensorProto, helper, numpy_helper

from parasparse.integrations import onnx as integration
from parasparse.integrations.onnx import pack_initializers

X = np.linspace(-1, 1, 64, dtype=np.float32).reshape(4, 16)
IMAGE = np.linspace(-1, 1, 192, dtype=np.float32).reshape(1, 3, 8, 8)


def sparse(*shape, dtype=np.float32):
    """An array that keeps one entry of ten."""
    numbers = np.arange(np.prod(shape))
    return np.where(numbers % 10 == 3, numbers % 17 - 8.5, 0).astype(dtype).reshape(shape)


def value(name, dtype=TensorProto.FLOAT, shape=None):
    return helper.make_tensor_value_info(name, dtype, shape)


def tensors(arrays):
    return [numpy_helper.from_array(array, name) for name, array in arrays.items()]


def saved(path, nodes, inputs, arrays, outputs=("y",), **options):
    """Write a model; `nodes` are (op, inputs, output, attributes)."""
    made = [helper.make_node(op, given, [out], **rest) for op, given, out, rest in nodes]
    ins = [value(name, dtype, shape) for name, (dtype, shape) in inputs.items()]
    outs = [value(name) for name in outputs]
    graph = helper.make_graph(made, "g", ins, outs, tensors(arrays))
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path, **options)


def outputs(path, feed):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [array.tobytes() for array in session.run(None, feed)]


def names(path):
    """The names of the sparse and of the dense initializers of the main graph."""
    graph = onnx.load(path).graph
    return [t.values.name for t in graph.sparse_initializer], [t.name for t in graph.initializer]


FLOATS = (TensorProto.FLOAT, None)
OPERATORS = {
    "MatMul": ([("MatMul", ["x", "w"], "y", {})], X, {"w": sparse(16, 32)}),
    "MatMul from the left": ([("MatMul", ["w", "x"], "y", {})], X, {"w": sparse(32, 4)}),
    "Gemm": ([("Gemm", ["x", "w"], "y", {"transB": 1})], X, {"w": sparse(32, 16)}),
    "Conv": ([("Conv", ["x", "w"], "y", {})], IMAGE, {"w": sparse(8, 3, 3, 3)}),
    "ConvTranspose": ([("ConvTranspose", ["x", "w"], "y", {})], IMAGE, {"w": sparse(3, 8, 3, 3)}),
    "LSTM": (
        [("LSTM", ["x", "w", "r"], "y", {"hidden_size": 8})],
        X.reshape(2, 2, 16),
        {"w": sparse(1, 32, 16), "r": sparse(1, 32, 8)},
    ),
    "Transpose": (
        [("Transpose", ["w"], "t", {}), ("MatMul", ["x", "t"], "y", {})],
        X,
        {"w": sparse(32, 16)},
    ),
    "shared": (
        [("MatMul", ["x", "w"], "t", {}), ("MatMul", ["t", "w"], "y", {})],
        X,
        {"w": sparse(16, 16)},
    ),
    "a vector": ([("Add", ["x", "w"], "y", {})], X.reshape(1, 64), {"w": sparse(64)}),
    "all zeros": ([("MatMul", ["x", "w"], "y", {})], X, {"w": np.zeros((16, 32), np.float32)}),
}


@pytest.mark.parametrize(("nodes", "x", "arrays"), OPERATORS.values(), ids=OPERATORS)
def test_outputs_are_the_same_bit_for_bit(nodes, x, arrays, tmp_path):
    dense, packed = tmp_path / "dense.onnx", tmp_path / "packed.onnx"
    saved(dense, nodes, {"x": FLOATS}, arrays)
    assert pack_initializers(dense, packed) == list(arrays)
    assert names(packed) == (list(arrays), [])
    assert outputs(packed, {"x": x}) == outputs(dense, {"x": x})
    assert packed.stat().st_size < dense.stat().st_size


def test_gather_reads_rows_of_a_packed_table(tmp_path):
    dense, packed = tmp_path / "dense.onnx", tmp_path / "packed.onnx"
    inputs = {"i": (TensorProto.INT64, [3])}
    saved(dense, [("Gather", ["w", "i"], "y", {})], inputs, {"w": sparse(32, 16)})
    assert pack_initializers(dense, packed) == ["w"]
    feed = {"i": np.array([3, 0, 31])}
    assert outputs(packed, feed) == outputs(dense, feed)


DTYPES = (
    "FLOAT DOUBLE FLOAT16 BFLOAT16 INT8 INT16 INT32 INT64 UINT8 UINT16 UINT32 UINT64 FLOAT8E4M3FN"
)


@pytest.mark.parametrize("dtype", DTYPES.split())
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
def test_every_dtype_comes_back(dtype, raw, tmp_path):
    kind = getattr(TensorProto, dtype)
    numbers = sparse(16, 32).astype(helper.tensor_dtype_to_np_dtype(kind))
    data = numbers.tobytes() if raw else numbers.flatten().tolist()
    graph = helper.make_graph(
        [helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)], "g", [], [value("y")],
        [helper.make_tensor("w", kind, numbers.shape, data, raw=raw)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.save(model, tmp_path / "dense.onnx")
    assert pack_initializers(tmp_path / "dense.onnx", tmp_path / "packed.onnx") == ["w"]
    assert outputs(tmp_path / "packed.onnx", {}) == outputs(tmp_path / "dense.onnx", {})


def test_negative_zeros_and_nan_are_kept(tmp_path):
    weight = sparse(16, 32)
    weight[0, :3] = [-0.0, np.nan, np.inf]
    saved(tmp_path / "d.onnx", [("Identity", ["w"], "y", {})], {}, {"w": weight})
    assert pack_initializers(tmp_path / "d.onnx", tmp_path / "p.onnx") == ["w"]
    assert outputs(tmp_path / "p.onnx", {}) == [weight.tobytes()]


KEPT_DENSE = {
    "few zeros": np.ones((16, 16), np.float32),
    "a scalar": np.float32(0),
    "nothing": np.zeros((0, 16), np.float32),
    "words": np.array(["", "word"] * 9, dtype=object),
}


@pytest.mark.parametrize("array", KEPT_DENSE.values(), ids=KEPT_DENSE)
def test_what_would_not_get_smaller_stays_dense(array, tmp_path):
    saved(tmp_path / "d.onnx", [("Identity", ["w"], "y", {})], {}, {"w": np.asarray(array)})
    assert pack_initializers(tmp_path / "d.onnx", tmp_path / "p.onnx") == []
    assert (tmp_path / "p.onnx").read_bytes() == (tmp_path / "d.onnx").read_bytes()


def test_inputs_and_outputs_of_the_graph_stay_dense(tmp_path):
    nodes = [("MatMul", ["x", "w"], "t", {}), ("MatMul", ["t", "v"], "y", {})]
    arrays = {"w": sparse(16, 16), "v": sparse(16, 16), "u": sparse(16, 16)}
    inputs = {"x": FLOATS, "w": (TensorProto.FLOAT, [16, 16])}
    saved(tmp_path / "d.onnx", nodes, inputs, arrays, outputs=["y", "u"])
    assert pack_initializers(tmp_path / "d.onnx", tmp_path / "p.onnx") == ["v"]
    assert names(tmp_path / "p.onnx") == (["v"], ["w", "u"])
    for feed in ({"x": X}, {"x": X, "w": np.ones((16, 16), np.float32)}):
        assert outputs(tmp_path / "p.onnx", feed) == outputs(tmp_path / "d.onnx", feed)


def branch(name, arrays):
    node = helper.make_node("MatMul", ["x", name], [f"{name}_out"])
    return helper.make_graph([node], name, [], [value(f"{name}_out")], tensors(arrays))


@pytest.mark.parametrize("inside", [True, False], ids=["in the branches", "around them"])
def test_branches_are_packed(inside, tmp_path):
    arrays = [{"a": sparse(16, 32)}, {"b": sparse(16, 32) + 0}]
    outer = [] if inside else tensors(arrays[0] | arrays[1])
    one, two = (branch(*held, held if inside else {}) for held in arrays)
    node = helper.make_node("If", ["c"], ["y"], then_branch=one, else_branch=two)
    ins = [value("x"), value("c", TensorProto.BOOL, [1])]
    graph = helper.make_graph([node], "g", ins, [value("y")], outer)
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "d.onnx")
    assert sorted(pack_initializers(tmp_path / "d.onnx", tmp_path / "p.onnx")) == ["a", "b"]
    for chosen in (True, False):
        feed = {"x": X, "c": np.array([chosen])}
        assert outputs(tmp_path / "p.onnx", feed) == outputs(tmp_path / "d.onnx", feed)


def test_external_data_comes_into_the_file(tmp_path):
    arrays = {"w": sparse(16, 32), "b": np.ones(32, np.float32)}
    nodes = [("Gemm", ["x", "w", "b"], "y", {})]
    options = {"save_as_external_data": True, "location": "d.data", "size_threshold": 0}
    saved(tmp_path / "d.onnx", nodes, {"x": FLOATS}, arrays, **options)
    expected = outputs(tmp_path / "d.onnx", {"x": X})
    assert pack_initializers(tmp_path / "d.onnx", tmp_path / "d.onnx") == ["w"]  # onto itself
    (tmp_path / "d.data").unlink()
    assert outputs(tmp_path / "d.onnx", {"x": X}) == expected


def test_the_file_keeps_to_the_format(tmp_path):
    saved(
        tmp_path / "d.onnx", [("MatMul", ["x", "w"], "y", {})], {"x": FLOATS}, {"w": sparse(16, 32)}
    )
    model = onnx.load(tmp_path / "d.onnx")
    model.ir_version = 4
    model.graph.input[0].CopyFrom(value("x", shape=[4, 16]))
    model.graph.output[0].CopyFrom(value("y", shape=[4, 32]))
    onnx.save(model, tmp_path / "d.onnx")
    pack_initializers(tmp_path / "d.onnx", tmp_path / "p.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "p.onnx"))
    (packed,) = onnx.load(tmp_path / "p.onnx").graph.sparse_initializer
    places = numpy_helper.to_array(packed.indices)
    assert places.dtype == np.int64
    assert places.tolist() == sparse(16, 32).flatten().nonzero()[0].tolist()


def test_a_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    saved(
        tmp_path / "d.onnx", [("MatMul", ["x", "w"], "y", {})], {"x": FLOATS}, {"w": sparse(16, 32)}
    )
    monkeypatch.setattr("parasparse.integrations.onnx._LONGEST", 100)
    with pytest.raises(ValueError, match="less than 2 GiB"):
        pack_initializers(tmp_path / "d.onnx", tmp_path / "p.onnx")
    with pytest.raises(FileNotFoundError):
        pack_initializers(tmp_path / "nowhere.onnx", tmp_path / "p.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["d.onnx"]


def test_a_message_that_protobuf_cannot_encode_is_too_large(tmp_path, monkeypatch):
    class Large:
        def ByteSize(self):
            raise EncodeError

    assert integration._bytes(Large()) > integration._LONGEST
    saved(tmp_path / "d.onnx", [("Identity", ["w"], "y", {})], {}, {"w": sparse(16, 32)})
    monkeypatch.setattr(integration, "_bytes", lambda _: math.inf)
    with pytest.raises(ValueError, match="external data"):
        pack_initializers(tmp_path / "d.onnx", tmp_path / "p.onnx")


def test_float32_is_a_sixth_at_ninety_percent(tmp_path):
    weight = sparse(512, 1024)
    saved(tmp_path / "d.onnx", [("MatMul", ["x", "w"], "y", {})], {"x": FLOATS}, {"w": weight})
    pack_initializers(tmp_path / "d.onnx", tmp_path / "p.onnx")
    assert (tmp_path / "p.onnx").stat().st_size < 0.18 * weight.nbytes
