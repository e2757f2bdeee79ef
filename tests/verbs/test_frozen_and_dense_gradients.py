import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import parasparse as ps
from tests.helpers.cases import CASES, PairLinear, Tied
from tests.laws.test_laws import loss_of, run


def test_frozen_refuses_grad_mode_and_unset_masks():
    model = ps.sparsify(nn.Linear(4, 4), 0.5)
    with pytest.raises(RuntimeError, match="grad mode off"), ps.frozen(model):
        pass
    ps.deploy_masks(model, {"weight": None})
    with pytest.raises(RuntimeError, match="no sparsity mask"), torch.no_grad(), ps.frozen(model):
        pass


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_frozen_evaluates_once_and_lets_go_even_after_an_error(mode):
    model = ps.sparsify(nn.Linear(4, 4), 0.5)
    x = torch.randn(2, 4)
    expected = model(x)
    with pytest.raises(KeyError), mode(), ps.frozen(model), ps.frozen(model):
        assert model.weight is model.weight
        assert torch.equal(model(x), expected)
        raise KeyError
    assert model.weight is not model.weight
    model(x).sum().backward()


def test_copies_made_inside_frozen_and_dense_gradients_are_free():
    model = ps.sparsify(nn.Linear(4, 4), 0.5)
    with torch.no_grad(), ps.frozen(model):
        twin = copy.deepcopy(model)
    with ps.dense_gradients(model):
        other = copy.deepcopy(model)
    for copied in (twin, other):
        with torch.no_grad():
            ps.stored(copied, "weight").zero_()
        assert not copied.weight.any()


@pytest.mark.filterwarnings("ignore")
def test_exporting_and_tracing_inside_frozen_are_refused():
    model = ps.sparsify(nn.Linear(4, 4), 0.5)
    x = torch.randn(2, 4)
    with torch.no_grad(), ps.frozen(model):
        with pytest.raises(RuntimeError, match="inside `frozen`"):
            torch.jit.trace(model, x)
        for strict in (False, True):
            with pytest.raises(Exception, match="inside `frozen`"):
                torch.export.export(model, (x,), strict=strict)
    torch.export.export(model, (x,))


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if not c.underneath])
def test_dense_gradients_are_those_of_the_squashed_network(name):
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    ps.sparsify(model, case.rules)
    twin = ps.squash(copy.deepcopy(model))
    with ps.dense_gradients(model) as grads:
        loss_of(run(model, inputs)).backward()
    loss_of(run(twin, inputs)).backward()
    dense = dict(twin.named_parameters())
    assert set(grads) == {name for name, _ in ps.named_masks(model)}
    for key, grad in grads.items():
        if key in dense and dense[key].requires_grad:
            torch.testing.assert_close(grad, dense[key].grad)
            masked = ps.stored(model, key).grad
            torch.testing.assert_close(masked, grad * ps.mask_of(model, key))


def test_dense_gradients_of_a_pair_are_one_complex_gradient():
    model = ps.sparsify(PairLinear(), 0.5)
    x = torch.randn(2, 6)
    with ps.dense_gradients(model) as grads:
        assert grads["weight"] is None
        (model(x) * torch.arange(8.0)).sum().backward()
    wanted = torch.complex(
        torch.arange(4.0)[:, None] * x.sum(0), torch.arange(4.0, 8.0)[:, None] * x.sum(0)
    )
    torch.testing.assert_close(grads["weight"], wanted)


def test_dense_gradients_are_not_entered_twice():
    model = ps.sparsify(nn.Linear(4, 4), 0.5)
    with ps.dense_gradients(model) as grads:
        with pytest.raises(RuntimeError, match="twice"), ps.dense_gradients(model):
            pass
        model(torch.ones(1, 4)).sum().backward()
    assert grads["weight"].all()


def test_dense_gradients_accumulate_and_sum_over_ties():
    model = ps.sparsify(Tied(), {"head.weight": 0.5})
    twin = ps.squash(copy.deepcopy(model))
    with ps.dense_gradients(model) as grads:
        for _ in range(2):
            model(torch.arange(5)).pow(2).sum().backward()
            twin(torch.arange(5)).pow(2).sum().backward()
    torch.testing.assert_close(grads["embedding.weight"], twin.head.weight.grad)
    assert len(grads) == 1
    first = grads["embedding.weight"].clone()
    model(torch.arange(5)).sum().backward()
    assert torch.equal(grads["embedding.weight"], first)  # the block is over


@pytest.mark.parametrize("reentrant", [False, True])
def test_dense_gradients_under_checkpointing(reentrant):
    model = ps.sparsify(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), 0.5)
    x = torch.randn(2, 4, requires_grad=True)
    with ps.dense_gradients(model) as plain:
        model(x).pow(2).sum().backward()
    with ps.dense_gradients(model) as grads:
        checkpoint(model, x, use_reentrant=reentrant).pow(2).sum().backward()
    for name in plain:
        torch.testing.assert_close(grads[name], plain[name])


def test_dense_gradients_under_amp_carry_the_scale_like_grad():
    model = ps.sparsify(nn.Linear(4, 4), 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 4)
    with ps.dense_gradients(model) as grads:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().sum()
        scaler.scale(loss).backward()
    mask = ps.mask_of(model, "weight")
    grad = ps.stored(model, "weight").grad
    assert torch.equal(grad, grads["weight"] * mask)
    torch.testing.assert_close(grads["weight"], 8 * x.sum(0).expand(4, 4), rtol=0.02, atol=0.02)
    scaler.step(optimizer)
    scaler.update()
