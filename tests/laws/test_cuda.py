"""The core laws on a CUDA device, where there is one."""

import copy

import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse.acceleration.formats.format import formats_of
from parasparse.patterns import n_of_m, nearly_diagonal
from parasparse.patterns.selection.kth import highest
from tests.helpers.cases import CASES
from tests.laws.test_laws import loss_of, run
from tests.patterns.test_patterns import PATTERNS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

WITH_CUDA = {n: c for n, c in CASES.items() if not c.underneath}


def on_cuda(value):
    return value.cuda() if isinstance(value, (torch.Tensor, nn.Module)) else value


@pytest.mark.parametrize("first", ["move", "sparsify"])
@pytest.mark.parametrize("case", WITH_CUDA.values(), ids=WITH_CUDA.keys())
def test_masks_live_where_their_tensors_do_and_squash_changes_nothing(case, first):
    model, inputs = case.build(), tuple(map(on_cuda, case.inputs()))
    model = model.cuda() if first == "move" else ps.sparsify(model, case.rules).cuda()
    if first == "move":
        ps.sparsify(model, case.rules)
    out = run(model.eval(), inputs)
    assert all(mask.is_cuda for _, mask in ps.named_masks(model))
    twin = ps.squash(copy.deepcopy(model))
    torch.testing.assert_close(run(twin, inputs), out)
    if out.requires_grad:
        with ps.dense_gradients(model) as grads:
            loss_of(run(model, inputs)).backward()
        for name, mask in ps.named_masks(model):
            grad = ps.stored(model, name).grad
            if grad is not None:
                assert not grad[~mask].any()
                torch.testing.assert_close(grad, grads[name] * mask)


def test_an_unset_mask_follows_its_tensor_onto_the_device():
    model = ps.sparsify(nn.Linear(4, 4), {"weight": ps.Fixed(None)}).cuda()
    ps.deploy_masks(model, {"weight": torch.eye(4)})
    assert ps.mask_of(model, "weight").is_cuda


def test_sparse_embedding_gradients_on_the_device():
    model = ps.sparsify(nn.Embedding(7, 3, sparse=True).cuda(), {"weight": 0.5})
    model(torch.tensor([1, 1, 4]).cuda()).sum().backward()
    grad = model.parametrizations.weight.original.grad.to_dense()
    assert not grad[~ps.mask_of(model, "weight")].any()


def test_a_compiled_model_follows_its_masks_on_the_device():
    model = ps.sparsify(nn.Linear(8, 8).cuda(), 0.5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 8).cuda()
    for sparsity in (0.1, 0.9):
        ps.sparsify(model, sparsity)
        torch.testing.assert_close(compiled(x), model(x))


DTYPES = [torch.half, torch.bfloat16, torch.float, torch.double, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection_on_the_device_is_that_of_the_cpu(dtype):
    scores = [torch.randint(0, 500, (n,)).to(dtype) for n in (200_000, 3, 70_000)]
    for kept in (1, 27_000, 200_003):
        masks = highest([score.cuda() for score in scores], kept)
        assert all(mask.is_cuda for mask in masks)
        mixed = highest([scores[0].cuda(), scores[1], scores[2].cuda()], kept)
        for mask, other, wanted in zip(masks, mixed, highest(scores, kept), strict=True):
            assert torch.equal(mask.cpu(), wanted)
            assert torch.equal(other.cpu(), wanted)


@pytest.mark.parametrize(("pattern", "shape"), PATTERNS.values(), ids=PATTERNS.keys())
def test_patterns_on_the_device_are_those_of_the_cpu(pattern, shape):
    scores = torch.rand(shape, dtype=torch.double)
    mask = pattern(scores.cuda(), 0.6)
    assert mask.is_cuda
    assert torch.equal(mask.cpu(), pattern(scores, 0.6))
    jointly = ps.patterns.jointly({"a": scores.cuda(), "b": scores}, 0.6, pattern=pattern)
    assert jointly["a"].is_cuda
    assert not jointly["b"].is_cuda


@pytest.mark.parametrize("pattern", [n_of_m(2, 4), nearly_diagonal(3)], ids=str)
def test_patterns_without_a_sparsity_on_the_device(pattern):
    scores = torch.rand(8, 16)
    assert torch.equal(pattern(scores.cuda()).cpu(), pattern(scores))


@torch.no_grad()
def test_an_accelerated_model_on_the_device():
    dense = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Unflatten(1, (1024, 1, 1)))
    dense.append(nn.Conv2d(1024, 512, 1)).cuda().eval()
    ps.squash(ps.sparsify(dense, 0.95))
    x = torch.randn(8, 512).cuda()
    plan = {"0.weight": [[1, "csr"]], "3.weight": [[1, "csr"]]}
    for arguments in ({"formats": plan}, {"example_inputs": x}):
        model = ps.accelerate(copy.deepcopy(dense), **arguments)
        for rows in (1, 2, 8, 100):
            x = torch.randn(rows, 512).cuda()
            torch.testing.assert_close(model(x), dense(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_two_of_four_on_the_device():
    dense = ps.sparsify(nn.Linear(256, 256), ps.Prune(pattern=n_of_m(2, 4)))
    ps.squash(dense).half().cuda()
    if "2:4" not in formats_of(dense.weight, ["2:4"]):
        pytest.skip("torch has no 2:4 kernel for this device")
    model = ps.accelerate(copy.deepcopy(dense), formats={"weight": [[1, "2:4"]]})
    x = torch.randn(64, 256).half().cuda()
    torch.testing.assert_close(model(x), dense(x), rtol=1e-2, atol=1e-2)
    assert torch.equal(ps.restore(model).weight, dense.weight)
