import copy
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import parasparse as ps
from tests.helpers.cases import PairLinear, Tied


def build():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    ).double()


def soft(model, init=0.0, **keywords):
    keywords = {"final_temperature": 200.0, "steps": 5, **keywords}
    return ps.ContinuousSparsification(model, ps.Gate(init=init), **keywords)


def inputs():
    return torch.randn(6, 1, 5, 5).double()


def logits_of(model, name):
    module = model.get_submodule(name.rpartition(".")[0])
    return module.parametrizations[name.rpartition(".")[2]][-1].logits


@pytest.mark.parametrize("init", [-0.2, 0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 3.7, 200.0])
def test_mask_and_gradients_are_those_of_the_formulas(init, temperature):
    """The layer of the original, written again: w sigmoid(T s) / sigmoid(s0)."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False).double()
    weight = model.weight.detach().clone().requires_grad_()
    cs = soft(model, init)
    with torch.no_grad():
        logits_of(model, "weight").add_(0.1 * torch.randn(4, 6).double())
    s = logits_of(model, "weight").detach().clone().requires_grad_()
    cs.temperature = temperature
    x = torch.randn(3, 6).double()

    mask = torch.sigmoid(temperature * s) / (1 / (1 + math.exp(-init)))
    loss = (x @ (weight * mask).T).square().sum() + 0.01 * mask.sum()
    loss.backward()
    ours = model(x).square().sum() + 0.01 * cs.penalty()
    ours.backward()
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(ours, loss, **close)
    torch.testing.assert_close(ps.mask_of(model, "weight"), mask, **close)
    torch.testing.assert_close(ps.stored(model, "weight").grad, weight.grad, **close)
    torch.testing.assert_close(logits_of(model, "weight").grad, s.grad, **close)

    cs.ticket = True
    hard = (s > 0).double() / (1 / (1 + math.exp(-init)))
    torch.testing.assert_close(model(x), x @ (weight * hard).T, **close)
    before = model(x)
    squashed = ps.squash(copy.deepcopy(model))
    assert type(squashed) is nn.Linear
    torch.testing.assert_close(squashed.weight, (weight * hard).detach(), **close)
    torch.testing.assert_close(ps.binarize(copy.deepcopy(model))(x), before, **close)
    folded = ps.stored(ps.binarize(model), "weight").detach()
    kept = hard != 0
    torch.testing.assert_close(folded[kept], (weight * hard)[kept].detach(), **close)


@pytest.mark.parametrize("steps", [2, 3, 85])
def test_the_temperature_goes_from_one_to_its_end_and_stays(steps):
    cs = soft(build(), steps=steps)
    assert cs.temperature == 1.0
    for epoch in range(steps):
        assert cs.temperature == pytest.approx(200.0 ** (epoch / (steps - 1)), rel=1e-12)
        cs.step()
    cs.step()
    assert cs.temperature == pytest.approx(200.0, rel=1e-12)
    cs.prune()
    assert (cs.temperature, cs.step_in_round, cs.rounds) == (1.0, 0, 1)
    cs.step()
    assert cs.temperature == pytest.approx(200.0 ** (1 / (steps - 1)), rel=1e-12)


@pytest.mark.parametrize("init", [-0.1, 0.0, 0.2])
@pytest.mark.parametrize("by", [None, 1.0, 7.0])
def test_prune_is_its_formula(init, by):
    torch.manual_seed(0)
    model = build()
    cs = soft(model, init)
    with torch.no_grad():
        for logits in cs.mask_parameters():
            logits.add_(0.1 * torch.randn_like(logits))
    before = [logits.detach().clone() for logits in cs.mask_parameters()]
    for _ in range(5):
        cs.step()
    cs.prune(by)
    for logits, old in zip(cs.mask_parameters(), before, strict=True):
        want = torch.minimum(
            (200.0 if by is None else by) * old, torch.tensor(init, dtype=torch.double)
        )
        torch.testing.assert_close(logits.detach(), want, rtol=0, atol=1e-12)
    (update,) = cs.history
    numel = sum(old.numel() for old in before)
    closed = sum(int((old <= 0).sum()) for old in before)
    share = sum(
        update.sparsity[n] * o.numel() for n, o in zip(update.sparsity, before, strict=True)
    )
    assert share / numel == pytest.approx(closed / numel)


def test_rewinding_brings_back_everything_but_the_masks():
    torch.manual_seed(0)
    model = build()
    cs = soft(model, 0.1)
    optimizers = [
        torch.optim.SGD(cs.weight_parameters(), 0.1, momentum=0.9, weight_decay=1e-2),
        torch.optim.SGD(cs.mask_parameters(), 0.1),
    ]

    def train(steps):
        for _ in range(steps):
            for optimizer in optimizers:
                optimizer.zero_grad()
            (model(inputs()).square().mean() + 1e-3 * cs.penalty()).backward()
            for optimizer in optimizers:
                optimizer.step()

    train(2)
    cs.checkpoint()
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    train(3)
    trained = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = list(model.parameters())
    cs.rewind()
    assert all(one is two for one, two in zip(parameters, model.parameters(), strict=True))
    for key, value in model.state_dict().items():
        of_mask = "logits" in key or "temperature" in key
        assert torch.equal(value, trained[key] if of_mask else saved[key]), key
    assert any(not torch.equal(trained[key], saved[key]) for key in saved if "running" in key)
    assert any(not torch.equal(trained[key], saved[key]) for key in saved if "logits" in key)


def test_parameters_are_shared_out():
    model = build()
    everything = {id(p) for p in model.parameters()}
    cs = soft(model)
    weights, masks = cs.weight_parameters(), cs.mask_parameters()
    assert {id(p) for p in weights} == everything
    assert [tuple(p.shape) for p in masks] == [(4, 1, 3, 3), (5, 36)]
    assert {id(p) for p in model.parameters()} == everything | {id(p) for p in masks}


def test_logits_of_other_gates_are_no_weights():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    one = ps.ContinuousSparsification(model, {"0.weight": ps.Gate()}, steps=3)
    ps.sparsify(model, {"1.weight": ps.Gate(ps.gates.hard_concrete)})
    assert len(one.weight_parameters()) == 4
    assert len(one.mask_parameters()) == 1


def test_remaining_counts_what_is_not_zero():
    model = nn.Linear(10, 10)
    cs = soft(model, 0.0)
    assert cs.remaining() == 1.0
    with torch.no_grad():
        logits_of(model, "weight").view(-1)[:30].fill_(-1.0)
    cs.temperature = 200.0
    assert cs.remaining() == 0.7  # sigmoid(-200) is 0 in 32 bits
    with torch.no_grad():
        logits_of(model, "weight").view(-1)[30:40].fill_(1.0)
    cs.ticket = True
    assert cs.remaining() == 0.1


def test_ties_and_pairs_have_one_mask_and_count_once():
    cs = ps.ContinuousSparsification(Tied(), {"*": ps.Gate()}, steps=3)
    assert len(cs.mask_parameters()) == 2
    assert cs.penalty().item() == 12 * 6 + 6 * 6
    pair = ps.ContinuousSparsification(PairLinear(), {"*": ps.Gate()}, steps=3)
    assert len(pair.mask_parameters()) == 1
    assert pair.penalty().item() == 24


def test_a_temperature_sweep_compiles_once():
    model = build().eval()
    cs = soft(model)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = inputs()
    for _ in range(4):
        torch.testing.assert_close(compiled(x), model(x))
        cs.step()
    assert len(graphs) == 1


def test_it_goes_on_where_it_was_left():
    def run(rounds, state=None):
        torch.manual_seed(0)
        model = build()
        cs = soft(model, 0.05)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        if state is not None:
            model.load_state_dict(state["model"])
            cs.load_state_dict(state["cs"])
            optimizer.load_state_dict(state["optimizer"])
        for number in rounds:
            if number == 0:
                cs.checkpoint()
            torch.manual_seed(number)
            for _ in range(3):
                optimizer.zero_grad()
                (model(inputs()).square().mean() + 1e-2 * cs.penalty()).backward()
                optimizer.step()
                cs.step()
            if number == 1:
                cs.prune()
                cs.rewind()
        return {
            "model": model.state_dict(), "cs": cs.state_dict(), "optimizer": optimizer.state_dict(),
        }  # fmt: skip

    whole = run(range(4))
    rest = run(range(2, 4), copy.deepcopy(run(range(2))))
    for one, two in zip(*map(torch.utils._pytree.tree_leaves, (whole, rest)), strict=True):
        assert torch.equal(one, two) if torch.is_tensor(one) else one == two
    elsewhere = soft(build(), 0.7)
    with pytest.raises(ValueError, match="must have the settings"):
        elsewhere.load_state_dict(whole["cs"])
    elsewhere = soft(build(), 0.05)
    with pytest.raises(KeyError):
        elsewhere.load_state_dict({k: v for k, v in whole["cs"].items() if k != "checkpoint"})
    assert elsewhere.rounds == 0
    other = soft(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="must be from a controller with the same rules"):
        other.load_state_dict(whole["cs"])


def test_a_ticket_that_keeps_nothing_is_warned_of():
    cs = soft(build(), -0.1)
    with pytest.warns(UserWarning, match="no logit is above 0, so the ticket keeps nothing"):
        cs.ticket = True
    assert cs.remaining() == 0.0
    cs = soft(build(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cs.ticket = True
    assert cs.ticket
    cs.ticket = False
    assert not cs.ticket


def test_rewinding_without_a_checkpoint_is_refused():
    model = build()
    cs = soft(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"`checkpoint\(\)` must be called before `rewind\(\)`"):
        cs.rewind()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("rules", "keywords", "text"),
    [
        (0.5, {}, "must give at least one tensor a `Gate` of"),
        ({"*": None}, {}, "must give at least one tensor a `Gate` of"),
        ({"0.weight": ps.Gate(), "*": 0.5}, {}, '"4.weight" have other treatments'),
        (ps.Gate(), {"final_temperature": 0.5}, "`final_temperature` must be finite and at least"),
        (ps.Gate(), {"final_temperature": math.inf}, "`final_temperature` must be finite"),
        (ps.Gate(), {"steps": 1}, "`steps` must be an integer >= 2"),
        ({"nowhere": ps.Gate()}, {}, "must each reach a tensor"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(rules, keywords, text):
    model = build()
    with pytest.raises(ValueError, match=text):
        ps.ContinuousSparsification(model, rules, **{"steps": 3, **keywords})
    assert not ps.is_sparse(model)


def test_temperatures_must_be_over_zero_and_gates_stay():
    model = build()
    cs = soft(model)
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="`temperature` must be finite and above 0"):
            cs.temperature = value
        with pytest.raises(ValueError, match="`temperature` must be finite and above 0"):
            cs.prune(value)
    assert cs.temperature == 1.0
    assert not cs.history
    cs.checkpoint()
    ps.binarize(model)
    with pytest.raises(RuntimeError, match="must stay on its model"):
        cs.rewind()
    with pytest.raises(RuntimeError, match='must stay on its model; those of "0.weight"'):
        cs.step()
    with pytest.raises(ValueError, match="which already has a SoftMask"):
        ps.sparsify(soft(build()).model, ps.Gate())  # two gates on one tensor


@pytest.mark.parametrize("before", [True, False])
def test_an_optimizer_that_does_not_hold_the_gates_is_told_of(before):
    model = nn.Linear(8, 4)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1)] if before else []
    cs = ps.ContinuousSparsification(model, ps.Gate(init=0.1), steps=9)
    optimizers = optimizers or [torch.optim.SGD(model.parameters(), 0.1)]
    told = pytest.warns(UserWarning, match="have not moved") if before else nullcontext()
    with told:
        for _ in range(3):
            model(torch.randn(2, 8)).square().mean().backward()
            optimizers[0].step()
            cs.step()
