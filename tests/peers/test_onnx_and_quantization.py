"""Squashed, then exported to ONNX and run by onnxruntime; squashed, then quantized."""

import inspect
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

import parasparse as ps

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's, quantization's own


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.body = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.body(self.embedding(x))[0])


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def encoder():
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)


MODELS = {
    "convolutions": (convolutions, lambda: torch.randn(2, 3, 8, 8)),
    "attention": (encoder, lambda: torch.randn(2, 5, 16)),
    "tied LSTM": (Tied, lambda: torch.randint(20, (2, 5))),
}


def exported(model, x, path):
    """Write `model` to `path`; return its program as ONNX."""
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    return onnx.load(path)


def outputs(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def zeros(program):
    return sum(
        int((numpy_helper.to_array(tensor) == 0).sum())
        for tensor in program.graph.initializer
        if len(tensor.dims) >= 2
    )


@pytest.mark.parametrize(("build", "inputs"), MODELS.values(), ids=MODELS)
def test_squashed_models_give_the_same_outputs_in_onnxruntime(build, inputs, tmp_path):
    torch.manual_seed(0)
    model, x = build().eval(), inputs()
    dense = exported(model, x, tmp_path / "dense.onnx")
    ps.sparsify(model, 0.8)
    masked = model(x)
    dropped = sum(int((~mask).sum()) for _, mask in ps.named_masks(model))
    ps.squash(model)
    program = exported(model, x, tmp_path / "sparse.onnx")

    # Rounds of float32 in another order.
    torch.testing.assert_close(outputs(tmp_path / "sparse.onnx", x), masked, rtol=1e-4, atol=1e-5)
    counts = [Counter(node.op_type for node in p.graph.node) for p in (program, dense)]
    assert counts[0] == counts[1]  # no trace of the masks
    assert zeros(program) - zeros(dense) >= dropped


def test_shrunk_models_give_the_same_outputs_in_onnxruntime(tmp_path):
    model, x = convolutions().eval(), torch.randn(2, 3, 8, 8)
    ps.sparsify(model, {"0": ps.Prune(0.5, pattern=ps.patterns.channel(0))})
    masked = model(x).detach()
    exported(ps.shrink(model, x), x, tmp_path / "small.onnx")
    torch.testing.assert_close(outputs(tmp_path / "small.onnx", x), masked, rtol=1e-4, atol=1e-5)


def linear():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    return ps.sparsify(model, 0.8), torch.randn(5, 16)


def quantized_weight(program, layer):
    """Return the weight of `layer`, by what it is: names change between quantizers."""
    tensors = [numpy_helper.to_array(tensor) for tensor in program.graph.initializer]
    shape = (layer.out_features, layer.in_features)  # transposed or not
    (weight,) = (
        tensor if tensor.shape == shape else tensor.T
        for tensor in tensors
        if tensor.dtype == np.int8 and shape in (tensor.shape, tensor.shape[::-1])
    )
    return weight


def test_zeros_stay_zero_when_the_onnx_program_is_quantized(tmp_path):
    model, x = linear()
    expected = ps.squash(model)(x).detach()
    exported(model, x, tmp_path / "m.onnx")
    quant_pre_process(tmp_path / "m.onnx", tmp_path / "p.onnx")
    quantize_dynamic(tmp_path / "p.onnx", tmp_path / "q.onnx", weight_type=QuantType.QInt8)
    for layer in (model[0], model[2]):
        weight = quantized_weight(onnx.load(tmp_path / "q.onnx"), layer)
        # Small weights may be rounded to 0 as well.
        assert len(np.unique(weight[(layer.weight.detach() == 0).numpy()])) == 1
    torch.testing.assert_close(outputs(tmp_path / "q.onnx", x), expected, rtol=0.05, atol=0.02)


class Batches(CalibrationDataReader):
    def __init__(self, name, *batches):
        self.left = [{name: batch.numpy()} for batch in batches]

    def get_next(self):
        return self.left.pop() if self.left else None


def test_zeros_stay_zero_when_the_onnx_program_is_quantized_with_data(tmp_path):
    model, x = linear()
    expected = ps.squash(model)(x).detach()
    name = exported(model, x, tmp_path / "m.onnx").graph.input[0].name
    batches = Batches(name, x, x)
    quantize_static(tmp_path / "m.onnx", tmp_path / "q.onnx", batches, weight_type=QuantType.QInt8)
    for layer in (model[0], model[2]):
        weight = quantized_weight(onnx.load(tmp_path / "q.onnx"), layer)
        assert len(np.unique(weight[(layer.weight.detach() == 0).numpy()])) == 1
    torch.testing.assert_close(outputs(tmp_path / "q.onnx", x), expected, rtol=0.05, atol=0.05)


def in_few_bits(program, bits, *, symmetric):
    if "bits" not in inspect.signature(MatMulNBitsQuantizer).parameters:
        pytest.skip("this onnxruntime quantizes to 4 bits alone, under another name")
    quantizer = MatMulNBitsQuantizer(program, bits=bits, block_size=16, is_symmetric=symmetric)
    quantizer.process()
    return quantizer.model.model


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zero_in_blocks_of_few_bits(bits, symmetric, tmp_path):
    torch.manual_seed(0)
    layer = ps.squash(ps.sparsify(nn.Linear(16, 32, bias=False), 0.8))
    rows = torch.eye(16)[None]  # the outputs are the weight; 3-D, so the layer is a MatMul
    program = in_few_bits(exported(layer, rows, tmp_path / "m.onnx"), bits, symmetric=symmetric)
    onnx.save(program, tmp_path / "q.onnx")
    weight = outputs(tmp_path / "q.onnx", rows)[0].T
    assert not weight[layer.weight == 0].any()
    torch.testing.assert_close(weight, layer.weight.detach(), rtol=0, atol=0.05)


def test_a_layer_of_matrices_is_not_quantized_to_few_bits(tmp_path):
    """docs/how-to/quantize.md says so: if this changes, so does the page."""
    model, x = linear()
    program = exported(ps.squash(model), x, tmp_path / "m.onnx")
    nodes = {node.op_type for node in in_few_bits(program, 4, symmetric=True).graph.node}
    assert nodes == {"Gemm", "Relu"}


def test_zeros_stay_zero_when_torch_quantizes():
    model, x = linear()
    expected = ps.squash(model)(x).detach()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    for number in (0, 2):
        assert not quantized[number].weight().dequantize()[model[number].weight == 0].any()
    torch.testing.assert_close(quantized(x).detach(), expected, rtol=0.05, atol=0.02)


def test_zeros_stay_zero_in_quantization_aware_training():
    """Fuse, prepare, and then attach masks: torch does not fuse layers that have masks."""
    quantization = torch.ao.quantization
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(quantization.QuantStub(), *body, nn.Linear(32, 4))
    model.append(quantization.DeQuantStub())
    model = quantization.fuse_modules_qat(model, [["1", "2", "3"]])
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    model = ps.sparsify(quantization.prepare_qat(model), 0.75)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 4, 4)).square().sum().backward()
        optimizer.step()
    dropped = {name: ~mask for name, mask in ps.named_masks(model)}
    assert dropped.keys() == {"1.weight", "5.weight"}
    quantized = quantization.convert(ps.squash(model).eval())
    for name, mask in dropped.items():
        weight = quantized.get_submodule(name[0]).weight().dequantize()
        assert not weight[mask].any()


def test_the_other_order_is_refused():
    """Masks first, squash, then quantize: a masked layer is no plain one, a quantized no float."""
    model, _ = linear()
    with pytest.raises(AssertionError):  # torch's own
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert ps.is_sparse(model)
    quantized = torch.ao.quantization.quantize_dynamic(ps.squash(model), {nn.Linear})
    with pytest.raises(ValueError, match="must each reach a tensor"):
        ps.sparsify(quantized, 0.9)
