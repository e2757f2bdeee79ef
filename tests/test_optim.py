import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import parasparse as ps
from parasparse.optim import (
    check_cuttable,
    cut,
    keeps_momentum,
    load_named_state,
    momentum_of,
    named_state,
    zero_entries,
)
from parasparse.schedules import Linear

OPTIMIZERS = {
    "sgd": lambda p, **kw: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, **kw),
    "adam": lambda p, **kw: torch.optim.Adam(p, 1e-2, amsgrad=True, **kw),
    "adamw": lambda p, **kw: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, **kw),
    "adagrad": lambda p, **kw: torch.optim.Adagrad(p, 0.1, initial_accumulator_value=0.1, **kw),
    "rmsprop": lambda p, **kw: torch.optim.RMSprop(p, 1e-2, momentum=0.9, centered=True, **kw),
    "muon": lambda p, **kw: torch.optim.Muon([q for q in p if q.ndim == 2], 1e-2, **kw),
}
VARIANTS = [
    (name, keyword)
    for name in OPTIMIZERS
    for keyword in ("", "foreach", "fused")
    if not (keyword and name == "muon") and not (keyword == "fused" and name == "rmsprop")
]
optimizers = pytest.mark.parametrize(
    ("name", "keyword"), VARIANTS, ids=[" ".join(v).strip() for v in VARIANTS]
)


def build():
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


def train(model, optimizer, steps=3):
    torch.manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(8, 12), torch.randint(4, (8,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def made(name, keyword, parameters):
    return OPTIMIZERS[name](list(parameters), **({keyword: True} if keyword else {}))


@optimizers
def test_state_of_changed_entries_is_zeroed_and_of_others_kept(name, keyword):
    model = build()
    optimizer = made(name, keyword, model.parameters())
    falls = Linear(1.0, 0.5, stop=4)  # the schedule falls: entries come back
    pruner = ps.GradualPruning(model, {"0": 0.8}, optimizer, schedule=falls, every=2)
    train(model, optimizer)
    pruner.step()
    stored = ps.stored(model, "0.weight")
    with torch.no_grad():
        stored.copy_(torch.rand_like(stored))  # others are the largest now: some go
    before = {k: v.clone() for k, v in optimizer.state[stored].items() if torch.is_tensor(v)}
    mask = ps.mask_of(model, "0.weight").clone()
    pruner.step()
    changed = mask ^ ps.mask_of(model, "0.weight")
    assert (changed & mask).any()  # dropped
    assert (changed & ~mask).any()  # grown
    assert any(value.shape == mask.shape for value in before.values())
    for key, old in before.items():
        new = optimizer.state[stored][key]
        if old.shape == mask.shape:
            assert not new[changed].any()
            assert torch.equal(new[~changed], old[~changed])
        else:
            assert torch.equal(new, old)
    train(model, optimizer)
    assert not model[0].weight[~ps.mask_of(model, "0.weight")].any()


@optimizers
def test_training_goes_on_by_name_where_the_order_of_parameters_differs(name, keyword):
    dense = build()
    first = made(name, keyword, dense.parameters())
    train(dense, first)
    masked = ps.sparsify(build(), 0.5)  # built anew, and masked before its optimizer
    masked.load_state_dict(dense.state_dict())
    other = made(name, keyword, masked.parameters())
    load_named_state(masked, other, named_state(dense, first))
    ps.deploy_masks(masked, {n: torch.tensor(1) for n, _ in ps.named_masks(masked)})
    train(dense, first)
    train(masked, other)
    for key, value in ps.dense_state_dict(masked).items():
        assert torch.equal(value, dense.state_dict()[key]), key
    # and back again
    again = build()
    again.load_state_dict(ps.dense_state_dict(masked))
    third = made(name, keyword, again.parameters())
    load_named_state(again, third, named_state(masked, other))
    train(masked, other)
    train(again, third)
    for key, value in ps.dense_state_dict(masked).items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_groups_keep_their_settings():
    model = build()
    groups = [{"params": [model[0].weight], "lr": 0.5}, {"params": [model[2].bias, model[0].bias]}]
    first = torch.optim.SGD(groups, 0.1, momentum=0.9)
    train(model, first)
    other = copy.deepcopy(model)
    groups = [{"params": [other[0].weight]}, {"params": [other[0].bias, other[2].bias]}]
    second = torch.optim.SGD(groups, 0.9)
    load_named_state(other, second, named_state(model, first))
    assert [group["lr"] for group in second.param_groups] == [0.5, 0.1]
    for one, two in ((model[0].bias, other[0].bias), (model[2].bias, other[2].bias)):
        assert torch.equal(
            first.state[one]["momentum_buffer"], second.state[two]["momentum_buffer"]
        )


def test_learned_masks_and_parametrized_weights_have_names_too():
    model = ps.sparsify(build(), {"0": ps.Gate(init=0.0)})
    weight_norm(model[2])
    state = named_state(model, torch.optim.SGD(model.parameters()))
    names = state["param_groups"][0]["params"]
    assert names[:3] == ["0.bias", "0.weight", "0.parametrizations.weight.0.logits"]
    assert {"2.weight.0", "2.weight.1", "2.bias"} == set(names[3:])


def test_nothing_happens_to_a_parameter_that_is_not_known_yet():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    zero_entries(optimizer, weight, torch.tensor([True, False]))
    assert not optimizer.state


def test_complex_state_is_zeroed():
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = torch.optim.Adam([weight])
    (weight * 1j).abs().sum().backward()
    optimizer.step()
    zero_entries(optimizer, weight, torch.tensor([True, False]))
    assert (optimizer.state[weight]["exp_avg"] == 0).tolist() == [True, False]


def test_a_state_of_other_parameters_is_refused():
    model, optimizer = build(), torch.optim.SGD(build().parameters(), 0.1)
    with pytest.raises(ValueError, match="must hold parameters of `model` only; 4 of them"):
        named_state(model, optimizer)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    state = named_state(model, optimizer)
    state["param_groups"][0]["params"][0] = "0.wieght"
    with pytest.raises(ValueError, match=r'it has no "0\.wieght" \(nearest: "0\.weight"'):
        load_named_state(model, optimizer, state)
    fewer = torch.optim.SGD([model[0].weight], 0.1)
    with pytest.raises(ValueError, match=r"groups of \[1\], `state` of \[4\]"):
        load_named_state(model, fewer, named_state(model, optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_momentum_is_the_buffer_or_adams_step(dtype):
    weight = nn.Parameter(torch.randn(3, 4, dtype=dtype))

    def trained(make):
        optimizer = make([weight])
        for _ in range(3):
            weight.grad = torch.randn(3, 4, dtype=dtype)
            optimizer.step()
        return optimizer, optimizer.state[weight]

    optimizer, state = trained(lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))
    assert momentum_of(optimizer, weight) is state["momentum_buffer"]
    assert keeps_momentum(optimizer, weight)
    optimizer, state = trained(lambda p: torch.optim.Adam(p, 0.1))
    parts = [
        torch.view_as_real(t) if t.is_complex() else t
        for t in (state["exp_avg"], state["exp_avg_sq"])
    ]
    want = parts[0] / (parts[1].sqrt() + 1e-8)
    found = momentum_of(optimizer, weight)
    torch.testing.assert_close(torch.view_as_real(found) if dtype.is_complex else found, want)
    assert keeps_momentum(optimizer, weight)
    if not dtype.is_complex:
        optimizer, state = trained(lambda p: torch.optim.Adamax(p, 0.1))
        assert momentum_of(optimizer, weight) is state["exp_avg"]
    optimizer, _ = trained(lambda p: torch.optim.SGD(p, 0.1))
    assert momentum_of(optimizer, weight) is None
    assert not keeps_momentum(optimizer, weight)
    optimizer, _ = trained(lambda p: torch.optim.Adagrad(p, 0.1))
    assert not keeps_momentum(optimizer, weight)


def test_momentum_is_kept_group_by_group():
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [one], "momentum": 0.9}, {"params": [two]}]
    optimizer = torch.optim.SGD(groups, 0.1)
    assert keeps_momentum(optimizer, one)
    assert not keeps_momentum(optimizer, two)


def test_asking_for_momentum_makes_no_state():
    weight = nn.Parameter(torch.randn(3, 4))
    optimizer = torch.optim.Adam([weight])
    assert momentum_of(optimizer, weight) is None
    assert not optimizer.state


class Averaging(torch.optim.SGD):
    """Moves a copy of the weights, under a name of its own, and steps like SGD."""

    copy_name = "slow"

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter][self.copy_name] = parameter.detach().clone()


class Coded(torch.optim.SGD):
    """Keeps its momentum in codes of a table, as bitsandbytes does, or without the table."""

    table = True

    def step(self, closure=None):
        super().step()
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["state1"] = torch.full(parameter.shape, 7, dtype=torch.uint8)
            if self.table:
                state["qmap1"] = torch.linspace(-1, 1, 256).round(decimals=2)


def stepped(kind):
    layer = nn.Linear(4, 4, bias=False)
    optimizer = kind(layer.parameters(), lr=0.1)
    layer(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    return layer, optimizer


@pytest.mark.parametrize("name", ["z", "a name that nobody knows"])
def test_a_copy_of_the_weight_becomes_what_the_weight_becomes(name):
    layer, optimizer = stepped(type("Own", (Averaging,), {"copy_name": name}))
    entries = torch.eye(4, dtype=torch.bool)
    copied = optimizer.state[layer.weight][name].clone()
    ps.optim.zero_entries(optimizer, layer.weight, entries)
    assert torch.equal(optimizer.state[layer.weight][name], copied)
    ps.optim.zero_entries(optimizer, layer.weight, entries, weights_too=True)
    assert torch.equal(optimizer.state[layer.weight][name], copied.masked_fill(entries, 0))


def test_a_copy_of_more_digits_stays():
    weight = nn.Parameter(torch.randn(8, 8, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight])
    digits = weight.detach().float() * 1.001  # less than half of the last digit of the weight
    optimizer.state[weight]["a name that nobody knows"] = digits.clone()
    ps.optim.zero_entries(optimizer, weight, torch.ones(8, 8, dtype=torch.bool))
    assert torch.equal(optimizer.state[weight]["a name that nobody knows"], digits)


def test_codes_are_set_to_the_code_of_zero():
    layer, optimizer = stepped(Coded)
    entries = torch.eye(4, dtype=torch.bool)
    ps.optim.zero_entries(optimizer, layer.weight, entries)
    state = optimizer.state[layer.weight]
    values = state["qmap1"][state["state1"].long()]
    assert (values[entries] == 0).all()
    assert (state["state1"][~entries] == 7).all()


@pytest.mark.parametrize("make", [
    lambda model, opt: ps.GradualPruning(model, 0.5, opt, schedule=lambda step: 1.0, every=1),
    lambda model, opt: ps.rigl(model, 0.5, opt, stop=9, every=1),
])  # fmt: skip
def test_a_state_that_cannot_be_cleared_is_refused_before_masks_change(make):
    kind = type("Coded", (Coded,), {"table": False})
    layer, optimizer = stepped(kind)
    with pytest.raises(TypeError, match='"state1" of Coded .*uint8'):
        make(layer, optimizer)
    layer = nn.Linear(4, 4, bias=False)
    optimizer = kind(layer.parameters(), lr=0.1)
    controller = make(layer, optimizer)
    before = ps.mask_of(layer, "weight").clone()
    layer(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    with pytest.raises(TypeError, match='"state1"'):
        for _ in range(3):
            controller.step()
    assert torch.equal(ps.mask_of(layer, "weight"), before)
    assert controller.history == []


class Inside:
    """Wraps an optimizer, as Lookahead does."""

    def __init__(self, optimizer):
        self.optimizer, self.state, self.param_groups = optimizer, {}, optimizer.param_groups


class SharpnessAware(torch.optim.Optimizer):
    """Keeps a state of its own, and calls the optimizer inside by another name."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.base_optimizer, self.param_groups = optimizer, optimizer.param_groups


@pytest.mark.parametrize("wrap", [Inside, SharpnessAware, lambda o: Inside(SharpnessAware(o))])
def test_the_state_of_an_optimizer_inside_another_is_cleared(wrap):
    layer, optimizer = stepped(partial(torch.optim.SGD, momentum=0.9))
    wrapped, entries = wrap(optimizer), torch.ones(4, 4, dtype=torch.bool)
    assert ps.optim.momentum_of(wrapped, layer.weight) is not None
    ps.optim.zero_entries(wrapped, layer.weight, entries)
    assert not optimizer.state[layer.weight]["momentum_buffer"].any()


class Nameless(torch.optim.Optimizer):
    """Has `betas`, and its momentum under a name that nobody knows."""

    def __init__(self, params):
        super().__init__(params, {"betas": (0.9, 0.9)})

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["drift"] = parameter.grad.clone()


def test_a_momentum_of_an_unknown_name_is_told_of_and_can_be_named():
    layer = nn.Linear(4, 4, bias=False)
    optimizer = Nameless(layer.parameters())
    controller = ps.sparse_momentum(layer, 0.5, optimizer, stop=9, every=1)
    layer(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="state of Nameless has none under a known name"):
        controller.step()
    ps.optim.MOMENTA.append("drift")
    try:
        controller.step()
    finally:
        ps.optim.MOMENTA.remove("drift")
    assert len(controller.history) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_cut_states_are_those_of_the_part_and_come_back(name):
    weight = nn.Parameter(torch.randn(4, 3))
    optimizer = OPTIMIZERS[name]([weight])
    weight.grad = torch.randn(4, 3)
    optimizer.step()
    check_cuttable(optimizer, [weight])
    before = dict(optimizer.state[weight])
    undo = cut(optimizer, weight, lambda tensor: tensor[:2])
    for key, value in optimizer.state[weight].items():
        alike = isinstance(value, torch.Tensor) and before[key].shape == weight.shape
        assert torch.equal(value, before[key][:2]) if alike else value is before[key]
    undo()
    assert all(value is before[key] for key, value in optimizer.state[weight].items())


class Around:
    """An optimizer around another, as accelerate makes it, with a state of its own."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.state = {}


def test_states_of_an_optimizer_inside_another_are_cut():
    weight = nn.Parameter(torch.randn(4, 3))
    inner = torch.optim.SGD([weight], 0.1, momentum=0.9)
    weight.grad = torch.randn(4, 3)
    inner.step()
    cut(Around(inner), weight, lambda tensor: tensor[:, :1])
    assert inner.state[weight]["momentum_buffer"].shape == (4, 1)


def test_states_of_unknown_layout_are_refused():
    weight = nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.Adafactor([weight])
    weight.grad = torch.randn(4, 3)
    optimizer.step()
    with pytest.raises(TypeError, match="build a new one afterwards"):
        check_cuttable(optimizer, [weight])
    with pytest.raises(ValueError, match="of the same model object"):
        check_cuttable(optimizer, [nn.Parameter(torch.zeros(2))])
