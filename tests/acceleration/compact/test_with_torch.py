"""A compact model under what torch does with models: transforms, exporters, copies, averages."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import parasparse as ps
from parasparse.acceleration.compact.weight import CompactWeight
from tests.helpers.machine import needs_mkl

pytestmark = needs_mkl


def x(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


X = x(5, 8)
VALUES = "0.parametrizations.weight.original"


def masked(dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Linear(8, 6), nn.Tanh(), nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 4, 1), nn.Flatten()
    return ps.sparsify(nn.Sequential(*layers).to(dtype), 0.5)


def both(dtype=torch.float64):
    model = masked(dtype)
    return model, ps.compact(copy.deepcopy(model))


def close(got, want, dtype=torch.float64):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def dense_grads(model):
    """Return the gradients, those of values at their places."""
    return [
        grad_of(model[int(name[0])], parameter.grad) if "original" in name else parameter.grad
        for name, parameter in model.named_parameters()
    ]


def grad_of(layer, values):
    stack = layer.parametrizations.weight
    return stack[0](values) if stack.is_compact else values


def plain(model):
    model(X).square().sum().backward()


def accumulated(model):
    for part in X.split(2):
        model(part).square().sum().backward()


def clipped(model):
    plain(model)
    clip_grad_norm_(model.parameters(), 0.1)


def reentrant(model):
    checkpoint(model, X.clone().requires_grad_(), use_reentrant=True).square().sum().backward()


def not_reentrant(model):
    checkpoint(model, X, use_reentrant=False).square().sum().backward()


def twice(model):
    first = torch.autograd.grad(
        model(X).square().sum(), list(model.parameters()), create_graph=True
    )
    sum(each.square().sum() for each in first).backward()


WAYS = [plain, accumulated, clipped, reentrant, not_reentrant, twice]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_gradients_are_those_of_the_masked_model(way):
    models = both()
    for model in models:
        way(model)
    close(dense_grads(models[1]), dense_grads(models[0]))


def test_a_step_under_autocast_with_a_scaled_loss():
    models = both(torch.float32)
    for model in models:
        optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu")
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(X.float()).square().sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    got, want = ps.dense_state_dict(models[1]), ps.dense_state_dict(models[0])
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


def test_transforms_of_torch_func():
    model, compact = both()
    parameters = [dict(each.named_parameters()) for each in (model, compact)]

    def loss(each, tensors, inputs=X):
        return functional_call(each, tensors, (inputs,)).square().sum()

    want = grad(lambda tensors: loss(model, tensors))(parameters[0])
    found = grad(lambda tensors: loss(compact, tensors))(parameters[1])
    close(compact[0].parametrizations.weight[0](found[VALUES]), want[VALUES])
    one_by_one = vmap(grad(lambda t, row: loss(compact, t, row[None])), (None, 0))(parameters[1], X)
    close(one_by_one[VALUES].sum(0), found[VALUES])
    close(vmap(lambda row: compact(row[None])[0])(X), model(X))
    close(jvp(compact, (X,), (torch.ones_like(X),)), jvp(model, (X,), (torch.ones_like(X),)))
    with forward_ad.dual_level():
        given = forward_ad.make_dual(X, torch.ones_like(X))
        close(*(forward_ad.unpack_dual(each(given)).tangent for each in (compact, model)))


def every_output(y):
    """Return a gradient of `y` for each entry of it."""
    return torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)


def vectorized(y, tensors):
    return torch.autograd.grad(y, tensors, every_output(y), is_grads_batched=True)


def mapped(y, tensors):
    grads = vmap(lambda g: torch.autograd.grad(y, tensors, g, retain_graph=True))
    return grads(every_output(y))


def of_second_order(y, tensors):
    (first,) = torch.autograd.grad(y.square().sum(), tensors[1], create_graph=True)
    return vectorized(first, tensors)


def forward_over_reverse(y, tensors):
    with forward_ad.dual_level():
        given = forward_ad.make_dual(torch.ones_like(y), torch.full_like(y, 2))
        found = torch.autograd.grad(y, tensors, given)
        return [forward_ad.unpack_dual(each).tangent for each in found]


@pytest.mark.parametrize("way", [vectorized, mapped, of_second_order, forward_over_reverse])
def test_backward_passes_under_transforms(way):
    models, found = both(), []
    for model in models:
        inputs = X.clone().requires_grad_()
        stored = model[0].parametrizations.weight.original
        of_weight, of_inputs = way(model(inputs), (stored, inputs))
        found.append((of_weight, of_inputs))
    places = models[1][0].parametrizations.weight[0]
    kept = found[0][0].flatten(-2)[..., places.positions()]
    close(found[1], (kept, found[0][1]))


def strict(model):
    return torch.export.export(model, (X,), strict=True).module()


def not_strict(model):
    return torch.export.export(model, (X,), strict=False).module()


@pytest.mark.parametrize("export", [strict, not_strict], ids=lambda each: each.__name__)
def test_exported_programs_compute_with_dense_values(export):
    model, compact = both()
    program = export(compact.eval())
    assert "parasparse" not in program.code
    close(program(X), model(X))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch deprecates `jit.trace`
def test_traced_programs_compute_with_dense_values():
    model, compact = both()
    close(torch.jit.trace(compact, X)(2 * X), model(2 * X))


class Written(nn.Module):
    """A layer whose forward torch.fx traces."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(x(6, 8))

    def forward(self, inputs):
        return F.linear(inputs, self.weight)


def test_torch_fx_sees_the_values():
    model = ps.compact(ps.sparsify(Written(), 0.5))
    traced = torch.fx.symbolic_trace(model)
    close(traced(X), model(X))
    with torch.no_grad():
        model.parametrizations.weight.original.mul_(2)
    close(traced(X), model(X))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:# 'dynamic_axes'")
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_files_have_dense_products(tmp_path, dynamo):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, compact = both(torch.float32)
    path = tmp_path / "model.onnx"
    torch.onnx.export(compact.eval(), (X.float(),), path, dynamo=dynamo, verbose=False)
    session = runtime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: X.float().numpy()})
    close(torch.from_numpy(found), model(X.float()).detach(), torch.float32)


def test_fake_tensors_pass_through():
    compact = both()[1]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert compact(mode.from_tensor(X)).shape == (5, 4)


COMPILED = {
    "linear and convolution": (lambda: masked(torch.float32), (x(5, 8).float(),)),
    "k x k convolution": (lambda: ps.sparsify(nn.Conv2d(3, 4, 3), 0.5), (x(1, 3, 5, 5).float(),)),
    "embedding": (
        lambda: ps.sparsify(nn.Embedding(6, 4), {"weight": 0.5}), (torch.tensor([[1, 5]]),)
    ),
    "cross attention": (
        lambda: ps.sparsify(nn.MultiheadAttention(8, 2, batch_first=True), 0.5),
        (x(2, 3, 8).float(), x(2, 5, 8).float(), x(2, 5, 8).float()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_models_compile_in_one_graph(name):
    build, inputs = COMPILED[name]
    torch.manual_seed(0)
    model = build()
    compact = ps.compact(copy.deepcopy(model))
    torch._dynamo.reset()
    compiled = torch.compile(compact, backend="aot_eager", fullgraph=True)
    found = [torch.utils._pytree.tree_leaves(each(*inputs))[0] for each in (compiled, model)]
    close(*found, torch.float32)
    for each in found:
        each.square().sum().backward()
    close(first_grad(compact), first_grad(model), torch.float32)


def first_grad(model):
    """Return the gradient of the first weight."""
    layer = next(layer for layer in model.modules() if parametrize.is_parametrized(layer))
    stack = next(iter(layer.parametrizations.values()))
    return stack[0](stack.original.grad) if stack.is_compact else stack.original.grad


def test_gradients_of_a_complex_model():
    torch.manual_seed(0)
    model = ps.sparsify(nn.Linear(5, 4, dtype=torch.complex128), 0.5)
    compact = ps.compact(copy.deepcopy(model))
    inputs, grads = x(3, 5, dtype=torch.complex128).requires_grad_(), []
    for each in (model, compact):
        inputs.grad = None
        out = each(inputs)
        (out.abs().square().sum() + out.real.sum()).backward()
        values = grad_of(each, each.parametrizations.weight.original.grad)
        grads.append([out.detach(), inputs.grad, values, each.bias.grad])
    close(*grads)
    with torch.no_grad():
        assert (compact.weight * 1).equal(model.weight)


def test_averages_of_models():
    models = both()
    averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5)) for m in models]
    for model, average in zip(models, averages, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
            average.update_parameters(model)
    close(averages[1](X), averages[0](X))
    assert list(dict(ps.named_masks(averages[1]))) == ["0.weight", "3.weight"]


def test_reading_in_inference_mode_leaves_training_possible():
    model, compact = both()
    with torch.inference_mode():
        close(compact(X), model(X))
    plain(compact)


def test_torchs_cache_of_parametrizations_holds_the_weight():
    model, compact = both()
    with parametrize.cached():
        close(compact(X), model(X))
        assert compact[0].weight is compact[0].weight


def test_without_gradients_nothing_is_recorded():
    compact = both()[1].requires_grad_(False)
    assert not compact(X).requires_grad
    assert not compact[0].weight.requires_grad
    given = X.clone().requires_grad_()
    compact(given).sum().backward()
    assert given.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_mkl(monkeypatch, dtype):
    models = [model.to(dtype) for model in both()]
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    for rows in (1, 5):
        found = []
        for model in models:
            model.zero_grad()
            out = model(X[:rows].to(dtype))
            out.square().sum().backward()
            found.append([out.detach(), *dense_grads(model)])
        tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


def lookup(**options):
    return nn.Embedding(6, 4, **options)


LAYERS = {
    "an empty row": (lambda: nn.Linear(3, 3), [[1, 0, 0], [0, 0, 0], [0, 1, 1]], (x(4, 3),)),
    "an empty column": (lambda: nn.Linear(3, 2), [[1, 0, 0], [1, 0, 1]], (x(4, 3),)),
    "nothing kept": (lambda: nn.Linear(3, 2), [[0, 0, 0], [0, 0, 0]], (x(4, 3),)),
    "all kept": (lambda: nn.Linear(3, 2), [[1, 1, 1], [1, 1, 1]], (x(4, 3),)),
    "one output": (lambda: nn.Linear(5, 1), 0.5, (x(4, 5),)),
    "one input": (lambda: nn.Linear(1, 5), 0.5, (x(4, 1),)),
    "1 x 1, groups": (lambda: nn.Conv2d(4, 6, 1, groups=2), 0.5, (x(2, 4, 3, 3),)),
    "1 x 1, padding": (lambda: nn.Conv2d(4, 6, 1, padding=1, stride=2), 0.5, (x(2, 4, 3, 3),)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), 0.5, (x(2, 4, 3, 3),)),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), 0.5, (x(2, 3), x(2, 4))),
    "embedding": (lookup, 0.5, (torch.tensor([1, 1, 5]),)),
    "embedding, padding": (lambda: lookup(padding_idx=1), 0.5, (torch.tensor([1, 1, 5]),)),
    "embedding, sparse": (lambda: lookup(sparse=True), 0.5, (torch.tensor([1, 1, 5]),)),
    "bag, sparse": (
        lambda: nn.EmbeddingBag(6, 4, sparse=True, mode="sum"), 0.5, (torch.tensor([[1, 1, 5]]),)
    ),
    "lstm cell": (lambda: nn.LSTMCell(3, 4), 0.5, (x(2, 3),)),
    "gru cell": (lambda: nn.GRUCell(3, 4, bias=False), 0.5, (x(2, 3), x(2, 4))),
    "rnn cell": (lambda: nn.RNNCell(3, 4), 0.5, (x(2, 3),)),
    "relu cell": (lambda: nn.RNNCell(3, 4, nonlinearity="relu"), 0.5, (x(3),)),
    "no rows": (lambda: nn.Linear(3, 2), 0.5, (x(0, 3),)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_and_shapes(name):
    build, treatment, inputs = LAYERS[name]
    torch.manual_seed(0)
    model = build().double()
    names = [n for n, p in model.named_parameters() if n.startswith("weight")]
    chosen = treatment if isinstance(treatment, float) else torch.tensor(treatment)
    ps.sparsify(model, dict.fromkeys(names, chosen))
    compact = ps.compact(copy.deepcopy(model))
    found = []
    for each in (compact, model):
        (out, *_) = torch.utils._pytree.tree_leaves(each(*inputs))
        out.square().sum().backward()
        grads = {}
        for attr in names:
            stack = each.parametrizations[attr]
            given = stack.original.grad.to_dense()
            grads[attr] = stack[0](given) if stack.is_compact else given
        found.append((out.detach(), grads))
    close(*found)


def test_conv1d_of_transformers():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    model = ps.sparsify(pytorch_utils.Conv1D(6, 4).double(), 0.5)
    compact = ps.compact(copy.deepcopy(model))
    inputs = x(2, 3, 4)
    for each in (compact, model):
        each(inputs).square().sum().backward()
    close(compact(inputs), model(inputs))
    stack = compact.parametrizations.weight
    close(stack[0](stack.original.grad), model.parametrizations.weight.original.grad)


def test_transposed_readings_are_right():
    model, compact = both()
    want, weight = X @ model[0].weight.T, compact[0].weight
    for read in (weight.t(), weight.T, weight.mT, weight.transpose(0, 1)):
        close(X @ read, want)
    close(weight @ X.T, want.T)


def test_a_weight_that_was_read_is_copied_and_saved_as_dense_values():
    model, compact = both()
    with torch.no_grad():
        weight = compact[0].weight
    for made in (copy.deepcopy(weight.detach()), weight.data, weight.clone(), weight.detach()):
        assert type(made) is torch.Tensor
        assert made.equal(model[0].weight)
    assert pickle.loads(pickle.dumps(weight.detach())).equal(model[0].weight)


def test_models_change_their_dtype_and_layout():
    compact = both()[1]
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        compact.to(dtype)
        layers = [compact[0], compact[3]]
        assert all(layer.parametrizations.weight.original.dtype == dtype for layer in layers)
        indices = [t for layer in layers for t in layer.parametrizations.buffers()]
        assert all(index.dtype == torch.int32 for index in indices)
        assert compact(X.to(dtype)).dtype == dtype
    images, conv = x(2, 3, 5, 5), ps.sparsify(nn.Conv2d(3, 4, 3).double(), 0.5)
    want = conv(images)
    ps.compact(conv).to(memory_format=torch.channels_last)
    close(conv(images), want)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_multiply_sparsely(kind, monkeypatch):
    torch.manual_seed(0)
    model, inputs = ps.sparsify(kind(3, 4), 0.5), x(2, 3).float()
    compact = ps.compact(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        found = [torch.utils._pytree.tree_leaves(each(inputs))[0] for each in (compact, model)]
        torch.testing.assert_close(*found)
    monkeypatch.setattr(CompactWeight, "plain", lambda _: pytest.fail("dense values"))
    torch.utils._pytree.tree_leaves(compact(inputs))[0].sum().backward()


def test_recurrent_layers_keep_no_list_of_weights():
    torch.manual_seed(0)
    model = ps.sparsify(nn.LSTM(4, 5).double(), 0.5)
    compact, inputs = ps.compact(copy.deepcopy(model)), x(3, 2, 4)
    compact.flatten_parameters()
    assert sum(isinstance(weight, CompactWeight) for weight in compact._flat_weights) == 2
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (model, compact)]
    for each, optimizer in zip((model, compact), optimizers, strict=True):
        each(inputs)[0].square().sum().backward()
        optimizer.step()
    close(copy.deepcopy(compact)(inputs)[0], model(inputs)[0])


def test_parts_of_a_weight_are_computed_once_and_follow_its_places():
    torch.manual_seed(0)
    models = [ps.sparsify(nn.MultiheadAttention(8, 2).double(), share) for share in (0.5, 0.8)]
    compact, other = (ps.compact(copy.deepcopy(model)) for model in models)
    inputs = x(3, 2, 8), x(4, 2, 8), x(4, 2, 8)
    places = compact.parametrizations.in_proj_weight[0]
    close(compact(*inputs)[0], models[0](*inputs)[0])
    parts = places.parts((8, 16))
    compact(*inputs)
    assert places.parts((8, 16)) is parts
    compact.load_state_dict(other.state_dict())
    close(compact(*inputs)[0], models[1](*inputs)[0])
    close(copy.deepcopy(compact)(*inputs)[0], models[1](*inputs)[0])
