"""The core laws on a CUDA device, where there is one."""

import copy

import pytest
import torch
from torch import nn

import parasparse as ps
from tests.cases import CASES
from tests.test_laws import loss_of, run

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
